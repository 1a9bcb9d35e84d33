"""`noodle convert`: a .gguf of any architecture that transformers reads becomes a folder; the work is a stage's."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

from services.cli.local.cluster import python_module


def convert(file: str, folder: str, dtype: str | None, environment: Mapping[str, str]) -> int:
    """Run the converter on this terminal; gives its exit code."""
    options = ("--dtype", dtype) if dtype else ()
    arguments = python_module("services.stage.tools.convert", file, folder, *options)
    return subprocess.run(arguments, env=dict(environment), check=False).returncode
