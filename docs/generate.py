"""Writes docs/commands.md, docs/http-api.md and docs/bounds.md from the code, and prints the map of the source.

python -m docs.generate        write the three documents
python -m docs.generate map    print every folder and file with the first line of its docstring
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.cli.main import command_parser
from services.coordinator.app import document

ROOT = Path(__file__).parents[1]
SOURCE_FOLDERS = ("services", "shared/noodle")
BOUND_NAME = re.compile(r"MAXIMUM|MINIMUM|(SECONDS|BYTES|TOKENS|ROWS|THREADS|FIELDS|CONNECTIONS)$|^(SECONDS|BYTES)_")
HEADER = "<!-- Written by `make docs` from the code. A test compares it; edit the code instead. -->\n"


def python_files() -> list[Path]:
    """Every Python file of the source, folder by folder."""
    return sorted(path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.py"))


def first_line(path: Path) -> str:
    """The first line of a file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def source_map() -> str:
    """Each folder with its purpose, then its files with theirs."""
    lines: list[str] = []
    for path in python_files():
        relative = path.relative_to(ROOT)
        if path.name == "__init__.py":
            lines.append(f"\n{relative.parent.as_posix()}/  {first_line(path)}")
        elif path.name != "__main__.py":
            lines.append(f"    {path.name:<24} {first_line(path)}")
    return "\n".join(lines).lstrip() + "\n"


def commands() -> str:
    """docs/commands.md: every command of `noodle` with its options, from argparse."""
    parser = command_parser()
    lines = [HEADER, "# Commands\n", "`noodle --version` prints the version, `noodle COMMAND --help` the text below.\n"]
    for action in _subparsers(parser)._choices_actions:
        command = _subparsers(parser).choices[action.dest]
        lines += [f"## noodle {action.dest}\n", f"{_sentence(command.description or action.help or '')}\n"]
        rows = [_option_row(each) for each in command._actions if not isinstance(each, argparse._HelpAction)]
        rows = [row for row in rows if row]
        if rows:
            lines += ["| argument | meaning |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _subparsers(parser: argparse.ArgumentParser) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    return next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction))


def _option_row(action: argparse.Action) -> str:
    if action.help == argparse.SUPPRESS:
        return ""
    name = ", ".join(action.option_strings) or (action.metavar if isinstance(action.metavar, str) else action.dest)
    if action.option_strings and action.nargs != 0:
        name += f" {action.metavar or '{' + ','.join(map(str, action.choices or ())) + '}'}"
    text = (action.help or "").replace("|", "\\|") % {"default": action.default}
    return f"| `{name}` | {text} |"


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ":")) else ".")


def http_api() -> str:
    """docs/http-api.md: every operation of the coordinator's OpenAPI document, with the fields of its bodies."""
    api = document()
    lines = [
        HEADER,
        "# HTTP API of the coordinator\n",
        "The same as an OpenAPI document: `GET /openapi.json`. Errors are OpenAI's error object, on every route.\n",
    ]
    for path, operations in api["paths"].items():
        for method, operation in operations.items():
            lines.append(f"## {method.upper()} {path}\n")
            lines.append(f"{operation['summary'].rstrip('.')}. {operation.get('description', '')}".strip() + "\n")
            lines += _body(api, operation)
    lines.append("# Routes of planner and stages\n")
    lines.append(
        "All need the cluster token, except that `/health` gives everyone the status. They also have `/metrics`.\n"
    )
    lines += ["| service | route | what it does |", "|---|---|---|", *_inner_routes("planner"), *_inner_routes("stage")]
    return "\n".join(lines) + "\n"


def _inner_routes(service: str) -> Iterator[str]:
    """Rows of the routes of a service without an OpenAPI document, from their decorators and docstrings."""
    for path in sorted((ROOT / "services" / service).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                for decorator in node.decorator_list:
                    if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Attribute) and decorator.args:
                        method, route = decorator.func.attr.upper(), decorator.args[0]
                        if method in ("GET", "POST", "DELETE") and isinstance(route, ast.Constant):
                            yield f"| {service} | `{method} {route.value}` | {ast.get_docstring(node) or ''} |"


def _body(api: dict[str, Any], operation: dict[str, Any]) -> list[str]:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if not content:
        return []
    schema = _resolved(api, content["schema"])
    fields = schema.get("properties", {})
    neutral = {name: values for name, each in fields.items() if (values := _neutral_values(each)) is not None}
    ignored = [f"`{name}`" for name, each in fields.items() if not each]
    rows = [_field_row(api, name, each, schema) for name, each in fields.items() if each and name not in neutral]
    lines = ["| field | type | meaning |", "|---|---|---|", *rows, ""] if rows else []
    if neutral:
        listed = ", ".join(f"`{name}`" + (f" ({values})" if values else "") for name, values in neutral.items())
        lines.append(f"Accepted only as null, or at the values that change nothing: {listed}.\n")
    if ignored:
        lines.append(f"Accepted with any value, because they cannot change the answer: {', '.join(ignored)}.\n")
    return lines


def _neutral_values(schema: dict[str, Any]) -> str | None:
    """The values besides null of a field that noodle knows and does not honour; None for every other field."""
    values = schema.get("enum")
    if values is None or None not in values or schema.get("description"):
        return None
    return " or ".join(f"`{json.dumps(value)}`" for value in values if value is not None)


def _resolved(api: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in schema:
        return schema
    resolved: dict[str, Any] = api["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return resolved


def _field_row(api: dict[str, Any], name: str, schema: dict[str, Any], parent: dict[str, Any]) -> str:
    meaning = schema.get("description", "")
    if name in parent.get("required", ()):
        meaning = f"Required. {meaning}".strip()
    return f"| `{name}` | {_type_name(api, schema)} | {meaning.replace('|', chr(92) + '|')} |"


def _type_name(api: dict[str, Any], schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(_resolved(api, schema).get("title", "object"))
    if "anyOf" in schema:
        names = dict.fromkeys(_type_name(api, each) for each in schema["anyOf"])
        return " or ".join(name for name in names if name != "null")
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(each)}`" for each in schema["enum"])
    kind = schema.get("type", "any")
    text = f"{kind} of {_type_name(api, schema['items'])}" if kind == "array" and schema.get("items") else str(kind)
    least, most = schema.get("minimum"), schema.get("maximum")
    if least is not None and most is not None and most < 1 << 31:
        text += f" {least} to {most}"
    return text


def bounds() -> str:
    """docs/bounds.md: constants that bound time, bytes or counts, each with the remark behind it in the code."""
    lines = [
        HEADER,
        "# Bounds\n",
        "Every wait has a limit and every buffer a size. They are constants beside the code that they bound; variables",
        "are in [.env.example](../.env.example).\n",
    ]
    folder = None
    for path in python_files():
        rows = [f"| `{name}` | {value} | {remark} |" for name, value, remark in bounds_in(path)]
        if rows:
            if path.parent != folder:
                folder = path.parent
                title = folder.relative_to(ROOT).as_posix()
                lines += [
                    *([""] if lines[-1].startswith("|") else []),
                    f"## {title}\n",
                    "| bound | value | limits |",
                    "|---|---|---|",
                ]
            lines += [row.replace("` |", f"` ({path.name}) |", 1) for row in rows]
    return "\n".join(lines) + "\n"


def bounds_in(path: Path) -> Iterator[tuple[str, str, str]]:
    """Name, value as written, and remark of each bound of a file; constants without a remark are not listed."""
    source = path.read_text(encoding="utf-8")
    rows = source.splitlines()
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        name, value = node.targets[0].id, ast.get_source_segment(source, node.value) or ""
        remark = rows[node.lineno - 1].partition("  # ")[2]
        if name.isupper() and BOUND_NAME.search(name) and remark and re.fullmatch(r"[\d_.\s<*+()-]+", value):
            yield name, value, remark.replace("|", "\\|")


DOCUMENTS = {"commands.md": commands, "http-api.md": http_api, "bounds.md": bounds}


def main(arguments: list[str]) -> None:
    """Write the documents, or print the map."""
    if arguments == ["map"]:
        print(source_map(), end="")
        return
    for name, make in DOCUMENTS.items():
        (ROOT / "docs" / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
