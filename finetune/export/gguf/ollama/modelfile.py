"""Writes a Modelfile for a GGUF file, from which `ollama create` makes a model that is prompted as it was trained.

How Ollama reads a value of a Modelfile (parser/parser.go, 2026): it ends at a line break, or, if it began with three
quotes, at the first line break after three quotes; blanks around it are dropped, nothing can be escaped, and a
character that Go does not count as printable is dropped without a message, such as the ideographic space and the joiner
within an emoji. Line breaks and tabs stay. A system text that would be changed goes into the template, whose strings
can be escaped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.data.turns import special_spans
from finetune.export.gguf.ollama.go_template import Scheme, go_template, learn_scheme
from finetune.system.errors import OllamaError
from finetune.system.files import read_json
from finetune.system.terminal import quiet

# Ollama reserves the memory of the whole context when it loads a model, and without a number takes 4,096 or what fits
# the GPU. The full context of a recent model (131,072 for Gemma 3) takes more memory than the model itself; users who
# have that memory set num_ctx.
_MAX_CONTEXT = 8192


def write_modelfile(model: Path, output: Path, file: str, add_bos: bool, system: str = "") -> None:
    """Writes `Modelfile` into the folder `output`, for a GGUF file in the same folder.

    Args:
        model: The whole model that the GGUF file was made from, with its tokenizer and chat template.
        output: An existing folder.
        file: The GGUF file's name, such as `model-Q4_K_M.gguf`.
        add_bos: `tokenizer.ggml.add_bos_token` of the GGUF file.
        system: The system text for conversations without one.

    Raises:
        OllamaError: The chat template cannot be written in Go's syntax, or a text cannot stand in a Modelfile; then no
            file is written.
        RunError: The tokenizer's configuration is damaged.
    """
    from transformers import AutoTokenizer

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(model)
    text = modelfile_text(
        tokenizer, file, add_bos, system, read_json(model / "config.json"), read_json(model / "generation_config.json")
    )
    (output / "Modelfile").write_text(text, encoding="utf-8", newline="\n")


def modelfile_text(
    tokenizer: Any,
    file: str,
    add_bos: bool,
    system: str = "",
    config: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
) -> str:
    """The text of a Modelfile.

    Args:
        tokenizer: The trained tokenizer, with its chat template.
        file: The GGUF file's name.
        add_bos: `tokenizer.ggml.add_bos_token` of the GGUF file.
        system: The system text for conversations without one.
        config: The model's config.json.
        generation: The model's generation_config.json.

    Raises:
        OllamaError: As `write_modelfile`.
    """
    if not tokenizer.chat_template:
        raise OllamaError("the model has no chat template; name one in model.chat_template when training")
    if Path(file).name != file or file != file.strip() or not file.isprintable() or set(file) & set('\\:"'):
        raise OllamaError(f"{file!r} cannot stand in a Modelfile; the file needs a plain name such as model.gguf")

    def render(messages: Any, add_generation_prompt: bool = False, **others: Any) -> str:
        made: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **others
        )
        return made

    scheme = learn_scheme(render, tokenizer.bos_token or "", add_bos)
    if _writes_the_date(render):
        raise OllamaError(
            "the chat template writes the day's date, which in a Modelfile would stay that of today; train with a "
            "template without one (model.chat_template)"
        )
    if system and scheme.place == "refused":
        raise OllamaError("there is a system text, and the chat template takes no system message")
    held = not system or _survives_quotes(system)
    lines = [
        f"FROM ./{file}",
        f"TEMPLATE {_quoted(go_template(scheme, '' if held else system))}",
        *([f"SYSTEM {_quoted(system)}"] if system and held else []),
        *(f"PARAMETER stop {_quoted(stop)}" for stop in _stops(tokenizer, scheme, generation or {})),
        *(f"PARAMETER {name} {value}" for name, value in _parameters(config or {}, generation or {}).items()),
    ]
    return "\n".join(lines) + "\n"


def _writes_the_date(render: Callable[..., str]) -> bool:
    """True if the template writes the date: without transformers' function for it, it fails or writes less."""
    hello = [{"role": "user", "content": "Hi"}]
    try:
        return render(hello) != render(hello, strftime_now="")
    except Exception:
        return True


def _survives_quotes(text: str) -> bool:
    """True for a text in three quotes that Ollama's reader returns unchanged."""
    return '"""' not in text and all(c.isprintable() or c in "\r\n\t" for c in text)


def _quoted(text: str) -> str:
    if not _survives_quotes(text):
        raise OllamaError(f"{text!r} cannot stand in a Modelfile, which has no way to write all of its characters")
    return f'"""{text}"""' if set(text) & set('"\r\n') else f'"{text}"'


def _stops(tokenizer: Any, scheme: Scheme, generation: dict[str, Any]) -> list[str]:
    """The stop texts: the first special token after an answer, and each EOS."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = special_spans(special, scheme.answer[1])
    stops = [scheme.answer[1][slice(*ends[0])]] if ends else []
    ids = generation.get("eos_token_id") or []
    stops += tokenizer.convert_ids_to_tokens([ids] if isinstance(ids, int) else ids)
    return list(dict.fromkeys(stop for stop in (*stops, tokenizer.eos_token) if stop))


def _parameters(config: dict[str, Any], generation: dict[str, Any]) -> dict[str, float]:
    """Parameters of Ollama: the context, and sampling as transformers would.

    With `do_sample`, absent values are transformers' defaults, where Ollama's would be 0.8, 40 and 0.9. Without it
    transformers decodes greedily, which is written here only where the file says false. Ollama penalises repetitions
    among the last 64 tokens, by 1.1 in most releases; transformers among all tokens, and only if the file says so.
    """
    found: dict[str, float] = {}
    longest = (config.get("text_config") or config).get("max_position_embeddings")
    if longest:
        found["num_ctx"] = min(longest, _MAX_CONTEXT)
    if generation.get("do_sample"):
        found |= {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if generation.get(name) is not None:
            found[name] = generation[name]
    if generation.get("do_sample") is False:
        found["temperature"] = 0
    found["repeat_penalty"] = generation.get("repetition_penalty") or 1.0
    if found["repeat_penalty"] != 1:
        found["repeat_last_n"] = -1
    return found
