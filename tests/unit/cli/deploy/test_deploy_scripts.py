"""The scripts of deploy/: thin, and scripts of their language; PowerShell is parsed here and run nowhere."""

import re
import subprocess
from pathlib import Path

import pytest
import tree_sitter_powershell
from tree_sitter import Language, Parser

from services.cli.doctor.firewall import ASK_WINDOWS
from services.cli.main import command_parser
from services.cli.project import firewall as firewall_rules
from services.cli.project.firewall import Opening

FOLDER = Path(__file__).parents[4] / "deploy"
POWERSHELL_SCRIPTS = sorted(FOLDER.glob("*.ps1"))
SHELL_SCRIPTS = sorted(FOLDER.glob("*.sh"))
MOST_LINES = 40
OPENINGS = [Opening("stage-1", 8081, ("192.168.1.101",)), Opening("grafana", 3000, ())]


def errors_in(script):
    """What a parser of PowerShell does not understand."""
    tree = Parser(Language(tree_sitter_powershell.language())).parse(script.encode())
    found, nodes = [], [tree.root_node]
    while nodes:
        node = nodes.pop()
        if node.is_error or node.is_missing:
            found.append((node.start_point, node.text.decode()))
        nodes += node.children
    return found


def test_thecommand_parser_finds_what_is_broken():
    assert errors_in("if ($x) { 'a' ")
    assert not errors_in("if ($x) { 'a' }")


@pytest.mark.parametrize("path", POWERSHELL_SCRIPTS, ids=lambda path: path.name)
def test_powershell_scripts_are_short_and_parse(path):
    text = path.read_text(encoding="utf-8")
    assert errors_in(text) == []
    assert len(text.splitlines()) < MOST_LINES


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_short_and_parse(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, check=False).returncode == 0
    assert len(path.read_text(encoding="utf-8").splitlines()) < MOST_LINES


def test_what_the_command_makes_for_powershell_parses_too():
    assert len(POWERSHELL_SCRIPTS) == 3
    for script in (firewall_rules.windows_script(OPENINGS), firewall_rules.windows_undo(), ASK_WINDOWS):
        assert errors_in(script) == []


@pytest.mark.parametrize("path", [*POWERSHELL_SCRIPTS, *SHELL_SCRIPTS], ids=lambda path: path.name)
def test_scripts_use_only_options_that_the_command_has(path):
    text = path.read_text(encoding="utf-8")
    command = re.search(r"(?:noodle |@\(')(deploy|firewall)\b", text)
    if command is None:
        assert path.stem == "command"
        return
    subparsers = next(action for action in command_parser()._actions if hasattr(action, "choices") and action.choices)
    known = set(subparsers.choices[command[1]]._option_string_actions)
    assert set(re.findall(r"'(--[a-z-]+)'", text)) <= known


def test_a_shell_script_without_an_address_says_what_it_wants():
    done = subprocess.run([FOLDER / "deploy-to-remote.sh"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "IP address of machine B" in done.stderr
