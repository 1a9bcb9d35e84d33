"""Renders one chat template in a process of its own; `template_renderer` starts it by this file's path.

The template comes with the model and is not trusted. It runs in jinja's sandbox, gets plain data only, and may use the
filters and functions that transformers provides. The process bounds its memory and the processor time of a render.
On the socket at file descriptor 0 a frame is its length in 4 bytes, then a request in JSON or an answer: one byte for
its kind, then text in UTF-8.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

RENDER_CPU_SECONDS = 2.0  # processor time of one render, or of compiling the template; then the kernel ends the process
MAXIMUM_MEMORY_BYTES = 512 << 20  # address space of the process; it takes 25 MB before it renders
MAXIMUM_PROMPT_CHARACTERS = 16 << 20  # of one rendered prompt
MAXIMUM_REASON_CHARACTERS = 400  # of the text with which a template refuses messages
LENGTH_BYTES = 4  # before each frame
RENDERED, REFUSED = b"+", b"-"  # kinds of answers
OUT_OF_MEMORY_STATUS = 3  # exit status
HALF_SURROGATE = re.compile("[\ud800-\udfff]")
# errors of a template's expressions, besides jinja's own, on messages that it was not written for
TEMPLATE_FAILURES = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


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


def compile_template(source: str) -> jinja2.Template:
    """Compile a template with what transformers offers to it. Raises jinja2.TemplateError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_now, dict=_make_dict, namespace=TemplateNamespace
    )
    return environment.from_string(source)


def render_within_bounds(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """Return the prompt. Raises jinja2.TemplateError if it is longer than MAXIMUM_PROMPT_CHARACTERS."""
    pieces: list[str] = []
    characters = 0
    for piece in template.generate(variables):
        characters += len(piece)
        if characters > MAXIMUM_PROMPT_CHARACTERS:
            raise jinja2.TemplateError(f"it writes more than {MAXIMUM_PROMPT_CHARACTERS} characters")
        pieces.append(piece)
    return "".join(pieces)


def answer(work: Callable[[], str]) -> bytes:
    """Do some work within RENDER_CPU_SECONDS and encode its text, or the reason of its refusal."""
    signal.setitimer(signal.ITIMER_PROF, RENDER_CPU_SECONDS)
    try:
        kind, text = RENDERED, work()
    except (jinja2.TemplateError, *TEMPLATE_FAILURES) as error:
        kind, text = REFUSED, str(error)[:MAXIMUM_REASON_CHARACTERS] or type(error).__name__
    content = HALF_SURROGATE.sub("\ufffd", text).encode()
    signal.setitimer(signal.ITIMER_PROF, 0)
    return kind + content


def serve() -> None:
    """Compile the template of the first request, then render one conversation for each other, until the peer closes."""
    with open(0, "rb", closefd=False) as requests, open(0, "wb", closefd=False) as answers:
        template: jinja2.Template | None = None

        def compile_source() -> str:
            nonlocal template
            template = compile_template(json.loads(body))
            return ""

        while len(head := requests.read(LENGTH_BYTES)) == LENGTH_BYTES:
            body = requests.read(int.from_bytes(head, "big"))
            compiled = template
            if compiled is None:
                frame = answer(compile_source)
            else:
                frame = answer(lambda: render_within_bounds(compiled, json.loads(body)))  # noqa: B023  # called at once
            answers.write(len(frame).to_bytes(LENGTH_BYTES, "big") + frame)
            answers.flush()


def main() -> int:
    """Bound this process, then serve. Exit status OUT_OF_MEMORY_STATUS if a template needs more memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the coordinator, which closes the socket
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, also inside one long operation
    for limit, value in (
        (resource.RLIMIT_AS, MAXIMUM_MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    try:
        serve()
    except MemoryError:
        return OUT_OF_MEMORY_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main())
