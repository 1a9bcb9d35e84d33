"""A layer's mathematics as ggml operations: attention, feed-forward parts, and what surrounds them."""
