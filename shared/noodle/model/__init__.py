"""What processes agree on about a model: its files, families, number formats and weights.

Knows configs and safetensors headers; never torch or layers.
"""
