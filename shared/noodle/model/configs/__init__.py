"""Configs of models as transformers would read them."""
