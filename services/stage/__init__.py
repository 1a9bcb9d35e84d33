"""A stage: computes a range of layers on one device and holds their KV rows; it never sees text."""
