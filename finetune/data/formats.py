"""A row of somebody's dataset to messages: `columns`, `filter` and the formats that are known.

A format gives `{"messages": [...]}`, with `tools` where the row has some and `prompt_messages` where the first ones are
a prompt, or, without chat turns, `{"prompt": str, "completion": str}`. Names are those that chat templates ask for.
"""

from __future__ import annotations

import json
import re
from typing import Any

from finetune.data.turns import Message
from finetune.recipe.schema import DataSource
from finetune.system.errors import DataError, LabelError

Row = dict[str, Any]


def matches_filter(source_filter: dict[str, Any], row: Row) -> bool:
    """Whether each column that is named holds the value given for it or one of those: itself, or in its list.

    `true` is not 1, and a number is not its digits: the cells of a CSV are text.

    Raises:
        LabelError: There is no such column.
    """
    for column in source_filter:
        if column not in row:
            there = ", ".join(map(str, row))
            raise LabelError(f"filter: there is no column {column!r}; there are {there}")
    for column, wanted in source_filter.items():
        held = row[column] if isinstance(row[column], list) else [row[column]]
        wanted = wanted if isinstance(wanted, list) else [wanted]
        if not any(v == w and isinstance(v, bool) == isinstance(w, bool) for v in held for w in wanted):
            return False
    return True


def map_columns(source: DataSource, row: Row) -> Row:
    """`columns` applied: a column's value, or a format string filled in once over the row."""
    mapped = dict(row)
    for ours, spec in source.columns.items():
        names = re.findall(r"\{(\w+)\}", spec)
        for name in names or [spec]:
            if name not in row:
                there = ", ".join(map(str, row))
                raise LabelError(f"columns: {ours}: there is no column {name!r}; there are {there}")
        for name in names:
            if not isinstance(row[name], str | int | float):
                raise LabelError(
                    f"columns: {ours}: the column {name!r} holds {type(row[name]).__name__}, not text"
                )
        mapped[ours] = re.sub(r"\{(\w+)\}", lambda m: str(row[m[1]]), spec) if names else row[spec]
    return mapped


def detect_format(source: DataSource, row: Row) -> str:
    """The format that a row's columns tell of.

    Raises:
        DataError: None does.
    """
    # What `columns` fills in is meant to be read.
    meant = {
        name: there for name, there in _COLUMNS.items() if set(there) & source.columns.keys()
    } or _COLUMNS
    for name, columns in meant.items():
        if all(column in row for column in columns):
            return name
    raise DataError(
        f"{source.path}: its format is not known from its columns ({', '.join(map(str, row))}); "
        f"write `format` ({', '.join(FORMATS)}) and `columns`"
    )


# ---------------------------------------------------------------------------------------------------------------
# Formats


def _messages(row: Row) -> Row:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise LabelError("it has no messages")
    return _chat(row, [_message(m, m.get("role"), m.get("content")) for m in _maps(messages)])


_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}


def _sharegpt(row: Row) -> Row:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise LabelError("it has no conversations")
    messages = []
    for turn in _maps(turns):
        role, value = turn.get("from"), turn.get("value")
        if role == "function_call" and (calls := _calls_in(value)):
            turn, value = turn | {"tool_calls": calls}, ""
        messages.append(
            _message(turn, _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role, value)
        )
    return _chat(row, _system(row) + messages)


def _alpaca(row: Row) -> Row:
    if row.get("instruction") is None:
        raise LabelError("it has no instruction")
    parts = [part for part in (row["instruction"], row.get("input")) if part]
    if not all(isinstance(part, str) for part in parts):
        raise LabelError("its instruction or input is not text")
    # Earlier answers are trained on as any assistant turn, as LLaMA-Factory does.
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(p, list) and len(p) == 2 for p in history):
        raise LabelError('its history is not a list of exchanges; write [["question", "answer"], ...]')
    exchanges = [*history, ["\n\n".join(parts), row.get("output")]]
    messages = [
        {"role": role, "content": text}
        for exchange in exchanges
        for role, text in zip(("user", "assistant"), exchange, strict=True)
    ]
    return _chat(row, _system(row) + messages)


def _prompt_completion(row: Row) -> Row:
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None or completion is None:
        raise LabelError("it has no prompt and completion")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    messages = [_message(m, m.get("role"), m.get("content")) for m in (*_maps(prompt), *_maps(completion))]
    return _chat(row, messages) | {"prompt_messages": len(prompt)}


def _text(row: Row) -> Row:
    if not isinstance(row.get("text"), str):
        raise LabelError("it has no text")
    return {"prompt": "", "completion": row["text"]}


FORMATS = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
}
# The columns by which a format is known, looked for in this order.
_COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}


# ---------------------------------------------------------------------------------------------------------------
# Messages and tools


def _maps(items: Any) -> list[Row]:
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise LabelError("its messages are not a list of maps")
    return items


def _system(row: Row) -> list[Message]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _chat(row: Row, messages: list[Message]) -> Row:
    """The messages, and the row's tools in the form that templates expect, which is OpenAI's."""
    tools = _decoded(row.get("tools"))
    if not tools:
        return {"messages": messages}
    functions = [_function(tool) for tool in tools] if isinstance(tools, list) else [None]
    if None in functions:
        raise LabelError(
            "its tools are not a list of functions; "
            'write [{"name": ..., "description": ..., "parameters": {...}}], or that as a JSON string'
        )
    wrapped = [
        {"type": "function"} | tool
        if tool.get("function")
        else {"type": "function", "function": {key: tool[key] for key in tool if key != "type"}}
        for tool in tools
    ]
    return {"messages": messages, "tools": wrapped}


def _message(source: Row, role: Any, content: Any) -> Message:
    """One message of ours: text parts joined, the several names for one thing made one, what is empty left out."""
    if isinstance(content, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise LabelError("a message has parts that are not text")
        # LLaMA-Factory writes the text under `value`.
        texts = [part.get("text", part.get("value")) for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise LabelError("a message has a text part without text")
        content = "".join(texts)
    message: Message = {"role": "system" if role == "developer" else role, "content": content}
    thoughts = [
        source[key] for key in ("reasoning_content", "thinking", "reasoning") if _said(source.get(key))
    ]
    if any(thought != thoughts[0] for thought in thoughts):
        raise LabelError("a message's reasoning_content, thinking and reasoning differ; keep one")
    if thoughts:
        message["reasoning_content"] = thoughts[0]
    message |= {key: source[key] for key in ("tool_call_id", "name") if source.get(key)}
    for key in ("reasoning_content", "tool_call_id", "name"):
        if not isinstance(message.get(key, ""), str):
            raise LabelError(f"a message's {key} is {type(message[key]).__name__}, not text")
    if calls := _decoded(source.get("tool_calls")):
        message["tool_calls"] = _tool_calls(calls)
        message["content"] = "" if content is None else content
    train = _train(source, role)
    return message if train is None else message | {"train": train}


def _said(text: Any) -> bool:
    return bool(text.strip() if isinstance(text, str) else text)


def _train(source: Row, role: Any) -> bool | None:
    """Whether a message says that it is trained on: `train` (axolotl: `training`), or a weight of 0 or 1."""
    for key in ("train", "training"):
        if source.get(key) is not None:
            if not isinstance(source[key], bool):
                raise LabelError(f"a message's {key} is {source[key]!r}; write true or false")
            return bool(source[key])
    for key in ("loss_weight", "weight"):
        if source.get(key) is not None and role == "assistant":
            if source[key] not in (0, 1):
                raise LabelError(f"a message's {key} is {source[key]!r}; only 0 and 1 can be obeyed")
            return bool(source[key])
    return None


def _tool_calls(calls: Any) -> list[Row]:
    """Calls in OpenAI's form, but that `arguments` are a map, as templates expect, and not a string that holds one."""
    written = []
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if (function := _function(call)) is None:
            raise LabelError(
                'a message\'s tool_calls are not calls; write [{"name": ..., "arguments": {...}}]'
            )
        # A call without arguments may be written with null or "".
        arguments = _decoded(function.get("arguments")) or {}
        if not isinstance(arguments, dict):
            raise LabelError(
                f"a tool call's arguments are not a map; those of {function['name']} are {arguments!r:.60}"
            )
        named = {"id": call["id"]} if call.get("id") is not None else {}
        written.append(
            named | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
    return written


def _calls_in(text: Any) -> list[Any] | None:
    """The calls that a `function_call` turn of sharegpt spells out; None where it is some other text."""
    calls = _decoded(text)
    calls = calls if isinstance(calls, list) else [calls]
    spelt = all(isinstance(call, dict) and "name" in call and "arguments" in call for call in calls)
    return calls if spelt else None


def _function(item: Any) -> Row | None:
    """The map that names a function: an item of `tools` or `tool_calls`, or what stands under its `function`."""
    found = (item.get("function") or item) if isinstance(item, dict) else None
    return found if isinstance(found, dict) and found.get("name") and isinstance(found["name"], str) else None


def _decoded(value: Any) -> Any:
    """What a string of JSON holds; all else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
