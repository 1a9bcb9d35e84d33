"""Processes that the command line starts beside a cluster: verify's reference, bench's control, profile and convert."""
