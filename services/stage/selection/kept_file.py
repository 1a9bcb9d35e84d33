"""Numbers kept in a JSON file by key, for as long as nobody deletes it; what is damaged counts as not there."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def read_kept(path: Path) -> dict[str, Any]:
    """The file's entries; none when it is not there or damaged, for they can be made again."""
    if not path.is_file():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}
    return kept if isinstance(kept, dict) else {}


def write_kept(path: Path, kept: dict[str, Any]) -> None:
    """Replace the file as a whole; raises OSError."""
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps(kept, indent=2), encoding="utf-8")
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # the first one is told
            beside.unlink(missing_ok=True)
        raise
