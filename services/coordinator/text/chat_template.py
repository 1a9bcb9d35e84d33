"""A model's chat template (jinja), rendered as transformers renders it, and tried when the model is opened.

The template comes with the model and is not trusted: it is rendered in a process of its own (`template_renderer`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noodle.errors import InvalidRequest, ModelNotFound, NoodleError
from noodle.model.gguf import LFS_CURE, LFS_MAGIC
from services.coordinator.text.template_renderer import RenderRefused, TemplateRenderer, TemplateUnusable

DEFAULT_TEMPLATE = "default"
COMPLETIONS_CURE = "Send the whole prompt to /v1/completions."
# what is tried: conversations that every template is expected to render, by their roles
TRIED = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
)
UNEVEN = ("user", "user")
ANY_TOOL = {
    "type": "function",
    "function": {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
}

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why conversations that have all of these roles get no answer."""

    roles: frozenset[str]
    reason: str


class MessageDropped(RenderRefused):
    """The prompt lacks a message."""


class ChatTemplate:
    """One template; threads may share it.

    `notes` is what trying it showed that a user should know, a sentence each.
    """

    def __init__(self, source: str, path: Path, special_tokens: Mapping[str, str]) -> None:
        """Start a process for the template of the file `path`, and try it; what it cannot render is refused later."""
        self._path = path
        self._special_tokens = dict(special_tokens)
        self._renderer = TemplateRenderer(source.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        self._has_parts = False  # content is a list of parts, each with its type
        self._refusals: list[Refusal] = []
        self.notes: list[str] = []
        self._try()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Return the prompt of a conversation. Raises InvalidRequest if the template does not render it."""
        roles = {message["role"] for message in messages}
        for refusal in self._refusals:
            if refusal.roles <= roles:
                raise self._refused(refusal.reason)
        try:
            return self._render(messages, add_generation_prompt)
        except TemplateUnusable as error:
            raise self._refused(str(error)) from error
        except RenderRefused as error:
            raise self._refused(f"it refuses these messages: {error}") from error

    def _refused(self, reason: str) -> InvalidRequest:
        return InvalidRequest(
            f"The chat template of {self._path} cannot render this conversation: {reason}.",
            cure=f"Send messages that it accepts. Or: {COMPLETIONS_CURE}",
            param="messages",
        )

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Any] = ()) -> str:
        return self._renderer.render(
            {
                **self._special_tokens,
                "messages": [self._as_it_reads(message) for message in messages],
                "tools": list(tools) or None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
        )

    def _as_it_reads(self, message: Message) -> dict[str, Any]:
        content = message["content"]
        return {**message, "content": [{"type": "text", "text": content}] if self._has_parts else content}

    def _try(self) -> None:
        """Render a few conversations; note what fails, and refuse what would silently lose a message."""
        failed: list[frozenset[str]] = []
        try:
            for roles in TRIED:
                if any(others <= set(roles) for others in failed):
                    continue
                try:
                    self._require_all(roles)
                except RenderRefused as error:
                    if roles == ("user",) and not isinstance(error, TemplateUnusable):
                        if self._reads_parts():
                            continue
                        error = self._needs_tools(error)
                    failed.append(frozenset(roles))
                    self._note(roles, error)
            if not failed:
                self._require_all(UNEVEN)
        except RenderRefused as error:
            self.notes.append(f"The chat template of {self._path} takes no two messages of one role in a row: {error}.")
        except NoodleError as error:  # this machine is too busy, which is no fault of the template
            self.notes.append(f"The chat template of {self._path} was not tried. {error}")

    def _require_all(self, roles: Sequence[str], tools: Sequence[Any] = ()) -> None:
        """Raises RenderRefused if a conversation of these roles is refused, or MessageDropped."""
        messages = [{"role": role, "content": f"noodle{number}q {role}"} for number, role in enumerate(roles)]
        prompt = self._render(messages, True, tools)
        dropped = {message["role"] for message in messages if message["content"] not in prompt}
        if dropped:
            raise MessageDropped(f"it drops the text of role {' and '.join(sorted(dropped))}")

    def _reads_parts(self) -> bool:
        """Whether it renders messages whose content is a list of parts; then all are sent so."""
        self._has_parts = True
        try:
            self._require_all(("user",))
        except RenderRefused:
            self._has_parts = False
        return self._has_parts

    def _needs_tools(self, error: RenderRefused) -> RenderRefused:
        """Return the error, or that the template lacks only tools."""
        with contextlib.suppress(RenderRefused):
            self._require_all(("user",), [ANY_TOOL])
            return MessageDropped("it renders only conversations with tools")
        return error

    def _note(self, roles: Sequence[str], error: RenderRefused) -> None:
        self.notes.append(f"The chat template of {self._path} cannot render {' and '.join(roles)} messages: {error}.")
        if isinstance(error, MessageDropped | TemplateUnusable):  # others are refused by the template itself
            self._refusals.append(Refusal(frozenset(roles), str(error)))


def read_chat_template(
    folder: Path, settings: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """Read chat_template.jinja, or else the template in tokenizer_config.json, which may be a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelNotFound(f"{path} cannot be read: {error}.", cure="Download the model again.") from error
        if template.startswith(LFS_MAGIC.decode()):
            raise ModelNotFound(f"{path} is a Git LFS pointer, not the file itself.", cure=LFS_CURE)
        return ChatTemplate(template, path, special_tokens)
    source = settings.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get(DEFAULT_TEMPLATE)
    if not isinstance(source, str) or not source:
        return None
    return ChatTemplate(source, folder / "tokenizer_config.json", special_tokens)
