"""Reads quantized safetensors checkpoints: FP8, GPTQ, AWQ, compressed-tensors, bitsandbytes and MXFP4.

A quantized matrix is several tensors of the file: codes, scales, zero points. `Checkpoint` shows them under the key of
the matrix that they stand for, with its shape, rows of its values in float32, and the type in which ggml holds it.
"""
