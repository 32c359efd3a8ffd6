"""Turns a dataset's row into messages: `filter`, `columns` and the formats that are known.

A format returns `{"messages": [...]}`, with `tools` where the row has some and `prompt_messages` (a count) where the
first messages are a prompt; without chat turns `{"prompt": str, "completion": str}`. Names are those of chat templates.
"""

from __future__ import annotations

import json
import re
from typing import Any

from finetune.data.turns import Message
from finetune.recipe.schema import DataSource
from finetune.system.errors import DataError, LabelError

Row = dict[str, Any]


def matches_filter(source_filter: Row, row: Row) -> bool:
    """True if each column of a filter holds its value, or one of its values; a list may hold it as an item.

    `true` is not 1, and a number is not its digits: the cells of a CSV are text.

    Raises:
        LabelError: The row lacks a column of the filter.
    """
    for column in source_filter:
        if column not in row:
            raise LabelError(
                f"filter: there is no column {column!r}", f"there are {', '.join(map(str, row))}"
            )
    for column, wanted in source_filter.items():
        held = row[column] if isinstance(row[column], list) else [row[column]]
        wanted = wanted if isinstance(wanted, list) else [wanted]
        if not any(v == w and isinstance(v, bool) == isinstance(w, bool) for v in held for w in wanted):
            return False
    return True


def map_columns(source: DataSource, row: Row) -> Row:
    """The row with the source's `columns`, each another column's value or a format string filled in over the row.

    Raises:
        LabelError: The row lacks a column, or one in a format string holds neither text nor a number.
    """
    mapped = dict(row)
    for target, spec in source.columns.items():
        names = re.findall(r"\{(\w+)\}", spec)
        for name in names or [spec]:
            if name not in row:
                detail = f"there are {', '.join(map(str, row))}"
                raise LabelError(f"columns: {target}: there is no column {name!r}", detail)
        for name in names:
            if not isinstance(row[name], str | int | float):
                held = type(row[name]).__name__
                raise LabelError(f"columns: {target}: the column {name!r} holds {held}, not text")
        mapped[target] = re.sub(r"\{(\w+)\}", lambda m: str(row[m[1]]), spec) if names else row[spec]
    return mapped


def detect_format(source: DataSource, row: Row) -> str:
    """The name of the format that a row's columns belong to.

    Raises:
        DataError: They belong to no known format.
    """
    # A format whose columns the recipe fills in goes before the others.
    filled = {name: columns for name, columns in _COLUMNS.items() if set(columns) & source.columns.keys()}
    for name, columns in (filled or _COLUMNS).items():
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
        raise LabelError("its history is not a list of exchanges", 'write [["question", "answer"], ...]')
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


def _maps(items: object) -> list[Row]:
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise LabelError("its messages are not a list of maps")
    return items


def _system(row: Row) -> list[Message]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _chat(row: Row, messages: list[Message]) -> Row:
    """The messages, and the row's tools in OpenAI's form, which templates expect."""
    tools = _decoded(row.get("tools"))
    if not tools:
        return {"messages": messages}
    functions = [_function(tool) for tool in tools] if isinstance(tools, list) else [None]
    if None in functions:
        raise LabelError(
            "its tools are not a list of functions",
            'write [{"name": ..., "description": ..., "parameters": {...}}], or that as a JSON string',
        )
    wrapped = [
        {"type": "function"} | tool
        if tool.get("function")
        else {"type": "function", "function": {key: tool[key] for key in tool if key != "type"}}
        for tool in tools
    ]
    return {"messages": messages, "tools": wrapped}


def _message(source: Row, role: object, content: object) -> Message:
    """One message as templates expect it: text parts are joined, synonyms get one name, empty values are left out."""
    if isinstance(content, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise LabelError("a message has parts that are not text")
        # LLaMA-Factory writes the text under `value`.
        texts = [part.get("text", part.get("value")) for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise LabelError("a message has a text part without text")
        content = "".join(texts)
    message: Message = {"role": "system" if role == "developer" else role, "content": content}
    reasoning = [
        source[key] for key in ("reasoning_content", "thinking", "reasoning") if not _blank(source.get(key))
    ]
    if any(text != reasoning[0] for text in reasoning):
        raise LabelError("a message's reasoning_content, thinking and reasoning differ", "keep one")
    if reasoning:
        message["reasoning_content"] = reasoning[0]
    message |= {key: source[key] for key in ("tool_call_id", "name") if source.get(key)}
    for key in ("reasoning_content", "tool_call_id", "name"):
        if not isinstance(message.get(key, ""), str):
            raise LabelError(f"a message's {key} is {type(message[key]).__name__}, not text")
    if calls := _decoded(source.get("tool_calls")):
        message["tool_calls"] = _tool_calls(calls)
        message["content"] = "" if content is None else content
    train = _train(source, role)
    return message if train is None else message | {"train": train}


def _blank(value: object) -> bool:
    return not (value.strip() if isinstance(value, str) else value)


def _train(source: Row, role: object) -> bool | None:
    """A message's `train` (axolotl: `training`), or its weight of 0 or 1, as a bool; None where it has neither."""
    for key in ("train", "training"):
        if source.get(key) is not None:
            if not isinstance(source[key], bool):
                raise LabelError(f"a message's {key} is {source[key]!r}", "write true or false")
            return bool(source[key])
    for key in ("loss_weight", "weight"):
        if source.get(key) is not None and role == "assistant":
            if source[key] not in (0, 1):
                raise LabelError(f"a message's {key} is {source[key]!r}", "write 0 or 1")
            return bool(source[key])
    return None


def _tool_calls(calls: Any) -> list[Row]:
    """Tool calls in OpenAI's form, but with `arguments` as a map, which templates expect, and not a string of JSON."""
    converted = []
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if (function := _function(call)) is None:
            detail = 'write [{"name": ..., "arguments": {...}}]'
            raise LabelError("a message's tool_calls are not calls", detail)
        # A call without arguments may have null or "".
        arguments = _decoded(function.get("arguments")) or {}
        if not isinstance(arguments, dict):
            detail = f"those of {function['name']} are {arguments!r:.60}"
            raise LabelError("a tool call's arguments are not a map", detail)
        identity = {"id": call["id"]} if call.get("id") is not None else {}
        function = {"name": function["name"], "arguments": arguments}
        converted.append(identity | {"type": "function", "function": function})
    return converted


def _calls_in(text: object) -> list[Any] | None:
    """The tool calls in the text of sharegpt's `function_call` turn; None where it is another text."""
    calls = _decoded(text)
    calls = calls if isinstance(calls, list) else [calls]
    valid = all(isinstance(call, dict) and "name" in call and "arguments" in call for call in calls)
    return calls if valid else None


def _function(item: object) -> Row | None:
    """The map with a function's name: an item of `tools` or `tool_calls`, or the value of its `function`; else None."""
    named = (item.get("function") or item) if isinstance(item, dict) else None
    return named if isinstance(named, dict) and named.get("name") and isinstance(named["name"], str) else None


def _decoded(value: object) -> Any:
    """The value of a string of JSON; any other value as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
