"""Decide which machine computes which layers, from measurements and the model's shape. Knows no requests."""
