"""Templates are rendered as transformers renders them, within bounds of time and memory, in processes of their own."""

from __future__ import annotations

import contextlib
import gc
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from noodle.errors import NotReady, RequestTimedOut
from services.coordinator.text import template_renderer
from services.coordinator.text.template_renderer import RenderRefused, TemplateRenderer, TemplateUnusable
from tests.support.sampling import sampled

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": 'Hi <b> & "you" it\'s {{ 7 * 7 }} 你好'}],
    [{"role": "system", "content": " short "}, {"role": "user", "content": "a\n"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": ""},
    ],
]
TEMPLATES = {
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ '<&>' | tojson }}",
    "separators": "{{ messages | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "dict": "{% set d = dict(a=1) %}{{ d.a }}{{ tools is none }}{{ documents is none }}{% for k, v in d.items() %}"
    "{{ k }}{{ v }}{% endfor %}{{ d | items | list }}",
    "time": "{{ strftime_now('%Y') }}",
    "macro": "{% macro show(m) %}[{{ m.role | upper }}: {{ m['content'] | trim }}]{% endmacro %}"
    "{% for m in messages %}{{ show(m) }}{% endfor %}{{ messages[::-1][0].content.split('\n')[0] }}",
    "generation": (
        "{% for m in messages %}\n  {% generation %}{% set x = m.content %}{{ x }}{% endgeneration %}\n{% endfor %}"
        "{{ x }}"
    ),
    "tokens": "{{ bos_token }}{{ eos_token }}[{{ pad_token }}]{% if unk_token is defined %}unk{% endif %}",
    "whitespace": "\n\n{%- for m in messages %}\n   {% if true %}\n   x {{ m.role }}\n{% endif %}\n{% endfor %}\n\n",
}


def variables(messages: list[dict[str, str]]) -> dict[str, Any]:
    base = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
    return {**SPECIAL_TOKENS, **base}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_is_rendered_as_transformers_renders_it(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    renderer = TemplateRenderer(template)
    for messages in CONVERSATIONS:
        reference, _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=True, **SPECIAL_TOKENS
        )
        assert renderer.render(variables(messages)) == reference[0]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "__class__"),
        ("{{ namespace(_hidden=1) }}", "_hidden"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_a_refusal_gives_the_templates_own_reason(template: str, message: str) -> None:
    renderer = TemplateRenderer(template)
    with pytest.raises(RenderRefused, match=message) as caught:
        renderer.render(variables(CONVERSATIONS[0]))
    assert not isinstance(caught.value, TemplateUnusable)


DOUBLED = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
HOSTILE = {
    # loops and recursion
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "deeply nested ranges": "{% for a in range(9999) %}" * 9 + "x" + "{% endfor %}" * 9,
    "a loop over a product": "{% for a in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
    "a range of 10^9": "{% for i in range(10**9) %}{% endfor %}",
    "a macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "a recursive loop": "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "a sum of ranges": "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "sorting": "{% for i in range(9999) %}{% set x = range(99999) | sort(reverse=true) %}{% endfor %}",
    # huge numbers
    "a power at run time": "{% set n = messages | length + 9 %}{{ n ** n ** n }}",
    "a long number as text": "{% set ns = namespace(x=10) %}{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}"
    "{% endfor %}{{ ns.x }}",
    # huge texts
    "a format's width": "{{ '%*d' % (4000000000 + messages | length, 1) }}",
    "the format filter": "{{ '%4000000000d' | format(1) }}",
    "str.format": "{{ '{:4000000000}'.format(1) }}",
    "str.ljust": "{{ messages[0].role.ljust(4000000000) }}",
    "str.zfill": "{{ 'x'.zfill(4000000000) }}",
    "str.expandtabs": "{{ '\t'.expandtabs(2000000000) }}",
    "the center filter": "{{ 'x' | center(4000000000) }}",
    "multiplied text": "{{ 'x' * 4000000000 }}",
    "multiplied list": "{{ [1] * 4000000000 }}",
    "doubling text": DOUBLED.replace("START", "'x'"),
    "doubling list": DOUBLED.replace("START", "[1]"),
    "doubling with ~": DOUBLED.replace("START", "'x'").replace("+", "~"),
    "replace": "{% set x = 'a' * 99999 %}{{ x.replace('a', x).replace('a', x) }}",
    "the replace filter": "{% set x = 'a' * 99999 %}{{ x | replace('a', x) | replace('a', x) }}",
    "join": "{{ range(99999) | join('x' * 99999) }}",
    "indent": "{{ ('x\n' * 99999) | indent(99999) }}",
    "words": "{{ lipsum(n=99999, max=99999) }}",
    "tojson": "{{ range(99999) | list | tojson(indent=99999) }}",
    "much output": "{% for a in range(99999) %}{% for b in range(99) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}",
    "batches": "{{ range(99999) | batch(99999999999, 'x') | list }}",
    "slices": "{{ range(99999) | slice(99999999) | list | length }}",
    "a list that holds itself": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    # the compiler, which computes constants
    "compiling a power": "{% set x = 9 ** 9 ** 9 %}{{ x }}",
    "compiling a centered text": "{{ 'x'.center(4000000000) }}",
    "compiling a width": "{{ '%4000000000d' % 1 }}",
    "compiling nested brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "compiling nested lists": "{{ " + "[" * 90000 + "]" * 90000 + " }}",
    "compiling nested ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "compiling a long sum": "{{ " + "+".join(["1"] * 99999) + " }}",
    "compiling many blocks": "{% set a = 1 %}" * 200000,
}


IN_THE_COMPILER = {name for name in HOSTILE if name.startswith("compiling ")}
ORDINARY_SAMPLE = (
    "nested ranges", "a macro without end", "a power at run time", "a format's width", "doubling list", "join",
    "compiling nested brackets",
)  # fmt: skip


@sampled("name", HOSTILE, ORDINARY_SAMPLE)
def test_a_hostile_template_is_refused_within_seconds_and_the_next_render_goes_on(name: str) -> None:
    renderer = TemplateRenderer("{% if messages[0].content == 'attack' %}" + HOSTILE[name] + "{% endif %}fine")
    start = time.monotonic()
    refusal, prompt = "", ""
    try:
        prompt = renderer.render(variables([{"role": "user", "content": "attack"}]))
    except RenderRefused as error:
        refusal = str(error)
    assert time.monotonic() - start < 30  # 2 s of processor time, on a machine that does other work
    assert len(prompt) < 1 << 20  # what ended by itself is as small as any prompt
    assert 0 < len(refusal) < 1000 or prompt.endswith("fine")
    if name not in IN_THE_COMPILER:
        assert renderer.render(variables([{"role": "user", "content": "hello"}])) == "fine"


def test_a_template_that_is_no_jinja_is_unusable() -> None:
    with pytest.raises(TemplateUnusable, match="not a template that jinja reads"):
        TemplateRenderer("{% for %}").render(variables(CONVERSATIONS[0]))


def test_half_a_surrogate_of_a_template_is_replaced() -> None:
    assert TemplateRenderer(r"{{ 'a\ud800b' }}").render(variables(CONVERSATIONS[0])) == "a\ufffdb"


def workers() -> list[psutil.Process]:
    """The processes that this test's renderers started."""
    children = psutil.Process().children()
    return [child for child in children if "template_worker.py" in " ".join(child.cmdline())]


@pytest.fixture(autouse=True)
def no_other_workers() -> None:
    gc.collect()  # renderers of earlier tests
    assert not workers()


def test_a_process_that_was_killed_while_idle_is_replaced() -> None:
    renderer = TemplateRenderer("{{ messages[0].content }}")
    for signal_number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV):
        renderer.render(variables(CONVERSATIONS[0]))
        (worker,) = workers()
        worker.send_signal(signal_number)
        assert renderer.render(variables(CONVERSATIONS[2])) == "one"
        assert worker not in workers()


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(("signal_number", "error"), [(signal.SIGKILL, NotReady), (signal.SIGSEGV, TemplateUnusable)])
def test_a_process_that_is_killed_while_it_renders_is_replaced_once(signal_number: int, error: type[Exception]) -> None:
    renderer = TemplateRenderer(ENDLESS)
    with ThreadPoolExecutor(1) as threads:
        render = threads.submit(renderer.render, variables(CONVERSATIONS[0]))
        killed = 0
        while not render.done():
            time.sleep(0.4)
            for worker in workers():
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.send_signal(signal_number)
                    killed += 1
        with pytest.raises(error, match=f"signal {signal_number}"):
            render.result()
    assert killed == 2
    assert not workers()


def test_a_process_that_is_stopped_is_given_up_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_renderer, "RENDER_SECONDS", 0.5)
    renderer = TemplateRenderer("{{ messages[0].content }}")
    renderer.render(variables(CONVERSATIONS[0]))
    (worker,) = workers()
    worker.suspend()
    for content in ("short", "x" * (4 << 20)):  # the second is more than the socket's buffer
        with pytest.raises(RequestTimedOut):
            renderer.render(variables([{"role": "user", "content": content}]))
        assert not workers()
        renderer.render(variables(CONVERSATIONS[0]))
        workers()[0].suspend()


def test_renders_wait_for_a_process_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_renderer, "PLACE_SECONDS", 0.2)
    renderer = TemplateRenderer(ENDLESS)
    with ThreadPoolExecutor(8) as threads:
        renders = [threads.submit(renderer.render, variables(CONVERSATIONS[0])) for _ in range(8)]
        errors = [render.exception() for render in renders]
    computed = sum(isinstance(error, TemplateUnusable) for error in errors)
    assert computed <= template_renderer.RENDER_PROCESSES
    assert sum(isinstance(error, NotReady) for error in errors) == 8 - computed


def test_fifty_conversations_at_once_are_each_answered_with_their_own_prompt() -> None:
    renderer = TemplateRenderer("{{ messages[0].content }}")

    def render(number: int) -> bool:
        return renderer.render(variables([{"role": "user", "content": f"text {number}"}])) == f"text {number}"

    with ThreadPoolExecutor(50) as threads:
        assert all(threads.map(render, range(500)))
    assert len(workers()) <= template_renderer.RENDER_PROCESSES


def test_a_slow_conversation_does_not_hold_up_the_others() -> None:
    renderer = TemplateRenderer("{% if messages[0].content == 'attack' %}" + ENDLESS + "{% endif %}fine")
    with ThreadPoolExecutor(1) as threads:
        attack = threads.submit(renderer.render, variables([{"role": "user", "content": "attack"}]))
        rendered = 0
        while not attack.done():
            assert renderer.render(variables(CONVERSATIONS[0])) == "fine"
            rendered += 1
        assert rendered > 20
        with pytest.raises(TemplateUnusable, match="2 s of processor time"):
            attack.result()


def test_processes_end_with_their_renderer() -> None:
    renderer = TemplateRenderer("x")
    renderer.render(variables(CONVERSATIONS[0]))
    assert workers()
    renderer.close()
    assert not workers()


def test_a_process_ends_when_the_coordinator_is_killed() -> None:
    code = (
        "from services.coordinator.text.template_renderer import TemplateRenderer\n"
        "renderer = TemplateRenderer('x')\nrenderer.render({})\nprint('ready', flush=True)\ninput()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (worker,) = psutil.Process(process.pid).children()
        process.kill()
    worker.wait(5)
