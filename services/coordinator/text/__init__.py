"""Text to tokens and tokens to text: the tokenizer, the chat template, detokenization and the answer as it grows.

Knows the model's tokenizer files; never layers, stages or routes.
"""
