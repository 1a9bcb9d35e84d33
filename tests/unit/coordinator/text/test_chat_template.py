"""Real chat templates give the prompts that transformers gives; what one cannot render is known when it is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from noodle.errors import InvalidRequest, ModelNotFound
from services.coordinator.text.chat_template import ChatTemplate, read_chat_template
from tests.support.models.llama_cpp_source import llama_cpp_models
from tests.support.sampling import sampled

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
PATH = Path("some folder/model.gguf")
SYSTEM = {"role": "system", "content": 'Be <brief> & "kind".'}
USER, ANSWER, NEXT = (
    {"role": "user", "content": "Hello, 你好"},
    {"role": "assistant", "content": "Hi there"},
    {"role": "user", "content": "One more\n"},
)
REFUSED = {
    "CohereForAI-c4ai-command-r-plus-tool_use": "only conversations with tools",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "only conversations with tools",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "only conversations with tools",
    "fireworks-ai-llama-3-firefunction-v2": "'functions' is undefined",
    "google-gemma-2-2b-it": "System role not supported",
}
ALTERNATING = {
    "Mistral-Small-3.2-24B-Instruct-2506", "mistralai-Ministral-3-14B-Reasoning-2512",
    "mistralai-Mistral-Nemo-Instruct-2407",
}  # fmt: skip
SHARES = 10  # parts of the 70 templates


@sampled("share", range(SHARES), [0])
def test_a_real_template_gives_the_prompt_that_transformers_gives_or_is_refused_by_both(share: int) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    paths = sorted((llama_cpp_models() / "templates").glob("*.jinja"))
    assert len(paths) == 70
    for path in paths[share::SHARES]:
        source = path.read_text(encoding="utf-8")
        messages = [SYSTEM, USER, ANSWER, NEXT]
        template = ChatTemplate(source, path, SPECIAL_TOKENS)
        try:
            reference, _ = render_jinja_template(
                [messages], chat_template=source, add_generation_prompt=True, **SPECIAL_TOKENS
            )
        except Exception:  # noqa: BLE001  # any of jinja's and of Python's
            with pytest.raises(InvalidRequest, match=REFUSED[path.stem]):
                template.render(messages)
            assert any(REFUSED[path.stem] in note for note in template.notes)
        else:
            assert template.render(messages) == reference[0]
            assert path.stem not in REFUSED
            assert bool(template.notes) == (path.stem in ALTERNATING)


def test_a_template_that_refuses_only_a_system_message_answers_the_others() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role.') }}{% endif %}"
        "{{ m.content }}{% endfor %}",
        PATH,
        {},
    )
    (note,) = template.notes
    assert note == f"The chat template of {PATH} cannot render system and user messages: No system role."
    assert template.render([USER, ANSWER, NEXT]) == "Hello, 你好Hi thereOne more\n"
    with pytest.raises(InvalidRequest, match="No system role") as caught:
        template.render([SYSTEM, USER])
    assert caught.value.param == "messages"
    assert "/v1/completions" in caught.value.cure


@pytest.mark.parametrize(
    ("source", "dropped", "rendered"),
    [
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", [SYSTEM, USER], [USER]),
        ("{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}", [USER, ANSWER, NEXT], [USER]),
        ("{% for m in messages[:2] %}{{ m.content }}{% endfor %}", [SYSTEM, USER, ANSWER, NEXT], [SYSTEM, USER]),
        ("{{ bos_token }}", [USER], None),
    ],
)
def test_a_conversation_of_which_the_template_drops_a_message_is_refused(
    source: str, dropped: list[dict[str, str]], rendered: list[dict[str, str]] | None
) -> None:
    template = ChatTemplate(source, PATH, SPECIAL_TOKENS)
    assert any("it drops the text of role" in note for note in template.notes)
    with pytest.raises(InvalidRequest, match="it drops the text of role"):
        template.render(dropped)
    if rendered is not None:
        assert template.render(rendered) == "".join(message["content"] for message in rendered)


def test_a_template_that_reads_parts_gets_parts() -> None:
    source = (
        "{% for m in messages %}{% for part in m.content %}[{{ part.type }}:{{ part.text }}]{% endfor %}{% endfor %}"
    )
    template = ChatTemplate(source, PATH, {})
    assert template.notes == []
    assert template.render([SYSTEM, USER]) == '[text:Be <brief> & "kind".][text:Hello, 你好]'


def test_a_template_that_needs_tools_is_named() -> None:
    template = ChatTemplate("{{ tools[0].function.name }}{{ messages[-1].content }}{{ tools | length }}", PATH, {})
    with pytest.raises(InvalidRequest, match="only conversations with tools"):
        template.render([USER])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for %}", "not a template that jinja reads"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "of processor time"),
        ("{{ [1] * (4000000000 + messages | length) }}", "MiB of memory"),
    ],
)
def test_a_template_that_cannot_be_used_is_named_when_it_is_opened_and_not_tried_again(
    source: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = ChatTemplate(source, PATH, {})
    assert any(reason in note and str(PATH) in note for note in template.notes)
    monkeypatch.setattr(template, "_renderer", None)
    with pytest.raises(InvalidRequest, match=reason) as caught:
        template.render([SYSTEM, USER])
    assert str(PATH) in caught.value.message


def test_bytes_of_a_file_that_are_no_utf_8_do_not_stop_it() -> None:
    source = b"\xff{{ messages[-1].content }}".decode("utf-8", "surrogateescape")
    assert ChatTemplate(source, PATH, {}).render([USER]) == "\ufffdHello, 你好"


def test_a_git_lfs_pointer_in_place_of_a_template_is_said(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
    )
    with pytest.raises(ModelNotFound, match=r"chat_template\.jinja is a Git LFS pointer"):
        read_chat_template(tmp_path, {}, {})
