"""Finds the model at a path of this machine, and its name for clients."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from noodle.errors import ModelNotFound, UnsupportedModel
from noodle.model.files import missing_weight_files
from noodle.model.gguf import PART_NAME, read_gguf

log = logging.getLogger(__name__)

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
PROJECTOR_PREFIX = "mmproj"  # the files of a vision encoder, beside those of its language model
# of several files of one model in a folder, the first of these that is there is served
PREFERRED_FORMATS = ("Q4_K_M", "Q4_K_S", "Q5_K_M", "Q5_K_S", "Q6_K", "IQ4_XS", "IQ4_NL", "Q4_1", "Q4_0", "Q8_0")
FORMAT_IN_NAME = re.compile(r"[-_.](UD-)?(I?Q\d\w*|TQ\d\w*|MXFP4\w*|NVFP4\w*|BF16|F16|F32)$", re.IGNORECASE)


def served_name(path: Path) -> str:
    """The model's name for clients, also where a hub or another program named its file."""
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            match = PART_NAME.fullmatch(path.name)
            return match["stem"] if match else path.stem
        named = read_gguf(path).metadata.get("general.name")
        return named.replace(" ", "-") if isinstance(named, str) and named.strip() else path.name
    if path.parent.name == "snapshots":  # .../models--org--name/snapshots/revision
        return path.parent.parent.name.rpartition("--")[2]
    return path.name


def find_local_model(path: Path) -> Path:
    """The model at a path: a GGUF file, or of a folder its GGUF file or the folder itself.

    Every machine that has the path finds the same. Raises ModelNotFound or UnsupportedModel.
    """
    if path.is_file():
        if path.suffix == ".safetensors":
            raise UnsupportedModel(
                f"{path} is one file of a model.",
                cure="Name its folder, which holds config.json and the tokenizer too.",
            )
        return path.absolute()  # a link is kept: a split model's parts are found by their names
    folder = path.resolve()
    names = _names_in(folder)
    files = [folder / name for name in names if name.lower().endswith(".gguf")]
    if not files or any(name.endswith(".safetensors") for name in names):
        check_model_folder(folder)
        if files:
            log.warning("%s holds safetensors and %s: the safetensors are served", folder, files[0].name)
        return folder
    return _chosen_file(folder, files)


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise ModelNotFound(
            f"{folder} cannot be read ({error.strerror}).", cure="Let this user read it, or name another folder."
        ) from error


def _chosen_file(folder: Path, files: list[Path]) -> Path:
    """The file to serve of a folder with GGUF files: projectors and later parts are left out."""
    parts = {path: PART_NAME.fullmatch(path.name) for path in files}
    firsts = [path for path, match in parts.items() if match is None or match["number"] == "00001"]
    models = [path for path in firsts if not path.name.lower().startswith(PROJECTOR_PREFIX)]
    if not models:
        what = "only later parts of a split model" if not firsts else "only projectors"
        raise ModelNotFound(f"{folder} holds {what} ({files[0].name}).", cure="Put the model's own .gguf file there.")
    formats: dict[Path, str] = {}
    stems: set[str] = set()
    for path in models:
        match = FORMAT_IN_NAME.search(served_name(path))
        formats[path] = match[2].upper() if match else ""
        stems.add(served_name(path)[: match.start() if match else None].lower())
    if len(stems) > 1:
        raise UnsupportedModel(
            f"{folder} holds several models: {', '.join(path.name for path in models)}.", cure="Name one of the files."
        )
    rank = {name: place for place, name in enumerate(PREFERRED_FORMATS)}
    chosen = min(models, key=lambda path: (rank.get(formats[path], len(rank)), path.stat().st_size))
    if len(models) > 1:
        others = ", ".join(path.name for path in models if path != chosen)
        log.info("%s holds %d files of this model: %s is served, not %s", folder, len(models), chosen.name, others)
    return chosen


def check_model_folder(folder: Path) -> None:
    """Raise ModelNotFound or UnsupportedModel unless `folder` holds config.json and complete safetensors."""
    if not (folder / "config.json").is_file():
        raise ModelNotFound(
            f"{folder} holds no config.json, so it is not a model folder.",
            cure="Name the folder that holds config.json, the tokenizer and *.safetensors.",
        )
    names = _names_in(folder)
    if any(name.endswith(".safetensors") for name in names):
        if missing := missing_weight_files(folder):
            raise ModelNotFound(
                f"{folder} lacks {len(missing)} of the weight files that its index names; the first is {missing[0]}.",
                cure="Fetch the model's *.safetensors files into it again.",
            )
        return
    pickled = next((name for name in names if name.endswith(PICKLE_SUFFIXES)), None)
    if pickled is not None:
        raise UnsupportedModel(
            f"{folder} holds its weights only as pickle ({pickled}), which can run any code when it is loaded.",
            cure="Save the model again with save_pretrained(folder), which writes safetensors.",
        )
    raise ModelNotFound(
        f"{folder} holds no weights (*.safetensors).", cure="Fetch the model's *.safetensors files into it."
    )
