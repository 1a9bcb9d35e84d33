"""Slices computed by ggml, with noodle's own C kernels where they are built. Knows no torch and no transformers."""
