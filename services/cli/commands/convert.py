"""`noodle convert`: converts a .gguf file of any architecture that transformers reads, with a tool of the stage."""

from __future__ import annotations

import argparse
import subprocess

from noodle.config.environment import process_environment
from services.cli.local.processes import python_module


def convert(options: argparse.Namespace) -> int:
    dtype = ("--dtype", options.dtype) if options.dtype else ()
    arguments = python_module("services.stage.tools.convert", options.file, options.folder, *dtype)
    return subprocess.run(arguments, env=dict(process_environment()), check=False).returncode
