"""Answers of a served model: the prompts go to an OpenAI-compatible server, such as vLLM, llama.cpp's or Ollama."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2

from finetune.data.turns import Message
from finetune.evaluate.answers import Answer, repetition
from finetune.evaluate.endpoint import Endpoint, Reply, check_address
from finetune.evaluate.prompts import Prompt
from finetune.recipe.schema import ServerSection
from finetune.system.errors import EvaluateError, RefusedReply
from finetune.system.terminal import Say

# Seconds without a byte after which a request fails: a busy server on a CPU begins an answer late.
_TIMEOUT = 600.0
KEY_VARIABLE = "FINETUNE_SERVER_KEY"


class ServedModel:
    """A model behind an OpenAI-compatible address.

    Args:
        section: The recipe's `evaluate.server`.
        key: Sent to `section.base_url` and nowhere else; empty for a server that needs none.
        run: The name of the run or model that is served; it chooses among several models of a server.
        max_new_tokens: The most tokens of an answer.
        say: Called with a line when a request is repeated.

    Raises:
        EvaluateError: The address is not that of an API, the server does not answer, or it serves several models and
            none is named.
    """

    def __init__(self, section: ServerSection, key: str, run: str, max_new_tokens: int, say: Say) -> None:
        place = "evaluate.server"
        check_address(section.base_url, key, place, KEY_VARIABLE)
        self._workers = section.workers
        self._endpoint = Endpoint(
            section.base_url, section.model or "", key, _TIMEOUT, max_new_tokens, None, say, place, KEY_VARIABLE
        )
        if not section.model:
            with self._endpoint.client() as client:
                names = self._endpoint.model_ids(client)
            chosen = names if len(names) == 1 else [name for name in names if name in (run, run.rpartition("/")[2])]
            if len(chosen) != 1:
                raise EvaluateError(
                    f"evaluate.server.model: {section.base_url} serves {len(names)} models; write one of "
                    f"{', '.join(names[:10])}"
                )
            self._endpoint.model = chosen[0]
        self.name = f"{self._endpoint.model} at {section.base_url}"

    def answers(
        self,
        prompts: Sequence[Prompt],
        tokens_of: Callable[[str], list[int]],
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[Answer]:
        """The greedy answers to all prompts and their follow-up questions, in the order of the prompts.

        Args:
            prompts: The prompts, each with one turn or several.
            tokens_of: A text's token ids, for the share of repeated 4-grams and the length where the server tells none.
            advance: Called with the number of new answers.

        Raises:
            EvaluateError: The server fails, or refuses a prompt.
        """

        def ask(prompt: Prompt) -> list[Answer]:
            messages, found = prompt.messages, list[Answer]()
            # A client belongs to one thread.
            with self._endpoint.client() as client:
                for follow_up in (*prompt.follow_ups, None):
                    reply = self._reply(prompt, messages, client)
                    text = "\n".join(part for part in (reply.text.strip(), reply.calls) if part)
                    ids = tokens_of(text)
                    count = reply.tokens[1] if reply.tokens else len(ids)
                    found.append(Answer(prompt, messages, text, count, not reply.cut, repetition(ids)))
                    advance(1)
                    if follow_up is not None:
                        question: Message = {"role": "user", "content": follow_up}
                        messages = (*messages, {"role": "assistant", "content": text}, question)
            return found

        with ThreadPoolExecutor(self._workers) as pool:
            try:
                return [answer for answers in pool.map(ask, prompts) for answer in answers]
            except BaseException:
                # Requests in progress stop at their next wait; prompts that have not begun are cancelled.
                self._endpoint.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _reply(self, prompt: Prompt, messages: Sequence[Message], client: httpx2.Client) -> Reply:
        fields: dict[str, Any] = {}
        if prompt.tools:
            fields["tools"] = list(prompt.tools)
        if prompt.variables:
            fields["chat_template_kwargs"] = dict(prompt.variables)
        try:
            return self._endpoint.reply(_in_api_form(messages), client, **fields)
        except RefusedReply as error:
            raise EvaluateError(f"evaluate.server: prompt {prompt.name}: {error}") from error


def _in_api_form(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as OpenAI's chat API takes them: calls have ids and arguments as text, and their results name the id.

    Source: https://platform.openai.com/docs/api-reference/chat/create
    """
    found: list[dict[str, Any]] = []
    waiting: list[str] = []
    for message in messages:
        sent: dict[str, Any] = {"role": message["role"], "content": message["content"]}
        if calls := message.get("tool_calls"):
            waiting = [call.get("id") or f"call_{len(found)}_{i}" for i, call in enumerate(calls)]
            functions = [call.get("function", call) for call in calls]
            sent["tool_calls"] = [
                {"id": name, "type": "function", "function": {"name": call["name"], "arguments": _text(call)}}
                for name, call in zip(waiting, functions, strict=True)
            ]
        if message["role"] == "tool":
            # Results without an id answer the calls in their order.
            sent["tool_call_id"] = message.get("tool_call_id") or (waiting.pop(0) if waiting else "")
        found.append(sent)
    return found


def _text(call: Mapping[str, Any]) -> str:
    arguments = call.get("arguments", {})
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
