"""A model's chat template (jinja), rendered as transformers renders it.

The template comes with the model and is not trusted: it runs in jinja's sandbox, gets plain texts only, and may use the
filters and functions that transformers provides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from noodle.errors import InvalidRequest, ModelNotFound

DEFAULT_TEMPLATE = "default"
# errors of a template's expressions, besides jinja's own, on messages that it was not written for
TEMPLATE_FAILURES = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


class ChatTemplate:
    """One compiled template; threads may share it."""

    def __init__(self, source: str) -> None:
        """Raises ModelNotFound for a source that is not jinja."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(
            raise_exception=_raise_exception, strftime_now=_now, dict=_make_dict, namespace=TemplateNamespace
        )
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelNotFound(
                f"The model's chat template cannot be read: {error}.", cure="Correct chat_template in its folder."
            ) from error

    def render(
        self, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str], add_generation_prompt: bool
    ) -> str:
        """Return the prompt of a conversation. Raises InvalidRequest if the template refuses or cannot read it."""
        try:
            return self._template.render(
                **special_tokens,
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, *TEMPLATE_FAILURES) as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}",
                cure="Send messages that it accepts, or the whole prompt to /v1/completions.",
                param="messages",
            ) from error


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's text for training; here it passes its content through."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class TemplateNamespace(jinja2.utils.Namespace):
    """Jinja's `namespace` without names that begin with an underscore, as those lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works, as in jinja
        self, *values = args
        attributes: dict[str, Any] = dict(*values, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace takes no name like {name!r}")


def read_chat_template(folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    """Read chat_template.jinja, or else the template in tokenizer_config.json, which may be a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ModelNotFound(f"{path} cannot be read: {error}.", cure="Download the model again.") from error
    source = settings.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get(DEFAULT_TEMPLATE)
    return ChatTemplate(source) if isinstance(source, str) and source else None


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Encode without jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
