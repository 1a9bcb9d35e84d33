"""Slices computed by transformers' own modules; with stage/tools the only code that imports torch and transformers."""
