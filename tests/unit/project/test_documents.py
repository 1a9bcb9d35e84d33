"""What the documents say is there is there: files, commands, variables, routes, links, bounds."""

import argparse
import ast
import re
from pathlib import Path

import pytest

from noodle.config.settings import VARIABLES
from noodle.model.families import FAMILIES
from services.cli.main import command_parser

ROOT = Path(__file__).parents[3]
README = ROOT / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FOREIGN_ADDRESS = re.compile(r"^(https?|mailto):")
# documents say what holds, not how it came about
HISTORY = re.compile(r"\b(AI|LLMs?|agents?|this session|issue \d+|TODO|FIXME)\b|\bas requested\b", re.IGNORECASE)


def text_of(path):
    return path.read_text(encoding="utf-8")


def tree():
    """Paths in the README's tree: indentation is depth, a folder ends with a slash, a remark follows each file."""
    block = re.search(r"^```\n(services/\n.*?)^```", text_of(README), re.DOTALL | re.MULTILINE)
    assert block, "the README has no tree that begins with services/"
    folders, paths = [], []
    for line in block[1].splitlines():
        indent, name, remark = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()
        folders = folders[: len(indent) // 2]
        if name.endswith("/"):
            folders.append(name)
        else:
            assert remark, f"the README's tree says nothing of {name}"
            paths.append("".join(folders) + name)
    return paths


def test_every_file_of_the_code_stands_once_in_the_readme_tree():
    paths = tree()
    assert len(paths) == len(set(paths))
    files = [*ROOT.glob("services/**/*.py"), *ROOT.glob("shared/noodle/**/*.py")]
    names = {path.relative_to(ROOT).as_posix() for path in files if path.name != "__init__.py"}
    assert sorted(names - set(paths)) == []


def test_nothing_stands_in_the_readme_tree_that_is_not_there():
    assert [path for path in tree() if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if not FOREIGN_ADDRESS.match(target):
            path = document.parent / target.partition("#")[0]
            assert path.exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_make_command_exists(document):
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    asked = re.findall(r"(?:`|^    )make ([a-z-]+)", text_of(document), re.MULTILINE)
    assert set(asked) <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_noodle_command_and_its_options_exist(document):
    options_of = options_by_command()
    for command, rest in re.findall(r"(?:`|^    )noodle ([a-z]+)([^`#\n]*)", text_of(document), re.MULTILINE):
        assert command in options_of, f"noodle {command}"
        unknown = set(re.findall(r"(?<!\S)(--[a-z-]+)", rest)) - options_of[command]
        assert not unknown, f"noodle {command} {unknown}"


def test_the_readme_names_every_command_and_option():
    rows = dict(re.findall(r"^\| `noodle ([a-z]+)[^|]*\|(.*)$", text_of(README), re.MULTILINE))
    for command, options in options_by_command().items():
        assert set(re.findall(r"`(--[a-z-]+)", rows[command])) == options - {"--help", "--report-to"}, command


def options_by_command():
    subparsers = next(each for each in command_parser()._actions if isinstance(each, argparse._SubParsersAction))
    return {
        name: {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
        for name, parser in subparsers.choices.items()
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_variable_that_is_mentioned_exists(document):
    mentioned = set(re.findall(r"\bNOODLE_[A-Z_]+[A-Z]", text_of(document)))
    assert mentioned <= {variable.name for variable in VARIABLES}


def test_the_readme_names_every_route_and_no_other():
    routes = set()
    for path in [*ROOT.glob("services/**/*.py"), *ROOT.glob("shared/noodle/**/*.py")]:
        for method, route in re.findall(r'@\w+\.(get|post|delete)\("(/[^"]+)"\)', text_of(path)):
            routes.add(f"{method.upper()} {re.sub(r'<.*>', '<id>', route)}")
    assert routes
    named = {re.sub(r"<.*>", "<id>", each) for each in re.findall(r"`((?:GET|POST|DELETE) /[^`]*)`", text_of(README))}
    assert named == routes


def test_the_readme_counts_the_families_right():
    assert f"{len(FAMILIES)} model families" in text_of(README)
    first, last = re.search(r"families, from (\w+) to (\w+), among them", text_of(README)).groups()
    assert (first, last) == (min(FAMILIES), max(FAMILIES))
    among = re.search(r"among them (.*?)\. The list", text_of(README), re.DOTALL)[1]
    assert set(re.findall(r"\w+", among)) - {"and"} <= set(FAMILIES)


def test_the_changelog_has_a_place_for_what_is_not_released():
    assert re.search(r"^## Unreleased$", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)


def test_every_bound_in_the_architecture_is_the_one_in_the_code():
    rows = re.findall(r"^\| `(\w+)` \| (\S.*?) \| (\S+\.py) \|", text_of(ROOT / "ARCHITECTURE.md"), re.MULTILINE)
    assert len(rows) > 20
    defaults = {variable.name: variable.default for variable in VARIABLES}
    for name, value, file in rows:
        if name in defaults:
            assert defaults[name] == value, name
        else:
            assert constants_of(ROOT / file).get(name) == value, f"{name} in {file}"


def constants_of(path):
    """The module's own constants, as they are written."""
    source = text_of(path)
    assignments = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return {
        target.id: ast.get_source_segment(source, node.value)
        for node in assignments
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def test_every_decision_has_its_number_and_a_status():
    decisions = sorted(ROOT.glob("docs/adr/*.md"))
    assert [int(path.name[:4]) for path in decisions] == list(range(1, len(decisions) + 1))
    for path in decisions:
        lines = text_of(path).splitlines()
        assert lines[0].startswith(f"# {int(path.name[:4])}. "), path.name
        assert lines[2].startswith("Status: "), path.name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documents_say_what_is_and_not_how_it_came_about(document):
    assert not (found := HISTORY.search(text_of(document))), found
