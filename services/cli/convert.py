"""`noodle convert`: a .gguf of any architecture that transformers reads becomes a folder; the work is a stage's."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

from services.cli.cluster import python_module


def convert(file: str, folder: str, environment: Mapping[str, str]) -> int:
    """Run the converter on this terminal; gives its exit code."""
    return subprocess.run(
        python_module("services.stage.convert", file, folder), env=dict(environment), check=False
    ).returncode
