"""What the model store reports reaches the person who started noodle."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from noodle.config.environment import command_config
from services.cli.client.progress import LineProgress
from services.cli.local.preparation import prepare_model
from services.cli.local.processes import Signals
from tests.support.models.tiny_gguf import TinyLlama, write_tiny_gguf

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are started as on Linux")


class Logged(LineProgress):
    """Keeps the lines."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)


def test_of_several_files_of_one_model_the_chosen_one_and_the_others_are_named(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "model-Q8_0.gguf", TinyLlama())
    shutil.copy(tmp_path / "model-Q8_0.gguf", tmp_path / "model-Q4_K_M.gguf")
    config = command_config({"NOODLE_CACHE_DIR": str(tmp_path / "cache")})
    logged = Logged()
    with Signals() as signals:
        prepared = prepare_model(str(tmp_path), config, dict(os.environ), signals, logged)
    assert prepared.path == tmp_path / "model-Q4_K_M.gguf"
    (line,) = [line for line in logged.lines if "is served" in line]
    assert "model-Q4_K_M.gguf is served, not model-Q8_0.gguf" in line
