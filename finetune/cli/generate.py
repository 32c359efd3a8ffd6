"""`finetune generate`: answers one prompt, each line of standard input, or a chat on a terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from finetune.data.formats import wrapped_tools
from finetune.data.turns import Message, Tool
from finetune.model.generate import CUT_OFF, Generator, Sampling
from finetune.model.load_generator import LoadOptions, load_generator
from finetune.model.locate import load_errors
from finetune.system.errors import DataError, LabelError
from finetune.system.terminal import Say, print_text


def generate(args: argparse.Namespace, say: Say) -> None:
    """Answers what the command line asks.

    Args:
        args: The flags of `finetune generate`.
        say: Takes lines for standard error.

    Raises:
        DataError: The tools or the template's variables cannot be read.
        LabelError: The chat template refuses them, or the conversation.
        ModelError, RunError, TemplateError: As for `load_generator`.
    """
    for flag in ("prompt", "system"):
        if any("\ud800" <= c <= "\udfff" for c in getattr(args, flag) or ""):
            raise DataError(f"--{flag}: it is not UTF-8 text")
    if args.prompt is None and sys.stdin is None:
        raise DataError("--prompt: standard input is closed; write --prompt TEXT")
    tools = _read_tools(args.tools) if args.tools else []
    variables = _variables(args.chat_template_kwargs) if args.chat_template_kwargs else {}
    options = LoadOptions(args.dtype, args.quantize, args.attn, args.device, args.compile)
    with load_errors(args.model):
        generator = load_generator(
            args.model,
            options,
            adapter=not args.no_adapter,
            base_model=args.base,
            trust_remote_code=args.trust_remote_code,
        )
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    system = [{"role": "system", "content": args.system}] if args.system else []
    chat = _Conversation(generator, sampling, tools, variables, say, system)
    if args.prompt is not None:
        chat.answer(args.prompt)
    elif sys.stdin.isatty():
        _chat(chat)
    else:
        for line in filter(None, map(str.strip, _lines(sys.stdin))):
            print_text(f"> {line}")
            chat.answer(line)
            print_text()
            chat.messages[len(system) :] = []


@dataclass
class _Conversation:
    generator: Generator
    sampling: Sampling
    tools: Sequence[Tool]
    variables: Mapping[str, Any]
    say: Say
    messages: list[Message] = field(default_factory=list)

    def answer(self, text: str) -> None:
        """Prints the answer to a user's text as it is generated; says if it reached the token limit."""
        self.messages.append({"role": "user", "content": text})
        self._check_tools()
        answer = piece = ""
        for piece in self.generator.stream(self.messages, self.sampling, self.variables, self.tools):
            if piece == CUT_OFF:
                break
            answer += piece
            print_text(piece, end="")
        print_text()
        if piece == CUT_OFF:
            self.say(f"(did not stop within {self.sampling.max_new_tokens} tokens)")
        self.messages.append({"role": "assistant", "content": answer})

    def _check_tools(self) -> None:
        prompt_ids = self.generator.prompt_ids
        if self.tools and prompt_ids(self.messages, self.variables, self.tools) == prompt_ids(
            self.messages, self.variables
        ):
            raise LabelError("--tools: the chat template leaves the tools out")


def _lines(file: TextIO) -> Iterator[str]:
    """The lines of standard input."""
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: not UTF-8 text: byte {error.object[error.start]:#04x}") from error


def _chat(chat: _Conversation) -> None:
    """Chats on the terminal, with the history as context, until an empty line or the end of input."""
    chat.say("an empty line ends the chat")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if not text:
            return
        chat.answer(text)


def _read_tools(path: Path) -> list[Tool]:
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
        return wrapped_tools(tools if isinstance(tools, list) else [tools])
    except OSError as error:
        raise DataError(f"--tools: {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"--tools: {path}: {error}") from error


def _variables(text: str) -> dict[str, Any]:
    try:
        variables = json.loads(text)
    except (ValueError, RecursionError):
        variables = None
    if not isinstance(variables, dict):
        raise DataError(
            f"--chat-template-kwargs: is {text}; write a map in JSON, such as '{{\"enable_thinking\": true}}'"
        )
    return variables
