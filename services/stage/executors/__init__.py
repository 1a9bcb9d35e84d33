"""Computes layers with their KV rows, by transformers or by ggml, behind the interface in base.py.

Knows models, tensors and sessions; never the network, plans, text or any other part of the stage.
"""
