"""Documents are true: files, commands, variables, routes, links and the pages that are written from the code."""

import argparse
import re
from pathlib import Path

import pytest

from docs.generate import DOCUMENTS as DOCUMENTS_FROM_CODE
from noodle import __version__
from noodle.config.settings import VARIABLES
from noodle.model.families import FAMILIES
from noodle.model.local import PREFERRED_FORMATS
from services.cli.main import command_parser

ROOT = Path(__file__).parents[3]
README = ROOT / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FOREIGN_ADDRESS = re.compile(r"^(https?|mailto):")
# documents say what holds, not how it came about
HISTORY = re.compile(r"\b(AI|LLMs?|agents?|this session|issue \d+|TODO|FIXME)\b|\bas requested\b", re.IGNORECASE)


def text_of(path):
    return path.read_text(encoding="utf-8")


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


def options_by_command():
    subparsers = next(each for each in command_parser()._actions if isinstance(each, argparse._SubParsersAction))
    return {
        name: {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
        for name, parser in subparsers.choices.items()
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_variable_that_is_mentioned_exists(document):
    if document.name in ("CHANGELOG.md", "measurements.md", "0027-the-core-stays-awake.md"):
        return  # they also name what is gone
    mentioned = set(re.findall(r"\bNOODLE_[A-Z_]+[A-Z]", text_of(document)))
    assert mentioned <= {variable.name for variable in VARIABLES}


@pytest.mark.parametrize("name", sorted(DOCUMENTS_FROM_CODE))
def test_a_document_that_is_written_from_the_code_is_up_to_date(name):
    assert text_of(ROOT / "docs" / name) == DOCUMENTS_FROM_CODE[name](), "run `make docs`"


def test_every_route_is_in_the_document_of_the_api_or_of_another_service():
    documented = set(re.findall(r"^## ([A-Z]+ /\S*)$", text_of(ROOT / "docs" / "http-api.md"), re.MULTILINE))
    for path in ROOT.glob("services/coordinator/**/*.py"):
        for method, route in re.findall(r'@\w+\.(get|post|delete)\("(/[^"]+)"\)', text_of(path)):
            template = re.sub(r"<(?:[a-z]+:)?([a-z_]+)>", r"{\1}", route)
            named = f"{method.upper()} {template}"
            assert named in documented, f"{path}: {named}"


def test_every_file_and_folder_that_documents_name_exists():
    for document in (README, ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md"):
        for named in re.findall(r"`((?:services|shared|tests|docs|deploy|grafana)/[\w/.-]+)`", text_of(document)):
            assert (ROOT / named).exists(), f"{document.name} names {named}"
        for named in re.findall(r"`((?:coordinator|planner|stage|cli|noodle)/[\w/.-]+)`", text_of(document)):
            folder = "shared" if named.startswith("noodle/") else "services"
            assert (ROOT / folder / named).exists(), f"{document.name} names {named}"


def test_the_folders_of_the_readme_tree_are_the_folders_of_the_source():
    block = re.search(r"^```\n(services/\n.*?)^```", text_of(README), re.DOTALL | re.MULTILINE)
    assert block, "the README has no tree that begins with services/"
    for name in ("coordinator", "stage", "planner", "cli"):
        assert re.search(rf"^  {name}/ ", block[1], re.MULTILINE), name
    for folder in [*ROOT.glob("services/coordinator/*/"), *ROOT.glob("services/stage/*/")]:
        if folder.name != "__pycache__":
            assert f"    {folder.name}/ " in block[1], folder


@pytest.mark.parametrize("document", [README, ROOT / "docs" / "operating.md"], ids=lambda path: path.name)
def test_the_families_are_counted_right_and_those_that_are_named_exist(document):
    count, named = re.search(r"(\d+) model families\W+among them ([\w, \n]+)", text_of(document)).groups()
    assert int(count) == len(FAMILIES)
    named = re.split(r"\n*from |\.", named)[0]
    aliases = {"gemma3": "gemma3_text"}
    assert {aliases.get(name, name) for name in re.findall(r"\w+", named)} - {"and"} <= set(FAMILIES)


def test_the_readme_fits_on_a_few_screens():
    assert len(text_of(README).splitlines()) <= 135


def test_the_guide_names_the_formats_of_a_folder_in_the_order_in_which_they_are_taken() -> None:
    words = " ".join(text_of(ROOT / "docs" / "operating.md").split())
    assert f"is taken: {', '.join(PREFERRED_FORMATS)};" in words


def test_the_changelog_knows_this_version_and_has_a_place_for_the_next():
    versions = re.findall(r"^## (.*)$", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert versions[1].split(" - ")[0] == __version__
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", each) for each in versions[1:])


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
