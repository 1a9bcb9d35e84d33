"""A model's vocabulary: text to token ids and back, from a folder's tokenizer.json or from a GGUF file's metadata.

Knows no chat template and nothing of requests.
"""
