"""What operators use: health, stored reports and metrics, Prometheus' targets, connectivity. Computes nothing."""
