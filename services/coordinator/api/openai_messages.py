"""The conversation of a chat request, checked and made what chat templates read; knows no HTTP and no template."""

from __future__ import annotations

from typing import Any

from noodle.errors import InvalidRequest
from services.coordinator.api.request_body import JsonObject, refuse_what_is_not_honoured, shown, wrong_type
from services.coordinator.engine.request import Request, refuse_what_cannot_fit

ROLES = ("system", "developer", "user", "assistant")
MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "reasoning_content": (),
}


def refuse_more_messages_than_tokens(messages: Any, request: Request, context_length: int) -> None:
    """Raise for a conversation that can not fit by its mere number of pieces: reading and rendering takes seconds."""
    if not isinstance(messages, list) or not messages:
        return
    refuse_what_cannot_fit(request, least_tokens=len(messages), context_length=context_length, prompt_name="messages")
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = sum(len(content) for content in contents if isinstance(content, list))
    if parts > context_length:
        raise InvalidRequest(
            f"The messages have {parts} text parts; as many are taken as the context has tokens, {context_length}.",
            cure="Join their texts.",
            param="messages",
        )


def read_messages(fields: JsonObject) -> tuple[dict[str, str], ...]:
    """The conversation as chat templates read it: role and content, and a name where one is given.

    A list of text parts becomes one text, a line each. `developer` is OpenAI's newer word for `system`, and
    templates know only that one.
    """
    messages = fields.get("messages")
    if not isinstance(messages, list):
        wrong_type("messages", "an array of messages", messages)
    if not messages:
        raise InvalidRequest("'messages' is empty.", cure="Give at least one message.", param="messages")
    return tuple(_read_message(message, f"messages[{index}]") for index, message in enumerate(messages))


def _read_message(message: Any, path: str) -> dict[str, str]:
    if not isinstance(message, dict):
        wrong_type(path, "an object", message)
    role = message.get("role")
    if role not in ROLES:
        reason = "Tools are not supported here" if role in ("tool", "function") else f"It is {shown(role)}"
        raise InvalidRequest(
            f"Invalid value for '{path}.role': {reason}.", cure=f"Use {', '.join(ROLES)}.", param=f"{path}.role"
        )
    refuse_what_is_not_honoured(message, {"role", "content", "name"}, MESSAGE_NEUTRAL, where=f"{path}.")
    checked = {
        "role": "system" if role == "developer" else role,
        "content": _read_content(message.get("content"), f"{path}.content"),
    }
    name = message.get("name")
    if name is not None:
        if not isinstance(name, str):
            wrong_type(f"{path}.name", "a string", name)
        checked["name"] = name
    return checked


def _read_content(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        wrong_type(path, "a string or an array of text parts", content)
    texts = []
    for index, part in enumerate(content):
        part_path = f"{path}[{index}]"
        if not isinstance(part, dict):
            wrong_type(part_path, "an object", part)
        if part.get("type") != "text":
            raise InvalidRequest(
                f"Invalid value for '{part_path}.type': {shown(part.get('type'))} content is not supported here.",
                cure='Send {"type": "text", "text": ...}.',
                param=f"{part_path}.type",
            )
        refuse_what_is_not_honoured(part, {"type", "text"}, {}, where=f"{part_path}.")
        if not isinstance(part.get("text"), str):
            wrong_type(f"{part_path}.text", "a string", part.get("text"))
        texts.append(part["text"])
    return "\n".join(texts)
