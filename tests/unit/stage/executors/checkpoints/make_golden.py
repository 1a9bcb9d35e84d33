"""Makes golden.safetensors: quantized matrices as other libraries write them, and the values that these give back.

Run in an environment of its own, with AutoAWQ's and llama.cpp's sources beside it:

    pip install torch transformers safetensors compressed-tensors==0.20.0 bitsandbytes==0.50.2 accelerate
    git clone https://github.com/casper-hansen/AutoAWQ && git clone https://github.com/ggml-org/llama.cpp
    PYTHONPATH=AutoAWQ:llama.cpp:llama.cpp/gguf-py python make_golden.py golden.safetensors
"""

# mypy: ignore-errors
import json
import sys
from functools import partial
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

ROWS, COLUMNS = 32, 64
tensors: dict[str, torch.Tensor] = {}
configs: dict[str, dict] = {}


def add(name: str, config: dict, parts: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    configs[name] = config
    for key, value in parts.items():
        tensors[f"{name}/{key}"] = value.contiguous()
    tensors[f"{name}/expected"] = expected.float().contiguous()


def matrix(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def make_awq() -> None:
    """Packed by WQLinear_GEMM.from_linear, read by dequantize_gemm."""
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    group = 32
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = matrix(1)
    grouped = linear.weight.data.reshape(ROWS, -1, group)
    least, most = grouped.amin(-1), grouped.amax(-1)
    scales = ((most - least) / 15).half()
    zeros = (-least / scales.float()).round().clamp(0, 15)
    linear.weight.data = (
        ((linear.weight.data.reshape(ROWS, -1, group) / scales[..., None].float()).round() + zeros[..., None])
        .clamp(0, 15)
        .sub(zeros[..., None])
        * scales[..., None].float()
    ).reshape(ROWS, COLUMNS)
    packed = WQLinear_GEMM.from_linear(linear, 4, group, scales=scales.t().contiguous(), zeros=zeros.t().contiguous())
    parts = {f"m.{name}": getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    expected = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales.float(), 4, group).t()
    add(
        "awq",
        {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"},
        parts,
        expected,
    )


def make_gptq() -> None:
    """Read by dequant_gptq in llama.cpp's converter."""
    from conversion.base import ModelBase

    generator = torch.Generator().manual_seed(2)
    for name, bits, group, layout, symmetric, act_order in (
        ("gptq", 4, 32, None, True, False),
        ("gptq_asymmetric", 4, 16, "gptq", False, False),
        ("gptq_act_order", 4, 32, "gptq", False, True),
        ("gptq_v2", 4, 32, "gptq_v2", False, False),
        ("gptq_whole_rows", 4, -1, None, True, False),
        ("gptq_8_bit", 8, 32, None, True, False),
        ("gptq_2_bit", 2, 32, None, True, False),
    ):
        per_word = 32 // bits
        size = COLUMNS if group < 0 else group
        groups = COLUMNS // size
        codes = torch.randint(0, 1 << bits, (COLUMNS, ROWS), generator=generator)
        raised = 0 if layout == "gptq_v2" else 1
        if symmetric:
            zeros = torch.full((groups, ROWS), (1 << bits - 1) - raised)
        else:
            zeros = torch.randint(0, 1 << bits, (groups, ROWS), generator=generator)
        order = torch.arange(COLUMNS) // size
        if act_order:
            order = order[torch.randperm(COLUMNS, generator=generator)]
        shifts = torch.arange(0, 32, bits)
        qweight = (codes.reshape(-1, per_word, ROWS) << shifts[None, :, None]).sum(1)
        qzeros = (zeros.reshape(groups, -1, per_word) << shifts).sum(-1)
        scales = (torch.rand(groups, ROWS, generator=generator) * 0.02 + 0.001).half()
        parts = {
            "m.qweight": as_words(qweight),
            "m.qzeros": as_words(qzeros),
            "m.scales": scales,
            "m.g_idx": order.to(torch.int32),
        }
        config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": act_order}
        if layout:
            config["checkpoint_format"] = layout
        add(name, config, parts, dequantized(ModelBase, config, parts)["m.weight"])


def as_words(words: torch.Tensor) -> torch.Tensor:
    """The lower 32 bits of each integer."""
    return torch.from_numpy(words.numpy().astype("uint32").view("int32"))


def dequantized(base, config: dict, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What llama.cpp's converter makes of quantized tensors."""
    model = SimpleNamespace(
        hparams={"quantization_config": config},
        model_tensors={key: partial(lambda value: value, value) for key, value in parts.items()},
        lazy=False,
        _is_nvfp4=False,
        _fp8_as_q8=False,
    )
    base.dequant_model(model)
    return {key: get() for key, get in model.model_tensors.items()}


def make_compressed() -> None:
    """Written and read by compressed-tensors; read in float32, since the library rounds to the scales' type."""
    from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
    from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    for seed, (name, layout, dtype, args) in enumerate(
        (
            ("int4_group", "pack-quantized", torch.bfloat16, {"num_bits": 4, "strategy": "group", "group_size": 32}),
            (
                "int4_asymmetric",
                "pack-quantized",
                torch.bfloat16,
                {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
            ),
            ("int4_channel", "pack-quantized", torch.float16, {"num_bits": 4, "strategy": "channel"}),
            (
                "int4_channel_asymmetric",
                "pack-quantized",
                torch.float16,
                {"num_bits": 4, "strategy": "channel", "symmetric": False},
            ),
            ("int8_packed", "pack-quantized", torch.bfloat16, {"num_bits": 8, "strategy": "channel"}),
            ("int8", "int-quantized", torch.bfloat16, {"num_bits": 8, "strategy": "channel"}),
            ("float8", "float-quantized", torch.bfloat16, {"num_bits": 8, "type": "float", "strategy": "channel"}),
            ("float8_tensor", "float-quantized", torch.float32, {"num_bits": 8, "type": "float", "strategy": "tensor"}),
            (
                "mxfp4_packed",
                "mxfp4-pack-quantized",
                torch.bfloat16,
                {
                    "num_bits": 4,
                    "type": "float",
                    "strategy": "group",
                    "group_size": 32,
                    "scale_dtype": torch.uint8,
                },
            ),
        )
    ):
        weight = matrix(10 + seed)
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**{"symmetric": True, **args}))
        size = args.get("group_size", COLUMNS)
        grouped = weight.reshape(ROWS, -1, size)
        least, most = grouped.amin(-1), grouped.amax(-1)
        if args["strategy"] == "tensor":
            least, most = weight.amin().reshape(1), weight.amax().reshape(1)
        scale, zero = calculate_qparams(least, most, scheme.weights)
        scale = scale.to(dtype)
        compressor = {
            "pack-quantized": PackedQuantizationCompressor,
            "mxfp4-pack-quantized": MXFP4PackedCompressor,
        }.get(layout, NaiveQuantizationCompressor)
        state = {"weight": weight.to(dtype), "weight_scale": scale}
        if not scheme.weights.symmetric:
            state["weight_zero_point"] = zero.to(torch.int8)
        packed = compressor.compress(state, scheme)
        read = {
            key: value.float() if key == "weight_scale" and value.dtype == dtype else value
            for key, value in packed.items()
        }
        expected = compressor.decompress(read, scheme)["weight"]
        config = {
            "quant_method": "compressed-tensors",
            "format": layout,
            "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        }
        add(name, config, {f"m.{key}": value for key, value in packed.items()}, expected)


def make_bitsandbytes() -> None:
    """Written and read by bitsandbytes on a CPU."""
    from bitsandbytes import functional

    for name, kind, nested in (("nf4", "nf4", False), ("nf4_nested", "nf4", True), ("fp4", "fp4", False)):
        weight = matrix(30, 72, 128) if nested else matrix(30)  # more runs than one scale of scales covers
        codes, state = functional.quantize_4bit(weight, blocksize=32, compress_statistics=nested, quant_type=kind)
        parts = {"m.weight": codes} | {f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        add(name, config, parts, functional.dequantize_4bit(codes, state))
    codes, largest, _ = functional.int8_vectorwise_quant(matrix(31).half())
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    parts = {"m.weight": codes, "m.SCB": largest, "m.weight_format": torch.tensor(0, dtype=torch.uint8)}
    add("bitsandbytes_int8", config, parts, functional.int8_vectorwise_dequant(codes, largest))


make_awq()
make_gptq()
make_compressed()
make_bitsandbytes()
save_file(tensors, sys.argv[1], metadata={name: json.dumps(config) for name, config in configs.items()})
