"""Converts the messages of a row to the form that chat templates expect: roles, parts, reasoning, tool calls, masks.

Each key of a message is read, or added to `unread`, or raises `LabelError`.
"""

from __future__ import annotations

from typing import Any

from finetune.data.json_rows import Row, decode_json
from finetune.data.turns import ROLES, Message
from finetune.system.errors import LabelError

# Other names of the four roles. Messages of some of these roles hold only a tool call.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
_CALLS = ("function_call", "tool_call")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# Keys that choose a message or leave it out, by true or false and by 1 or 0.
_FLAGS = ("train", "training", "loss", "masked")
_WEIGHTS = ("loss_weight", "weight", "loss_scale")
_FIRST = ("train", "training", "loss_weight", "weight")
# Masks of parts of a text, or without an agreed meaning. They are refused: ignored, they might change the labels.
_OTHER_MASKS = ("train_detail", "training_detail", "mask", "loss_mask", "trainable", "train_on_turn")
_KEYS = {
    *("role", "from", "content", "value", "name", "tool_call_id", "tool_calls", "function_call", "tool_plan"),
    *(*_REASONING_KEYS, *_FLAGS, *_WEIGHTS, *_OTHER_MASKS),
}
_PLAIN = {"role", "content"}
_ARGUMENTS = ("arguments", "parameters", "input", "args")

_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("reasoning", "thinking")
_CALL_PARTS = ("tool_call", "tool_use", "function_call")
_RESULT_PARTS = ("tool_result", "tool_response", "function_call_output")
_PARTS = (*_TEXT_PARTS, *_REASONING_PARTS, *_CALL_PARTS, *_RESULT_PARTS)


def holds(value: object) -> bool:
    """False for null and for an empty text, list or map; true for 0 and false."""
    return value is not None and value not in ("", [], {})


def one_of(source: Row, keys: tuple[str, ...], whose: str) -> Any:
    """The value that a map holds under one of several keys; None if it has none of them.

    Raises:
        LabelError: Two of the keys have values that differ.
    """
    values = {key: source[key] for key in keys if source.get(key) is not None}
    if len(values) > 1 and any(holds(value) for value in values.values()):
        values = {key: value for key, value in values.items() if holds(value)}
    value, *others = [*values.values()] or [None]
    if any(other != value for other in others):
        raise LabelError(f"{whose} {' and '.join(values)} differ", "keep one")
    return value


def decoded(value: object) -> Any:
    """The value of a JSON string; any other value unchanged.

    Raises:
        LabelError: An object in the string has a key twice.
    """
    if not isinstance(value, str):
        return value
    try:
        return decode_json(value)
    except LabelError:
        raise
    except (ValueError, RecursionError):
        return value


def check_json(value: object, whose: str) -> None:
    """Checks that a value, which a chat template may print as JSON, holds only JSON's types and no date, for example.

    Raises:
        LabelError: It holds another value.
    """
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        for inner in value.values():
            check_json(inner, whose)
    elif isinstance(value, list):
        for inner in value:
            check_json(inner, whose)
    elif value is not None and not isinstance(value, str | int | float):
        raise LabelError(f"{whose} hold a {type(value).__name__}, which JSON does not have", "write it as text")


def read_messages(turns: object, unread: set[str]) -> list[Message]:
    """The messages of a list of maps with `role` and `content`, or with `from` and `value`.

    Args:
        turns: The list.
        unread: A set to which keys with a value that no code reads are added.

    Raises:
        LabelError: They are not a list of maps, or one of them cannot be read.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise LabelError("its messages are not a list of maps")
    messages: list[Message] = []
    for turn in turns:
        if turn.keys() <= _PLAIN and isinstance(turn.get("content"), str) and turn.get("role") in ROLES:
            messages.append(dict(turn))
        else:
            messages += _read(turn, unread)
    return messages


def _read(turn: Row, unread: set[str]) -> list[Message]:
    """The message as one, or as several if its parts hold results of tools."""
    own, role = _role_of(turn, unread)
    content: Any = turn.get("content")
    if content is None or not isinstance(turn.get("value"), str | None):
        unread |= {"messages.value"} if content is not None else set()
        content = turn.get("value") if content is None else content
    else:
        content = one_of(turn, ("content", "value"), "a message's")
    unread |= {f"messages.{key}" for key in turn.keys() - _KEYS if holds(turn[key])}
    extra = _reasoning(turn)
    calls = _calls_of(turn, unread)
    if own in _CALLS:
        keys = _ARGUMENTS if own == "tool_call" else ("arguments",)
        if called := _calls_in(decoded(content), keys, unread):
            calls, content = _same(calls, called, "tool_calls and its text"), ""
        elif own == "tool_call" and not calls:
            raise LabelError("a tool_call message holds no call", 'write {"name": ..., "arguments": {...}}')
    results: list[Message] = []
    if _is_parts(content, role):
        parts = [content] if isinstance(content, dict) else content
        results, content, thought, called = _read_parts(parts, role, unread)
        extra = _same(extra, {"reasoning_content": thought} if thought else {}, "reasoning and its parts")
        calls = _same(calls, called, "tool_calls and its parts")
    elif role == "tool" and isinstance(content, dict | list):
        check_json(content, "a tool's answers")
    if holds(turn.get("tool_plan")):
        extra["tool_plan"] = turn["tool_plan"]
    if calls:
        extra["tool_calls"] = calls
        content = "" if content is None else content
    if extra and role in ROLES and role != "assistant":
        raise LabelError(f"{next(iter(extra))} on a {role} message", "only an assistant's has it")
    extra |= {key: turn[key] for key in ("tool_call_id", "name") if holds(turn.get(key))}
    for key, value in extra.items():
        if key != "tool_calls" and not isinstance(value, str):
            raise LabelError(f"a message's {key} is {type(value).__name__}, not text")
    if (train := _train(turn, role, unread)) is not None:
        extra["train"] = train
    if not results:
        return [{"role": role, "content": content, **extra}]
    if role == "tool" and len(results) == 1 and content is None:
        if any(results[0].get(key, value) != value for key, value in extra.items()):
            raise LabelError("a tool message and its part differ", "keep one tool_call_id and name")
        return [results[0] | extra]
    if extra.keys() - {"train"}:
        raise LabelError("a message of tool results has more keys", "write a tool message for each result")
    texts = [] if content is None else [{"role": role, "content": content}]
    return [message | extra for message in (*results, *texts)]


def _role_of(turn: Row, unread: set[str]) -> tuple[object, object]:
    """A message's role as the row writes it, and the role of chat templates that it stands for."""
    roles = [turn[key] for key in ("role", "from") if turn.get(key) is not None]
    known = [_ROLES.get(role, role) if isinstance(role, str) else role for role in roles]
    if len(known) == 2 and known[0] != known[1]:
        if known[1] in ROLES:
            raise LabelError("a message's role and from differ", "keep one")
        unread.add("messages.from")  # such as the name of a sender
    if not roles:
        return None, None
    return next((role for role in roles if role in _CALLS), roles[0]), known[0]


def _same(one: Any, other: Any, whose: str) -> Any:
    """The one of two values that holds something; both may, if they are equal."""
    if holds(one) and holds(other) and one != other:
        raise LabelError(f"a message's {whose} differ", "keep one")
    return one if holds(one) else other


def _reasoning(turn: Row) -> Row:
    """The `reasoning_content` of a message, under any of its three names; empty if it has none."""
    texts = [turn[key] for key in _REASONING_KEYS if not _blank(turn.get(key))]
    if any(text != texts[0] for text in texts):
        raise LabelError("a message's reasoning_content, thinking and reasoning differ", "keep one")
    return {"reasoning_content": texts[0]} if texts else {}


def _blank(value: object) -> bool:
    return not (value.strip() if isinstance(value, str) else value)


def _train(turn: Row, role: object, unread: set[str]) -> bool | None:
    """True or false where a message's masks choose it or leave it out; None if it has none."""
    for key in _OTHER_MASKS:
        if holds(turn.get(key)):
            raise LabelError(f"a message's {key} cannot be obeyed", "write train: true or false")
    known = [key for key in (*_FLAGS, *_WEIGHTS) if turn.get(key) is not None]
    if role != "assistant":
        # Other messages are not trained on, whatever their weight.
        unread |= {f"messages.{key}" for key in known if key in _WEIGHTS and turn[key] != 0}
        known = [key for key in known if key in _FLAGS]
    # The first of the first four keys that the message has decides; the others must agree with it.
    known = [*[key for key in known if key in _FIRST][:1], *[key for key in known if key not in _FIRST]]
    chosen = {key: _chosen(key, turn[key]) for key in known}
    if len(set(chosen.values())) > 1:
        raise LabelError(f"a message's {' and '.join(chosen)} differ", "keep one")
    return next(iter(chosen.values()), None)


def _chosen(key: str, value: object) -> bool:
    """True if a mask chooses its message."""
    strict = key in ("train", "training")
    if (strict and not isinstance(value, bool)) or value not in (0, 1):
        raise LabelError(f"a message's {key} is {value!r}", f"write {'true or false' if key in _FLAGS else '0 or 1'}")
    return bool(value) is not (key == "masked")


# ---------------------------------------------------------------------------------------------------------------
# Parts


def _is_parts(content: object, role: object) -> bool:
    """True for a list of parts, or one part alone; a tool may answer with any other list or map."""
    if isinstance(content, dict):
        return content.get("type") in _PARTS and len(content) > 1
    if not isinstance(content, list):
        return False
    return role != "tool" or all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content)


def _read_parts(parts: list[Any], role: object, unread: set[str]) -> tuple[list[Message], str | None, str, list[Row]]:
    """A message's parts as the messages of tools that come before its text, its text, its reasoning and its calls.

    The text is None if all parts are results of tools.
    """
    results: list[Message] = []
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[Row] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _PARTS:
            detail = f"the type of one is {kind!r}" if isinstance(part, dict) and kind is not None else ""
            raise LabelError("a message has parts that are not text", detail)
        keys = {"type", "text", "value", "content"}
        if kind in _TEXT_PARTS:
            if calls:
                raise LabelError("a message's text comes after a tool call", "write it in an earlier message")
            texts.append(_text_of(part, ("text", "value", "content"), "text"))
        elif kind in _REASONING_PARTS:
            if "".join(texts) or calls:
                raise LabelError("a message's reasoning comes after its text", "write it in an earlier message")
            keys |= {"reasoning", "thinking", "reasoning_content"}
            reasoning.append(_text_of(part, tuple(sorted(keys - {"type"})), "reasoning"))
        elif kind in _CALL_PARTS:
            calls += _call_of_part(part, kind, unread)
            continue
        else:
            if role not in ("user", "tool"):
                raise LabelError(f"a {role} message holds the result of a tool", "write it in a tool message")
            if "".join(texts):
                raise LabelError("a tool's result comes after a text", "write it in an earlier message")
            results.append(_result_of_part(part, kind, unread))
            continue
        unread |= {f"messages.content.{key}" for key in part.keys() - keys if holds(part[key])}
    text = None if results and not "".join(texts) else "".join(texts)
    return results, text, "".join(reasoning), calls


def _text_of(part: Row, keys: tuple[str, ...], kind: str) -> str:
    text = one_of(part, keys, "a part's")
    if not isinstance(text, str):
        raise LabelError(f"a message has a {kind} part without text")
    return text


def _call_of_part(part: Row, kind: str, unread: set[str]) -> list[Row]:
    """The calls of a part that holds one as a map or as JSON under one key, or by keys of its own."""
    held = ("value", "text", "content", kind, "function", "tool_call")
    call = decoded(one_of(part, tuple(dict.fromkeys(held)), "a part's"))
    if call is None:
        return _tool_calls({key: value for key, value in part.items() if key != "type"}, unread)
    rest = part.keys() - {"type", "id", "call_id", *held}
    unread |= {f"messages.content.{key}" for key in rest if holds(part[key])}
    calls = _tool_calls(call, unread)
    if (identity := _identity(part, unread)) is not None:
        if len(calls) > 1:
            unread.add("messages.content.id")
        else:
            calls[0] = {"id": identity} | calls[0]
    return calls


def _identity(call: Row, unread: set[str]) -> Any:
    """A call's `call_id`, by which its result is known, or `id`."""
    if holds(call.get("call_id")):
        unread |= {"messages.tool_calls.id"} if call.get("id", call["call_id"]) != call["call_id"] else set()
        return call["call_id"]
    return call.get("id")


def _result_of_part(part: Row, kind: str, unread: set[str]) -> Message:
    held = tuple(dict.fromkeys(("content", "value", "text", "output", "response", kind)))
    content = one_of(part, held, "a part's")
    if isinstance(content, dict | list) and content and _is_parts(content, "tool"):
        parts = [content] if isinstance(content, dict) else content
        _, content, *others = _read_parts(parts, "tool result", unread)
        if any(others):
            raise LabelError("a tool's result holds parts that are not text")
    check_json(content, "a tool's answers")
    identity = one_of(part, ("tool_use_id", "tool_call_id", "call_id", "id"), "a part's")
    message = {"role": "tool", "content": content, "tool_call_id": identity, "name": part.get("name")}
    rest = part.keys() - {"type", "tool_use_id", "tool_call_id", "call_id", "id", "name", *held}
    unread |= {f"messages.content.{key}" for key in rest if part[key] is not False and holds(part[key])}
    return {key: value for key, value in message.items() if value is not None or key == "content"}


# ---------------------------------------------------------------------------------------------------------------
# Tool calls


def _calls_of(turn: Row, unread: set[str]) -> list[Row]:
    """The calls of a message's `tool_calls`, or of the `function_call` that came before them in OpenAI's form."""
    calls = decoded(turn.get("tool_calls"))
    calls = _tool_calls(calls, unread) if calls else []
    called = decoded(turn.get("function_call"))
    return list(_same(calls, _tool_calls(called, unread) if called else [], "tool_calls and function_call"))


def _tool_calls(calls: Any, unread: set[str]) -> list[Row]:
    """Tool calls in OpenAI's form, but with `arguments` as a map, which templates expect, and not a string of JSON."""
    converted = []
    for call in calls if isinstance(calls, list) else [calls]:
        if (function := function_in(call)) is None:
            detail = 'write [{"name": ..., "arguments": {...}}]'
            raise LabelError("a message's tool_calls are not calls", detail)
        given = one_of(function, _ARGUMENTS, "a tool call's")
        # A call without arguments may have null or "".
        arguments = decoded(given) or {}
        if not isinstance(arguments, dict):
            detail = f"those of {function['name']} are {arguments!r:.60}"
            raise LabelError("a tool call's arguments are not a map", detail)
        check_json(arguments, "a tool call's arguments")
        read = {"id", "call_id", "type", "name", *_ARGUMENTS} | ({"function"} if function is not call else set())
        unread |= {
            f"messages.tool_calls.{key}" for each in (call, function) for key in each.keys() - read if holds(each[key])
        }
        if function is not call and any(holds(call.get(key)) for key in ("name", *_ARGUMENTS)):
            raise LabelError("a tool call has a name or arguments inside and outside `function`", "keep one")
        identity = _identity(call, unread)
        function = {"name": function["name"], "arguments": arguments}
        converted.append(
            ({"id": identity} if identity is not None else {}) | {"type": "function", "function": function}
        )
    return converted


def _calls_in(calls: Any, keys: tuple[str, ...], unread: set[str]) -> list[Row] | None:
    """The tool calls that the text of a message holds; None unless each has one of the keys."""
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(c, dict) and "name" in c and c.keys() & {*keys} for c in calls):
        return None
    return _tool_calls(calls, unread)


def function_in(item: object) -> Row | None:
    """The map with a function's name: an item of `tools` or `tool_calls`, or the value of its `function`; else None."""
    named = (item.get("function") or item) if isinstance(item, dict) else None
    return named if isinstance(named, dict) and named.get("name") and isinstance(named["name"], str) else None
