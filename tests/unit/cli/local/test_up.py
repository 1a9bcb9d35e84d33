"""What `noodle up` does when it cannot write its record."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from noodle.config.environment import command_config
from noodle.errors import StartError
from services.cli.client.health import Health
from services.cli.client.progress import LineProgress
from services.cli.commands.up import Up
from services.cli.local.cluster import resolve
from services.cli.local.processes import Signals
from services.cli.local.run_folder import RunFolder, write_private, writing

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="`noodle up` is for Linux")


class Logged(LineProgress):
    """Keeps the lines; a closed one raises, as a closed terminal does."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.is_closed = False

    def log(self, text: str) -> None:
        if self.is_closed:
            raise OSError("the terminal has gone")
        self.lines.append(text)


@pytest.fixture
def logged() -> Logged:
    return Logged()


@pytest.fixture
def up(tmp_path: Path, logged: Logged) -> Up:
    return Up(
        spec=resolve(command_config({}), {}, None, None, None),
        environment={},
        folder=RunFolder(tmp_path),
        signals=Signals(),
        progress=logged,
        is_detached=False,
    )


def test_a_record_that_cannot_be_written_is_reported_once_and_written_later(
    up: Up, logged: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(os, "open", _no_space)
        up._try_to_record()
        up._try_to_record()
    assert len(logged.lines) == 2
    assert str(tmp_path / "run.json") in logged.lines[0]
    assert "written (No space left on device)" in logged.lines[0]
    assert "Free some space" in logged.lines[1]
    up._try_to_record()
    assert (tmp_path / "run.json").exists()
    assert "can be written again" in logged.lines[2]
    up._try_to_record()
    assert len(logged.lines) == 3


def test_a_terminal_that_has_gone_stops_nothing(up: Up, logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    logged.is_closed = True
    monkeypatch.setattr(os, "open", _no_space)
    up._try_to_record()


def test_a_file_that_cannot_be_written_whole_is_not_there_and_names_path_reason_and_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret"
    monkeypatch.setattr(Path, "replace", _no_space)
    with pytest.raises(StartError, match="No space left on device") as error:
        write_private(path, b"x")
    assert str(path) in str(error.value)
    assert "NOODLE_STATE_DIR" in error.value.cure
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StartError, match="be written"), writing(path):
        (path / "below").mkdir()


def _no_space(*_arguments: object, **_options: object) -> None:
    raise OSError(28, "No space left on device")


def test_the_example_of_a_model_with_a_chat_template_is_a_chat_with_readable_letters(up: Up) -> None:
    lines = up._welcome(Health("ready", answer={"model": "Müllers Modell", "has_chat_template": True}))
    (curl,) = [line for line in lines if "curl" in line]
    assert "/v1/chat/completions" in curl
    assert "Müllers Modell" in curl
    assert json.loads(shlex.split(curl)[-1])["messages"][0]["role"] == "user"
    assert not any("--raw" in line for line in lines)


def test_the_examples_of_a_model_without_a_chat_template_continue_a_prompt(up: Up) -> None:
    lines = up._welcome(Health("ready", answer={"model": "o'base", "has_chat_template": False}))
    (curl,) = [line for line in lines if "curl" in line]
    assert "/v1/completions" in curl
    body = json.loads(shlex.split(curl)[-1])
    assert body == {"model": "o'base", "prompt": "The sky is blue because", "max_tokens": 60}
    assert any("noodle generate --raw" in line for line in lines)
