"""Converts a dataset's row into messages: `filter`, `columns`, and the known formats.

A format returns `{"messages": [...]}` in the names of chat templates, with `tools` if the row has some,
`prompt_messages` (a count) if the first messages are a prompt, and `unread` (keys of messages that no code reads).
The conversation of a pair is that of its chosen answer, and `rejected` holds the messages of the other answer; a rated
answer has `desirable`. For rows without chat turns a format returns `{"prompt": str, "completion": str}`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from finetune.data.json_rows import Row
from finetune.data.messages import check_json, decoded, function_in, holds, one_of, read_messages
from finetune.data.preference import read_transcript, split_at_answers
from finetune.data.turns import INSTRUCTING, Message
from finetune.recipe.preferences import FORMATS_BY_METHOD, FORMATS_OF_PREFERENCES
from finetune.recipe.schema import DataSource
from finetune.system.errors import DataError, LabelError


def matches_filter(source_filter: Row, row: Row) -> bool:
    """True if each column of a filter holds its value, or one of its values; a list may hold it as an item.

    Types must agree: `true` is not 1, and a number is not its digits (the cells of a CSV are text).

    Raises:
        LabelError: The row lacks a column of the filter.
    """
    for column in source_filter:
        if column not in row:
            raise LabelError(f"filter: there is no column {column!r}", f"there are {', '.join(map(str, row))}")
    for column, wanted in source_filter.items():
        held = row[column] if isinstance(row[column], list) else [row[column]]
        wanted = wanted if isinstance(wanted, list) else [wanted]
        if not any(v == w and isinstance(v, bool) == isinstance(w, bool) for v in held for w in wanted):
            return False
    return True


def map_columns(source: DataSource, row: Row) -> Row:
    """The row with the source's `columns` added: each the value of another column, or a format string over the row.

    Raises:
        LabelError: The row lacks a column, or one in a format string holds neither text nor a number.
    """
    mapped = dict(row)
    for target, spec in source.columns.items():
        names = _fields(spec)
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


def detect_format(source: DataSource, row: Row, method: str = "sft") -> str:
    """The name of the format that a row's columns belong to, of those that the recipe's method reads.

    Raises:
        DataError: None of these formats has such columns.
    """
    read = FORMATS_BY_METHOD.get(method) or [name for name in FORMATS if name not in FORMATS_OF_PREFERENCES]
    known = {name: columns for name, columns in _COLUMNS.items() if name in read}
    # A format whose columns the recipe's `columns` name comes first.
    filled = {name: columns for name, columns in known.items() if set(columns) & source.columns.keys()}
    for name, columns in (filled or known).items():
        if all(column in row for column in columns):
            return name
    there = ", ".join(map(str, row))
    if method == "sft" and all(column in row for column in _COLUMNS["preference"]):
        raise DataError(f"{source.name}: its rows are pairs ({there}); write method: dpo, kto or orpo")
    wanted = "" if method == "sft" else f" for method {method}"
    raise DataError(
        f"{source.name}: its format{wanted} is not known from its columns ({there}); "
        f"write in the source, for example, {_example(row, method)}; the known formats are {', '.join(read)}"
    )


def _example(row: Row, method: str) -> str:
    """The line to write for columns that no format has, from the columns that hold texts."""
    texts = {str(column).lower(): str(column) for column, value in row.items() if isinstance(value, str)}
    targets = {"sft": ("prompt", "completion"), "kto": ("prompt", "completion", "label")}.get(
        method, ("prompt", "chosen", "rejected")
    )
    names = [*texts.values()] if len(texts) >= len(targets) else ["COLUMN"] * len(targets)
    if method == "sft" and len(texts) == 1:
        targets, names = ("text",), [*texts.values()]
    pair, contexts = _pair_in(texts), [texts[name] for name in sorted(_CONTEXT & texts.keys())]
    if method == "sft" and pair and contexts:
        names = [f'"{{{contexts[0]}}}\\n\\n{{{texts[pair[0]]}}}"', texts[pair[1]]]
    return f"columns: {{{', '.join(f'{target}: {name}' for target, name in zip(targets, names, strict=False))}}}"


def _pair_in(names: Collection[str]) -> tuple[str, str] | None:
    """The first of the commonest pairs of columns, in lower case, that stands among `names`; None if none does."""
    return next((pair for pair in _PAIRS if pair[0] in names and pair[1] in names), None)


def with_known_pair(source: DataSource, row: Row, method: str = "sft") -> DataSource:
    """The source with `columns` for a question and its answer, where they have one of the commonest pairs of names.

    It is unchanged if it says how to read its rows, if they have a format's columns, or if they have a column with a
    context too: where that belongs in the prompt is not known.

    Args:
        source: The source.
        row: Its first row.
        method: The recipe's method.
    """
    if source.format or source.columns or method not in ("sft", "kto"):
        return source
    unknown = FORMATS_OF_PREFERENCES - {"preference"}
    known = [columns for name, columns in _COLUMNS.items() if name not in unknown]
    if any(all(column in row for column in columns) for columns in known):
        return source
    names = {str(column).lower(): column for column in row if isinstance(row[column], str)}
    if all(name in names for name in ("instruction", "context", "response")):
        targets = {"instruction": "instruction", "input": "context", "output": "response"}
    else:
        pair = _pair_in(names)
        if pair is None or (_CONTEXT - {*pair}) & names.keys():
            return source
        targets = dict(zip(("prompt", "completion"), pair, strict=True))
    columns = {target: names[name] for target, name in targets.items()}
    return source.model_copy(update={"columns": columns})


def pair_note(source: DataSource) -> str:
    """The ledger's words for rows whose columns `with_known_pair` recognised."""
    return f"rows whose {' and '.join(source.columns.values())} are read as {' and '.join(source.columns)}"


# ---------------------------------------------------------------------------------------------------------------
# Formats


def _turns(row: Row, column: str) -> Row:
    unread: set[str] = set()
    turns = decoded(row.get(column))
    if not isinstance(turns, list) or not turns:
        detail = "it is a text, not a list" if isinstance(turns, str) else ""
        raise LabelError(f"it has no {column}", detail)
    return _chat(row, _with_system(row, read_messages(turns, unread)), unread)


def _alpaca(row: Row) -> Row:
    if row.get("instruction") is None:
        raise LabelError("it has no instruction")
    parts: list[Any] = [part for part in (row["instruction"], row.get("input")) if holds(part)]
    if not all(isinstance(part, str) for part in parts):
        raise LabelError("its instruction or input is not text")
    # Earlier answers are trained on like any assistant turn, as in LLaMA-Factory.
    history = decoded(row.get("history")) or []
    if not isinstance(history, list) or not all(isinstance(p, list) and len(p) == 2 for p in history):
        raise LabelError("its history is not a list of exchanges", 'write [["question", "answer"], ...]')
    exchanges = [*history, ["\n\n".join(parts), row.get("output")]]
    messages = [
        {"role": role, "content": text}
        for exchange in exchanges
        for role, text in zip(("user", "assistant"), exchange, strict=True)
    ]
    return _chat(row, _with_system(row, messages), set())


def _prompt_completion(row: Row) -> Row:
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None or completion is None:
        raise LabelError("it has no prompt and completion")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    unread: set[str] = set()
    asked = _with_system(row, read_messages(prompt, unread))
    return _chat(row, asked + read_messages(completion, unread), unread) | {"prompt_messages": len(asked)}


def _preference(row: Row) -> Row:
    unread: set[str] = set()
    sides: dict[str, Any] = {name: row.get(name) for name in ("chosen", "rejected")}
    for name, side in sides.items():
        if side is None:
            raise LabelError(f"it has no {name}")
    asked = row["prompt"] if holds(row.get("prompt")) else row.get("question")
    if asked != row.get("question") and holds(row.get("question")):
        unread.add("question")
    prompt, conversations = _read_turns(asked, unread), [_read_turns(side, unread) for side in sides.values()]
    if all(isinstance(side, str) for side in sides.values()) and conversations == [None, None]:
        conversations = [read_transcript(side) for side in sides.values()]
        if conversations == [None, None]:
            conversations = [[{"role": "assistant", "content": side}] for side in sides.values()]
    chosen, rejected = conversations
    if chosen is None or rejected is None:
        raise LabelError("one of its chosen and rejected is a text, the other a conversation", "write both alike")
    answers_only = [not side or side[0]["role"] == "assistant" for side in (chosen, rejected)]
    if all(answers_only):
        if not holds(asked):
            raise LabelError("it has no prompt", "write it, or whole conversations in chosen and rejected")
        prompt = prompt or _asked(str(asked))
    elif any(answers_only):
        raise LabelError("one of its chosen and rejected begins with the answer, the other with the prompt")
    else:
        given = prompt
        prompt, chosen, rejected = split_at_answers(chosen, rejected)
        said = [message["content"] for message in prompt]
        if holds(asked) and (given != prompt if given else asked not in said):
            unread.add("prompt" if asked is row.get("prompt") else "question")
    prompt = _with_system(row, prompt)
    return _chat(row, prompt + chosen, unread) | {"prompt_messages": len(prompt), "rejected": rejected}


def _read_turns(value: Any, unread: set[str]) -> list[Message] | None:
    """The messages of a list, or of a text of JSON that holds one; None for nothing and for any other text."""
    turns = decoded(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if isinstance(turns, str) or turns is None or (isinstance(value, str) and not _are_maps(turns)):
        return None
    return read_messages(turns, unread)


def _are_maps(turns: Any) -> bool:
    return isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)


def _asked(prompt: str) -> list[Message]:
    """The messages of a prompt in text; of a transcript of HH-RLHF, which ends with `Assistant:`, several."""
    ends_with_header = prompt.rstrip().endswith("Assistant:")
    turns = read_transcript(prompt) if ends_with_header else None
    return turns[:-1] if turns else [{"role": "user", "content": prompt}]


_LABELS = {"1": True, "true": True, "0": False, "false": False}


def _rated(row: Row) -> Row:
    label = row.get("label")
    if label is None:
        raise LabelError("it has no label")
    known = _LABELS.get(label.lower()) if isinstance(label, str) else None if label not in (0, 1) else bool(label)
    if known is None:
        raise LabelError(f"its label is {label!r}", "write true or false")
    return _prompt_completion(row) | {"desirable": known}


def _text(row: Row) -> Row:
    if not isinstance(row.get("text"), str):
        raise LabelError("it has no text")
    return {"prompt": "", "completion": row["text"]}


FORMATS: dict[str, Callable[[Row], Row]] = {
    "messages": partial(_turns, column="messages"),
    "sharegpt": partial(_turns, column="conversations"),
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
    "preference": _preference,
    "rated": _rated,
}
# The columns by which a format is known, looked for in this order.
_COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
    "rated": ("prompt", "completion", "label"),
}


# Columns of a question and its answer that are read without `columns`; their case does not matter.
_PAIRS = tuple(
    (asked, said)
    for asked in ("question", "prompt", "instruction", "query", "user", "human", "problem", "input")
    for said in ("answer", "response", "completion", "output", "assistant", "solution", "reply")
)
# Columns that belong into the prompt, at a place that is not known.
_CONTEXT = {"context", "passage", "document", "article", "input"}

_OF_CHATS = ("system", "system_prompt", "tools", "functions", "chat_template_kwargs")
# The columns that a format reads.
COLUMNS_READ = {
    "messages": ("messages", *_OF_CHATS),
    "sharegpt": ("conversations", *_OF_CHATS),
    "alpaca": ("instruction", "input", "output", "history", *_OF_CHATS),
    "prompt_completion": ("prompt", "completion", *_OF_CHATS),
    "text": ("text",),
    "preference": ("prompt", "question", "chosen", "rejected", *_OF_CHATS),
    "rated": ("prompt", "completion", "label", *_OF_CHATS),
    "raw": ("prompt", "completion"),
}


def check_columns(source: DataSource, form: str) -> None:
    """Checks that a format, or `raw`, reads each column that a source's `columns` fill in.

    Raises:
        DataError: It does not.
    """
    read = COLUMNS_READ[form]
    for target in source.columns:
        if target not in read:
            raise DataError(
                f"{source.name}: columns: {target}: the format {form} does not read it; it reads {', '.join(read)}"
            )


def unread_columns(source: DataSource, form: str, row: Row) -> list[str]:
    """The columns of a row, as it was before `columns`, that hold something and are read by nothing."""
    read = {*COLUMNS_READ[form]} - source.columns.keys() | source.filter.keys()
    for spec in source.columns.values():
        read |= {*(_fields(spec) or [spec])}
    return [str(column) for column in row if column not in read and holds(row[column])]


def _fields(spec: str) -> list[str]:
    """The columns in a format string; empty if it is the name of a column."""
    return re.findall(r"\{(\w+)\}", spec)


# ---------------------------------------------------------------------------------------------------------------
# Messages and tools


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    """The messages after the system text that a column holds, unless they begin with it."""
    text = one_of(row, ("system", "system_prompt"), "its columns")
    if not holds(text):
        return messages
    first = messages[0] if messages else {}
    if first.get("role") not in INSTRUCTING:
        return [{"role": "system", "content": text}, *messages]
    if first["content"] != text:
        raise LabelError("its column system and its first message differ", "keep one")
    return messages


def _chat(row: Row, messages: list[Message], unread: set[str]) -> Row:
    """The messages, the keys that are not read, the template's variables, and the tools in OpenAI's form."""
    chat: Row = {"messages": messages} | ({"unread": sorted(unread)} if unread else {})
    variables = decoded(row.get("chat_template_kwargs"))
    if holds(variables):
        if not isinstance(variables, dict):
            raise LabelError("its chat_template_kwargs are not a map", 'write {"enable_thinking": false}')
        check_json(variables, "its chat_template_kwargs")
        # A column of maps has null where a row lacks a key.
        chat["variables"] = {name: value for name, value in variables.items() if value is not None}
    wrapped, others = wrapped_tools(decoded(row.get("tools"))), wrapped_tools(decoded(row.get("functions")))
    if wrapped and others and wrapped != others:
        raise LabelError("its tools and functions differ", "keep one")
    return chat | ({"tools": wrapped or others} if wrapped or others else {})


def wrapped_tools(tools: Any) -> list[Row]:
    """Functions that may be called, in OpenAI's form.

    Args:
        tools: A list of functions, each alone or under the key `function`; or nothing.

    Raises:
        LabelError: It is not such a list, or holds what JSON cannot.
    """
    if not tools:
        return []
    functions = [function_in(tool) for tool in tools] if isinstance(tools, list) else [None]
    if None in functions:
        raise LabelError(
            "its tools are not a list of functions",
            'write [{"name": ..., "description": ..., "parameters": {...}}], or that as a JSON string',
        )
    check_json(tools, "its tools")
    return [
        {"type": "function"} | tool
        if tool.get("function")
        else {"type": "function", "function": {key: tool[key] for key in tool if key != "type"}}
        for tool in tools
    ]
