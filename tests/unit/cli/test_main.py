from __future__ import annotations

import argparse
import importlib

import pytest

from noodle import __version__
from services.cli.main import COMMANDS, Command, command_parser, main


@pytest.fixture(autouse=True)
def _own_state(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOODLE_STATE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["up", "--stages", "0"],
        ["up", "--stages", "two"],
        ["generate"],
        ["generate", "x", "--temperature", "-1"],
        ["generate", "x", "--top-p", "nan"],
        ["generate", "x", "--raw", "--chat"],
        ["verify", "--prompts", "0"],
    ],
)
def test_a_wrong_option_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: noodle" in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"noodle {__version__}\n"


def test_an_error_is_one_line_and_its_cure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOODLE_STAGE", "1")
    assert main(["status"]) == 1
    assert (
        capsys.readouterr().err == "noodle: NOODLE_STAGE is not a variable of noodle.\n  Did you mean NOODLE_STAGES?\n"
    )


def test_windows_is_referred_to_docker_or_wsl(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    assert main(["up"]) == 1
    said = capsys.readouterr().err
    assert "Docker" in said
    assert "WSL" in said


def test_generate_without_a_cluster_says_how_to_start_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOODLE_COORDINATOR_URL", "http://127.0.0.1:1")
    assert main(["generate", "hello"]) == 1
    assert "noodle up" in capsys.readouterr().err


def test_ctrl_c_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_arguments: object, **_options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("services.cli.commands.generate.generate", interrupted)
    assert main(["generate", "hello"]) == 130


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_names_a_function_and_describes_itself_and_its_options(command: Command) -> None:
    module, _, function = command.runs.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert command.help
    assert command.description
    subparsers = next(each for each in command_parser()._actions if isinstance(each, argparse._SubParsersAction))
    assert all(action.help for action in subparsers.choices[command.name]._actions)
