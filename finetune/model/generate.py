"""Answers of a loaded model."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from finetune.data.adapt import adapt
from finetune.data.chat import Chat
from finetune.data.tool_calls import with_arguments_as_rendered
from finetune.data.turns import Message, Tool
from finetune.model.attach import base_of
from finetune.model.generation_settings import one_answer_settings
from finetune.model.resize import check_token_ids
from finetune.system.errors import FinetuneError, ModelError, first_line
from finetune.system.terminal import quiet

# The steps of a batch after which answers that have ended leave it.
_ROUND = 8
# The layers of transformers' `DynamicCache` from which rows can be removed; a `DummyLayer` shares another layer's keys.
_LAYERS_OF_ROWS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
# The last piece of `Generator.stream` if the limit cut the answer off.
CUT_OFF = "\0cut"


@dataclass(frozen=True)
class Sampling:
    """The choice of the next token; a `temperature` of 0 takes the most likely one."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Generator:
    """A loaded model that answers.

    Attributes:
        model: The model.
        chat: The tokenizer and chat template.
        stop_ids: The tokens at which an answer ends.
        compiled: True if torch compiles the model.
    """

    model: Any
    chat: Chat
    stop_ids: tuple[int, ...]
    compiled: bool = False

    def prompt_ids(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Tool] | None = None,
    ) -> list[int]:
        """The model's input for a conversation: its rendering, or the bare text if there is no chat template.

        Args:
            messages: The conversation.
            variables: Variables of the template, which go before the defaults that it was saved with.
            tools: The functions that may be called.

        Raises:
            LabelError: The chat template refuses the messages, or reads no such variable.
            ModelError: The model's embedding has no row for one of the tokens.
        """
        tokenizer = self.chat.tokenizer
        if tokenizer.chat_template is None:
            ids = list(tokenizer("\n".join(message["content"] for message in messages))["input_ids"])
        else:
            messages, variables, _ = adapt(self.chat.render, messages, tools, variables)
            render = partial(self.chat.render, tools=tools or None, variables=variables)
            messages = with_arguments_as_rendered(render, messages)
            text = render(messages, add_generation_prompt=True)
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        check_token_ids([tokenizer.pad_token_id, *ids], tokenizer, self.model.config)
        return ids

    def answer_ids(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        streamer: Any = None,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Tool] | None = None,
    ) -> list[int]:
        """The tokens of an answer; the last one is a stop token, unless the limit cut the answer off.

        Args:
            messages: The conversation.
            sampling: How tokens are chosen.
            streamer: The `streamer` of `transformers.generate`, which gets each token as soon as it is chosen.
            variables: As for `prompt_ids`.
            tools: As for `prompt_ids`.

        Raises:
            LabelError: As for `prompt_ids`.
            ModelError: The model's code fails.
        """
        import torch

        ids = torch.tensor([self.prompt_ids(messages, variables, tools)])
        torch.manual_seed(sampling.seed)
        drawn = sampling.temperature > 0
        out = self._generate(
            ids,
            torch.ones_like(ids),
            sampling.max_new_tokens,
            do_sample=drawn,
            temperature=sampling.temperature if drawn else None,
            top_p=sampling.top_p if drawn else None,
            streamer=streamer,
        )
        return list(out[0, ids.shape[1] :].tolist())

    def answers(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """The greedy answers to several prompts, computed as one batch.

        Args:
            prompts: Each prompt's token ids, as `prompt_ids` returns them.
            max_new_tokens: The limit of each answer.

        Returns:
            The token ids of each answer; the last one is a stop token, unless the limit cut the answer off.

        Raises:
            ModelError: The model's code fails.
        """
        import torch

        width = max(len(prompt) for prompt in prompts)
        pad = self.chat.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        answers: list[list[int]] = [[] for _ in prompts]
        rows, cache = list(range(len(prompts))), self._cache_of_rows()
        while rows:
            count = max_new_tokens - (ids.shape[1] - width)
            options = {"past_key_values": cache} if cache else {}
            count = min(count, _ROUND) if cache else count
            ids = self._generate(ids, mask, count, do_sample=False, temperature=None, top_p=None, **options).cpu()
            for row, tokens in zip(rows, ids[:, width:].tolist(), strict=True):
                answers[row] = tokens[: next((i + 1 for i, token in enumerate(tokens) if token in self.stop_ids), None)]
            going = [
                i
                for i, row in enumerate(rows)
                if len(answers[row]) < max_new_tokens and answers[row][-1] not in self.stop_ids
            ]
            rows = [rows[i] for i in going]
            if rows and cache:
                ids, mask = ids[going], torch.nn.functional.pad(mask[going], (0, count), value=1)
                cache.batch_select_indices(torch.tensor(going))
        return answers

    def _cache_of_rows(self) -> Any:
        """A cache from which rows can be removed; None if the model keeps more than keys and values of tokens.

        Source: transformers 5.23 `cache_utils.py`, whose `batch_select_indices` leaves the states of linear attention.
        """
        from transformers import DynamicCache

        inner = base_of(self.model)
        if self.compiled or not inner._supports_default_dynamic_cache():
            return None
        cache = DynamicCache(config=inner.config.get_text_config(decoder=True))
        kinds = {type(layer).__name__ for layer in cache.layers}
        return cache if kinds and kinds <= _LAYERS_OF_ROWS else None

    def text(self, answer: Sequence[int]) -> str:
        """The text of an answer's token ids, without its stop token.

        Other special tokens are shown: they mark a call, or thinking.
        """
        stopped = bool(answer) and answer[-1] in self.stop_ids
        return str(self.chat.tokenizer.decode(answer[:-1] if stopped else answer))

    def _generate(self, ids: Any, mask: Any, max_new_tokens: int, **options: Any) -> Any:
        """The prompts and their answers, by `transformers.generate`; `options` are its arguments."""
        import torch

        if self.compiled:
            from transformers import CompileConfig

            config = CompileConfig()
            config._compile_all_devices = True  # transformers 5.23 would leave a CPU out, and only warn
            options |= {"cache_implementation": "static", "compile_config": config}
        with torch.inference_mode(), quiet(), one_answer_settings(self.model), _answer_errors(self.model):
            return self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=max_new_tokens,
                eos_token_id=list(self.stop_ids),
                pad_token_id=self.chat.tokenizer.pad_token_id,
                **options,
            )

    def stream(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Tool] | None = None,
    ) -> Iterator[str]:
        """The text of an answer, piece by piece; `CUT_OFF` comes last if the limit cut it off.

        Special tokens are part of the text, as those around a call or thinking, but for the stop token.

        Args:
            messages: The conversation.
            sampling: How tokens are chosen.
            variables: As for `prompt_ids`.
            tools: As for `prompt_ids`.

        Raises:
            LabelError: As for `prompt_ids`.
        """
        import threading

        from transformers import TextIteratorStreamer

        class Streamer(TextIteratorStreamer):  # type: ignore[misc]
            def put(streamer, value: Any) -> None:
                if streamer.next_tokens_are_prompt or int(value[-1]) not in self.stop_ids:
                    super().put(value)

        streamer = Streamer(self.chat.tokenizer, skip_prompt=True)
        result: list[int] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                result.extend(self.answer_ids(messages, sampling, streamer, variables, tools))
            except BaseException as error:
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failure:
            raise failure[0]
        if not result or result[-1] not in self.stop_ids:
            yield CUT_OFF


@contextmanager
def _answer_errors(model: Any) -> Iterator[None]:
    """Turns errors of a model's own code at an answer into one line: a value of its config may be wrong.

    The checks at loading know those that many architectures have; each architecture reads further ones.

    Raises:
        ModelError: In place of such an error; a lack of memory and errors of ours stay.
    """
    try:
        yield
    except FinetuneError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError" or "memory" in str(error):
            raise
        words = textwrap.shorten(f"{type(error).__name__}: {first_line(error)}", 300, placeholder=" ...")
        name = model.config.name_or_path
        raise ModelError(
            f"{name}: an answer fails: {words}; is a value of its config.json wrong? (--traceback shows where)"
        ) from error
