"""Number formats of weights and KV rows: their names and bytes.

`f32` to `q4_K` are ggml's names. `stored` is each tensor in the type in which the model's file holds it.
"""

from __future__ import annotations

STORED = "stored"
WEIGHT_ITEM_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32, "q4_K": 144 / 256}
KV_ITEM_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
KV_FORMATS = ("f16", "q8_0", "f32")  # of ggml
WEIGHTS = (STORED, *WEIGHT_ITEM_BYTES)
FORMAT_BY_DTYPE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # of the dtypes of transformers
DTYPE_BY_FORMAT = {name: dtype for dtype, name in FORMAT_BY_DTYPE.items()}
EXECUTORS = ("transformers", "ggml")
QUALITIES = (STORED, "exact")  # exact: float32 weights with the file's values, float32 KV rows
