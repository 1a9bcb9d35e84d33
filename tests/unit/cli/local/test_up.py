"""What `noodle up` does when it can not keep its own books."""

import os
import sys
from pathlib import Path

import pytest

from noodle.config.environment import command_config
from noodle.errors import StartError
from services.cli.client.progress import LineProgress
from services.cli.commands.up import Up
from services.cli.local.cluster import resolve
from services.cli.local.processes import Signals
from services.cli.local.run_state import RunFolder, write_private, writing

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="`noodle up` is for Linux")


class Said(LineProgress):
    """Keeps what is said; a closed one raises, as a terminal that has gone does."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.is_closed = False

    def say(self, text: str) -> None:
        if self.is_closed:
            raise OSError("the terminal has gone")
        self.lines.append(text)


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def up(tmp_path: Path, said: Said) -> Up:
    config = command_config({})
    return Up(
        config, resolve(config, {}, None, None, None), {}, RunFolder(tmp_path), Signals(), said, is_detached=False
    )


def test_a_record_that_can_not_be_written_is_said_once_and_written_when_it_can(
    up: Up, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(os, "open", _no_space)
        up._try_to_record()
        up._try_to_record()
    assert len(said.lines) == 2
    assert f"{tmp_path / 'run.json'} can not be written (No space left on device)" in said.lines[0]
    assert "Free some space" in said.lines[1]
    up._try_to_record()
    assert (tmp_path / "run.json").exists()
    assert "can be written again" in said.lines[2]
    up._try_to_record()
    assert len(said.lines) == 3


def test_a_terminal_that_has_gone_stops_nothing(up: Up, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    said.is_closed = True
    monkeypatch.setattr(os, "open", _no_space)
    up._try_to_record()


def test_a_file_that_can_not_be_written_whole_is_not_there_and_names_path_reason_and_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret"
    monkeypatch.setattr(Path, "replace", _no_space)
    with pytest.raises(StartError, match="No space left on device") as error:
        write_private(path, b"x")
    assert str(path) in str(error.value)
    assert "NOODLE_STATE_DIR" in error.value.cure
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StartError, match="can not be written"), writing(path):
        (path / "below").mkdir()


def _no_space(*_arguments: object, **_options: object) -> None:
    raise OSError(28, "No space left on device")
