"""GGUF files of tiny models, written by llama.cpp's own converter."""
