"""Converts a GGUF of any family that noodle runs to a safetensors folder.

A process for `noodle convert` (`python -m services.stage.tools.convert FILE.gguf FOLDER`). It needs torch and
transformers, and the whole model in memory. The coordinator's model store converts the llama architecture without them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from noodle.errors import ConfigurationError, ModelNotFound, NoodleError, StartError, UnsupportedModel
from noodle.model.families import check_supported

DTYPES = ("float32", "float16", "bfloat16")
# byte-level tokenizers that transformers splits correctly by its default (GPT-2's) expression
DEFAULT_SPLIT_NAMES = ("gpt-2", "gpt2", "default")


def convert(gguf_path: Path, folder: Path, dtype: str = "float32") -> None:
    """Write `gguf_path` as a new `folder`; raises ModelNotFound, ConfigurationError or UnsupportedModel.

    Quantized weights become `dtype`; only float32 keeps their exact values. `folder` appears only when it is complete.
    """
    if not gguf_path.is_file():
        raise ModelNotFound(f"There is no file {gguf_path}.", cure="Name a .gguf file.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder} exists and is not empty.", cure="Name a folder that does not exist yet.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True
        ) as work_dir:
            new_folder = Path(work_dir, "folder")
            _write(gguf_path, new_folder, dtype)
            new_folder.replace(folder)
    except OSError as error:
        raise StartError(
            f"{folder} could not be written ({error.strerror or error}).", cure="Free some disk space, or name another."
        ) from error


def _write(gguf_path: Path, folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    file = _GgufFile(gguf_path)
    _check_tokenizer(file)
    source: dict[str, Any] = {"gguf_file": gguf_path.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(gguf_path.parent, **source)
        check_supported(config.to_dict())
        _check_rotary(file, config.to_dict())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        # from_pretrained(gguf_file=) does the same, but needs the package accelerate
        loaded = load_gguf_checkpoint(
            str(gguf_path), return_tensors=True, model_to_load=model, torch_dtype=getattr(torch, dtype)
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, **source)
    # transformers raises each of these for what it cannot read; a truncated file gives numpy's IndexError
    except (ValueError, KeyError, IndexError, RuntimeError, TypeError) as error:
        raise _unsupported(f"transformers cannot read {gguf_path} ({type(error).__name__}: {error}).") from error
    tensors: dict[str, torch.Tensor] = loaded["tensors"]
    _check_complete(model, tensors, file)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class _GgufFile:
    """The properties that decide whether transformers reads a GGUF file correctly."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        def text(key: str, default: str) -> str:
            return str(reader.fields[key].contents()) if key in reader.fields else default

        self.path = path
        try:
            reader = GGUFReader(path)
            self.architecture = text("general.architecture", "unnamed")
            self.tokenizer_kind = text("tokenizer.ggml.model", "")
            self.tokenizer_split = text("tokenizer.ggml.pre", "default")
            self.rotary_scaling = text(f"{self.architecture}.rope.scaling.type", "none")
            self.tensor_names = [tensor.name for tensor in reader.tensors]
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise UnsupportedModel(
                f"{path} is not a readable GGUF file ({error}).", cure="It may be cut short: fetch it again."
            ) from error

    def __str__(self) -> str:
        return f"{self.path} ({self.architecture})"


def _check_tokenizer(file: _GgufFile) -> None:
    """Refuse a byte-level tokenizer that transformers would silently split by the default expression."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    known = (*GGUF_PRE_TOKENIZER_SPLITS, *DEFAULT_SPLIT_NAMES)
    if file.tokenizer_kind == "gpt2" and file.tokenizer_split not in known:
        raise _unsupported(
            f"{file} splits text as {file.tokenizer_split!r}, which transformers does not support: its tokens would "
            "differ from those that the model was trained with."
        )


def _check_rotary(file: _GgufFile, config: dict[str, Any]) -> None:
    """Refuse a rotary scaling of the file that transformers would silently leave out."""
    read = (config.get("rope_parameters") or {}).get("rope_type", "default")
    in_tensors = any(name.startswith("rope_") for name in file.tensor_names)
    if read == "default" and (file.rotary_scaling != "none" or in_tensors):
        named = file.rotary_scaling if file.rotary_scaling != "none" else "by its rope_ tensors"
        raise _unsupported(
            f"{file} scales rotary positions ({named}), which transformers does not read from a GGUF of this "
            "architecture."
        )


def _check_complete(model: Any, tensors: dict[str, Any], file: _GgufFile) -> None:
    """Refuse a file that lacks a parameter, other than a tied one, or that has tensors left over."""
    tied = set(model.all_tied_weights_keys)
    persistent = {name for name, _ in model.named_parameters(remove_duplicate=False)} - tied
    missing = sorted(persistent - tensors.keys())
    if missing:
        raise _unsupported(
            f"transformers finds no weights for {len(missing)} parameters in {file.path}, the first is {missing[0]}."
        )
    # gate and up of the experts become one tensor
    merged = sum("ffn_up_exps" in name for name in file.tensor_names)
    unread = len(file.tensor_names) - merged - len(tensors)
    if unread > 0:
        raise _unsupported(f"transformers leaves {unread} tensors of {file} unread.")


def _unsupported(message: str) -> UnsupportedModel:
    return UnsupportedModel(
        message, cure="Look for the model as safetensors and set NOODLE_MODEL to its hub id or folder."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert by the command line's arguments; after an error print it to stderr and return exit status 1."""
    parser = argparse.ArgumentParser(prog="noodle convert", description="Write a .gguf file as a safetensors folder.")
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        convert(options.file, options.folder, options.dtype)
    except NoodleError as error:
        print(error, file=sys.stderr)
        return 1
    print(options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
