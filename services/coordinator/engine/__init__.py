"""The loop and what it decides: requests, sequences, steps, KV accounting and the pipeline to the stages.

Knows tokens and connections; never text, routes or the model's files.
"""
