"""Finds the model at a path of this machine, and its name for clients."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from noodle.errors import ModelNotFound, UnsupportedModel
from noodle.model.files import missing_weight_files, names_a_path
from noodle.model.gguf import PART_NAME, read_gguf

log = logging.getLogger(__name__)

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# of files that lie beside a model's: its vision encoder, and what its blocks were chosen by
NO_MODEL_PREFIXES = ("mmproj", "imatrix")
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


def local_model(model: str, whose: str) -> Path | None:
    """The model that NOODLE_MODEL names on this machine; None if it comes from the coordinator.

    Raises ModelNotFound for a path where nothing is; `whose` stands in its message: "The planner".
    """
    if model and Path(model).exists():
        return find_local_model(Path(model))
    if names_a_path(model):
        raise ModelNotFound(
            f"{whose} finds no model {model!r}.",
            cure="Correct NOODLE_MODEL, or unset it: then the model comes from NOODLE_COORDINATOR_URL.",
        )
    return None


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


def format_rank(stem: str) -> int:
    """The place of a file's format among PREFERRED_FORMATS, after all of them for any other.

    UD- before it means another choice of types under the same name.
    """
    match = FORMAT_IN_NAME.search(stem)
    name = match[2].upper() if match and not match[1] else ""
    return PREFERRED_FORMATS.index(name) if name in PREFERRED_FORMATS else len(PREFERRED_FORMATS)


def _chosen_file(folder: Path, files: list[Path]) -> Path:
    """The file to serve of a folder with GGUF files: projectors and later parts are left out."""
    parts = {path: PART_NAME.fullmatch(path.name) for path in files}
    firsts = [path for path, match in parts.items() if match is None or match["number"] == "00001"]
    models = [path for path in firsts if not path.name.lower().startswith(NO_MODEL_PREFIXES)]
    if not models:
        what = "only later parts of a split model" if not firsts else "only projectors or importance matrices"
        raise ModelNotFound(f"{folder} holds {what} ({files[0].name}).", cure="Put the model's own .gguf file there.")
    if len({FORMAT_IN_NAME.sub("", served_name(path)).lower() for path in models}) > 1:
        raise UnsupportedModel(
            f"{folder} holds several models: {', '.join(path.name for path in models)}.", cure="Name one of the files."
        )
    chosen = min(models, key=lambda path: (format_rank(served_name(path)), path.stat().st_size))
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
