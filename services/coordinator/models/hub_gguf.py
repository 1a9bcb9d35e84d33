"""Which GGUF files of a hub's repository are meant by `org/name:Q4_K_M` or `org/name:file.gguf`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import PurePosixPath

from noodle.errors import ModelNotFound, UnsupportedModel
from noodle.model.gguf import PART_NAME
from noodle.model.local import NO_MODEL_PREFIXES, format_rank

SHOWN_NAMES = 30  # of a repository's files in an error
DYNAMIC_PREFIX = "UD-"  # of a format's name: another choice of types under the same name


def choose_gguf(names: Iterable[str], wanted: str, model: str) -> tuple[str, ...]:
    """Return the file of a repository, or all parts of a split one in order.

    `wanted`: a format's name in any case, a file's name or path, or empty for the format that is preferred in a folder
    too. Raises ModelNotFound or UnsupportedModel, which list what there is.
    """
    files = sorted(name for name in names if name.lower().endswith(".gguf"))
    models = {_first_part(name) for name in files if not _base(name).lower().startswith(NO_MODEL_PREFIXES)}
    if not models:
        raise ModelNotFound(f"{model}: the hub has no GGUF file of a language model there.", cure="Name another one.")
    if wanted.lower().endswith(".gguf"):
        chosen = {_first_part(name) for name in files if wanted.lower() in (name.lower(), _base(name).lower())}
    else:
        chosen = _of_format(models, wanted) if wanted else _preferred(models)
    if not chosen:
        raise ModelNotFound(f"{model}: the hub has no such file, but {_shown(models)}.", cure="Name one of these.")
    if len(chosen) > 1:
        repository = model.removesuffix(f":{wanted}")
        raise UnsupportedModel(
            f"{model} may be any of these files on the hub: {_shown(chosen)}.",
            cure=f"Name one of them: {repository}:{min(chosen)}",
        )
    parts = _parts(chosen.pop())
    if missing := [part for part in parts if part not in files]:
        raise ModelNotFound(
            f"{model} is split into {len(parts)} files, of which the hub lacks {missing[0]}.",
            cure="Name another format or repository.",
        )
    return parts


def _base(name: str) -> str:
    return PurePosixPath(name).name


def _split_name(name: str) -> re.Match[str] | None:
    match = PART_NAME.fullmatch(name)
    return match if match is not None and int(match["number"]) <= int(match["count"]) else None


def _first_part(name: str) -> str:
    match = _split_name(name)
    return name if match is None else f"{match['stem']}-00001-of-{match['count']}.gguf"


def _parts(first: str) -> tuple[str, ...]:
    match = _split_name(first)
    if match is None:
        return (first,)
    return tuple(f"{match['stem']}-{part:05}-of-{match['count']}.gguf" for part in range(1, int(match["count"]) + 1))


def _stem(name: str) -> str:
    match = _split_name(name)
    return match["stem"] if match else name[: -len(".gguf")]


def _of_format(models: Collection[str], wanted: str) -> set[str]:
    """Files whose name, or whose folder's name, holds the format between separators: Q4_K does not mean Q4_K_M."""
    pattern = re.compile(rf"(?:^|[-_./]){re.escape(wanted)}(?=$|[-./])", re.IGNORECASE)
    found = {name for name in models if pattern.search(_stem(name))}
    plain = {name for name in found if f"{DYNAMIC_PREFIX}{wanted}".upper() not in name.upper()}
    return plain if len(found) > 1 and plain else found


def _preferred(models: Collection[str]) -> set[str]:
    """The files of the most preferred format that there is."""
    rank_of = {name: format_rank(_stem(name)) for name in models}
    return {name for name, rank in rank_of.items() if rank == min(rank_of.values())}


def _shown(names: Collection[str]) -> str:
    listed = ", ".join(sorted(names)[:SHOWN_NAMES])
    return listed if len(names) <= SHOWN_NAMES else f"{listed} and {len(names) - SHOWN_NAMES} more"
