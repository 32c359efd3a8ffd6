"""Answers from a run, a merged model or any base model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.chat import Chat
from finetune.data.turns import Message
from finetune.model import compatibility, precision
from finetune.model.load import eos_tokens, load_base, load_tokenizer
from finetune.model.locate import Base
from finetune.model.provenance import adapter_base_sections, environment_of
from finetune.model.token_rows import lighten_trainable_tokens
from finetune.recipe.schema import ModelSection
from finetune.system import devices
from finetune.system.errors import ModelError
from finetune.system.files import ADAPTER_CONFIG
from finetune.system.terminal import quiet


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; a `temperature` of 0 takes the likeliest one."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Generator:
    """A model ready to answer."""

    model: Any
    chat: Chat
    stop_ids: tuple[int, ...]
    compiled: bool = False

    def _cache(self) -> dict[str, Any]:
        """Arguments with which `generate` can be compiled: a cache of fixed size."""
        if not self.compiled:
            return {}
        from transformers import CompileConfig

        config = CompileConfig()
        config._compile_all_devices = True  # transformers 5.23 would leave a CPU out, and only warn
        return {"cache_implementation": "static", "compile_config": config}

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The token ids before an answer: of the rendered conversation, or of the bare text without a template."""
        tokenizer = self.chat.tokenizer
        if tokenizer.chat_template is None:
            return list(tokenizer("\n".join(m["content"] for m in messages))["input_ids"])
        text = self.chat.render(messages, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def answer_ids(self, messages: Sequence[Message], sampling: Sampling, streamer: Any = None) -> list[int]:
        """The tokens of the answer, the one that stopped it included; it stopped by itself iff that is a stop token.

        Raises:
            LabelError: The chat template refuses the messages.
        """
        import torch

        ids = torch.tensor([self.prompt_ids(messages)], device=self.model.device)
        torch.manual_seed(sampling.seed)
        drawn = sampling.temperature > 0
        with torch.inference_mode(), quiet():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=sampling.max_new_tokens,
                do_sample=drawn,
                temperature=sampling.temperature if drawn else None,
                top_p=sampling.top_p if drawn else None,
                top_k=None,
                eos_token_id=list(self.stop_ids),
                pad_token_id=self.chat.tokenizer.pad_token_id,
                streamer=streamer,
                **self._cache(),
            )
        return list(out[0, ids.shape[1] :].tolist())

    def answers(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy answers to prompts of token ids, all at once; each ends with a stop token, or at the limit."""
        import torch

        width = max(len(prompt) for prompt in prompts)
        pad = self.chat.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode(), quiet():
            out = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=list(self.stop_ids),
                pad_token_id=pad,
                **self._cache(),
            )
        found = []
        for row in out[:, width:].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in self.stop_ids), len(row))
            found.append(row[:end])
        return found

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[str]:
        """The answer's text, piece by piece; `CUT_OFF` comes last where the limit cut the answer off."""
        import threading

        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(self.chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
        result: list[int] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                result.extend(self.answer_ids(messages, sampling, streamer))
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


# What `stream` yields last where the answer did not end by itself.
CUT_OFF = "\0cut"


def load_generator(
    name: str,
    adapter: bool = True,
    dtype: str | None = None,
    quantize: str | None = None,
    attn: str | None = None,
    device: str | None = None,
    compiled: bool = False,
    as_is: bool = False,
    sections: tuple[ModelSection, dict[str, Any] | None] | None = None,
    locate_base: Callable[[ModelSection], Base] = Base.of,
) -> Generator:
    """A run (its adapter on its base, loaded as it was trained), a directory of full weights, or a base model.

    Args:
        name: A run or model directory, or what `model.name_or_path` takes.
        adapter: False answers with the run's base alone, through the run's template.
        dtype: float32, bfloat16 or float16; absent, as the run was trained.
        quantize: int8 or nf4, by bitsandbytes.
        attn: `attn_implementation`.
        device: Where the model goes; absent, a GPU if there is one; auto, spread over all there are.
        compiled: Whether torch compiles the model for a cache of fixed size: quicker answers after slow first ones.
        as_is: For measuring what another program will compute: a full model takes `dtype` for every value, and the
            device may emulate it.
        sections: For a model without an adapter: the `model` and `quantization` sections of the recipe that says how to
            load it and which chat template to use.
        locate_base: Locates a base; a caller that loads several models passes one that knows those located before.

    Raises:
        ModelError: There is no such run or model, it cannot be loaded, or this device cannot compute so.
    """
    import torch

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device:
        compatibility.check_device(device)
    spread = place == "auto"
    folder = Path(name)
    is_adapter = (folder / ADAPTER_CONFIG).exists()
    if folder.is_dir() and not is_adapter and not (folder / "config.json").exists():
        raise ModelError(f"{name}: neither a finished run (adapter_config.json) nor a model (config.json)")
    section, trained_as = (
        adapter_base_sections(folder) if is_adapter else sections or (ModelSection(name_or_path=name), None)
    )
    where = devices.Device() if as_is else devices.device_of(device)
    wanted = precision.choose_dtype(
        dtype or section.dtype, where, "--dtype" if dtype else f"{name}: model.dtype"
    )
    quantization = {
        None: trained_as,
        "int8": {"load_in_8bit": True},
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    }[quantize]
    key = "--attn" if attn else f"{name}: model.attn_implementation"
    attn = attn or section.attn_implementation
    in_float32 = wanted == torch.float32
    if is_adapter and (commit := environment_of(folder).get("base_commit")):
        section = section.model_copy(update={"revision": commit})
    base = locate_base(section)
    compatibility.check_attention(
        attn,
        base.config,
        devices.device_of(device),
        in_float32,
        training=False,
        key=key,
    )
    stored_quantised = getattr(base.config, "quantization_config", None) is not None
    if quantize and stored_quantised:
        raise ModelError(f"{name} is quantised already; leave out --quantize")
    model = load_base(
        base.path,
        wanted,
        quantization,
        config=base.config,
        revision=section.revision,
        as_is=as_is and not is_adapter,
        attn_implementation=attn,
        trust_remote_code=section.trust_remote_code,
        # Quantised weights are not moved once they are loaded; "auto" spreads layers over all cards.
        **(
            {"device_map": place if spread else {"": place}}
            if spread or quantization or stored_quantised
            else {}
        ),
    )
    if is_adapter and adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, name)
        lighten_trainable_tokens(model)
    if not (spread or quantization or stored_quantised):
        model = model.to(place)
    model.eval()
    own = folder.is_dir() and (is_adapter or sections is None)
    chat = Chat(load_tokenizer(ModelSection(name_or_path=name)) if own else load_tokenizer(section, base))
    if compiled and not getattr(getattr(model, "hf_quantizer", None), "is_compileable", True):
        raise ModelError(
            f"--compile: {name} is quantised in a way that torch cannot compile; leave out --compile"
        )
    return Generator(model, chat, tuple(eos_tokens(model.generation_config, chat.tokenizer)), compiled)
