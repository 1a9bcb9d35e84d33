"""`python -m services.stage.convert FILE.gguf FOLDER`: a GGUF of any family noodle runs, as a safetensors folder.

It needs torch and transformers, and the whole model in memory. The llama architecture needs neither: the coordinator's
model store converts it by itself.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noodle.errors import ConfigurationError, ModelNotFound, NoodleError, StartError, UnsupportedModel
from noodle.model.families import check_supported

DTYPES = ("float32", "float16", "bfloat16")
# byte-level tokenizers whose text is cut by transformers' default (GPT-2's) expression
DEFAULT_CUT_NAMES = ("gpt-2", "gpt2", "default")
SAFETENSORS_CURE = "Look for the model as safetensors and set NOODLE_MODEL to its hub id or folder."


def convert(gguf_path: Path, folder: Path, dtype: str = "float32") -> None:
    """Write `gguf_path` as a new `folder`; raises ModelNotFound, ConfigurationError or UnsupportedModel.

    Quantized weights become `dtype`, in which float32 alone keeps their exact values. `folder` appears when it is
    whole, or not at all.
    """
    if not gguf_path.is_file():
        raise ModelNotFound(f"There is no file {gguf_path}.", cure="Name a .gguf file.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder} exists and is not empty.", cure="Name a folder that is not there yet.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work_dir = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            new_folder = work_dir / "folder"
            _write(gguf_path, new_folder, dtype)
            new_folder.replace(folder)
        finally:
            shutil.rmtree(work_dir, ignore_errors=True)
    except OSError as error:
        raise StartError(
            f"{folder} could not be written ({error.strerror or error}).", cure="Free some disk space, or name another."
        ) from error


def _write(gguf_path: Path, folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    described = _describe(gguf_path)
    _check_tokenizer(described, gguf_path)
    source: dict[str, Any] = {"gguf_file": gguf_path.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(gguf_path.parent, **source)
        check_supported(config.to_dict())
        _check_rotary(described, config.to_dict(), gguf_path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        # and not from_pretrained(gguf_file=): that asks for accelerate, to do the same
        loaded = load_gguf_checkpoint(
            str(gguf_path), return_tensors=True, model_to_load=model, torch_dtype=getattr(torch, dtype)
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, **source)
    # transformers says what it can not read by each of these, a cut file by an IndexError of numpy
    except (ValueError, KeyError, IndexError, RuntimeError, TypeError) as error:
        raise UnsupportedModel(
            f"transformers can not read {gguf_path} ({type(error).__name__}: {error}).", cure=SAFETENSORS_CURE
        ) from error
    tensors: dict[str, torch.Tensor] = loaded["tensors"]
    _check_complete(model, tensors, described, gguf_path)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True, slots=True)
class _Described:
    """What of a GGUF file decides whether transformers reads it rightly."""

    architecture: str
    tokenizer_kind: str
    tokenizer_cut: str
    rotary_scaling: str
    tensor_names: tuple[str, ...]


def _describe(gguf_path: Path) -> _Described:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf_path)

        def text(key: str, default: str) -> str:
            return str(reader.fields[key].contents()) if key in reader.fields else default

        architecture = text("general.architecture", "unnamed")
        return _Described(
            architecture=architecture,
            tokenizer_kind=text("tokenizer.ggml.model", ""),
            tokenizer_cut=text("tokenizer.ggml.pre", "default"),
            rotary_scaling=text(f"{architecture}.rope.scaling.type", "none"),
            tensor_names=tuple(tensor.name for tensor in reader.tensors),
        )
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UnsupportedModel(
            f"{gguf_path} is not a readable GGUF file ({error}).", cure="It may be cut short: fetch it again."
        ) from error


def _check_tokenizer(described: _Described, gguf_path: Path) -> None:
    """Refuse a byte-level tokenizer that transformers would cut by the default expression without a word."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    known = (*GGUF_PRE_TOKENIZER_SPLITS, *DEFAULT_CUT_NAMES)
    if described.tokenizer_kind == "gpt2" and described.tokenizer_cut not in known:
        raise UnsupportedModel(
            f"{gguf_path} ({described.architecture}) cuts text as {described.tokenizer_cut!r}, which transformers does "
            "not know: its tokens would be others than the model was trained with.",
            cure=SAFETENSORS_CURE,
        )


def _check_rotary(described: _Described, config: dict[str, Any], gguf_path: Path) -> None:
    """Refuse a rotary scaling that the file has and transformers' config lacks: it would be left out without a word."""
    read = (config.get("rope_parameters") or {}).get("rope_type", "default")
    in_tensors = any(name.startswith("rope_") for name in described.tensor_names)
    if read == "default" and (described.rotary_scaling != "none" or in_tensors):
        named = described.rotary_scaling if described.rotary_scaling != "none" else "by its rope_ tensors"
        raise UnsupportedModel(
            f"{gguf_path} ({described.architecture}) scales rotary positions ({named}), which transformers does not "
            "read from a GGUF of this architecture.",
            cure=SAFETENSORS_CURE,
        )


def _check_complete(model: Any, tensors: dict[str, Any], described: _Described, gguf_path: Path) -> None:
    """Every parameter must come from the file, but those that are another one's twin; and no tensor be left over."""
    tied = set(model.all_tied_weights_keys)
    persistent = {name for name, _ in model.named_parameters(remove_duplicate=False)} - tied
    missing = sorted(persistent - tensors.keys())
    if missing:
        raise UnsupportedModel(
            f"transformers finds no weights for {len(missing)} parameters in {gguf_path}, the first is {missing[0]}.",
            cure=SAFETENSORS_CURE,
        )
    # gate and up of the experts become one tensor
    merged = sum("ffn_up_exps" in name for name in described.tensor_names)
    unread = len(described.tensor_names) - merged - len(tensors)
    if unread > 0:
        raise UnsupportedModel(
            f"transformers leaves {unread} tensors of {gguf_path} ({described.architecture}) unread.",
            cure=SAFETENSORS_CURE,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says; exit status 1 after an error, which is said on stderr."""
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
