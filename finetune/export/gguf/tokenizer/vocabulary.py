"""A trained tokenizer as GGUF metadata, with which llama.cpp makes the same tokens of a text, or a refusal by name.

`read_tokenizer` also returns what llama.cpp does otherwise and no metadata can change; `probe_texts` are texts to
compare both tokenizers on.

Source: llama.cpp b11549, src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from finetune.data.chat import Chat
from finetune.data.samples import sample_rows
from finetune.data.template_variables import with_values_forced
from finetune.export.gguf.tokenizer.merges import BYTE_TOKENS, SPACE, byte_fallback, byte_level, gemma4, is_gemma4
from finetune.export.gguf.tokenizer.source import (
    Difference,
    TokenizerFiles,
    contains_any,
    read_bpe,
    read_unique_json,
    shown_steps,
    trained_tokenizer,
)
from finetune.system.errors import ExportError, LabelError, TemplateError

_SHORT_CONVERSATION = (
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Good day"},
    {"role": "user", "content": "Hello again"},
)
# Token types of GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Tokens at which llama.cpp ends an answer because of their names.
_STOPS_BY_NAME = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜>"
    " [e~[ <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>"
    " <|file_sep|>"
)
# Tokens that llama.cpp takes for control tokens because of their names.
_CONTROL_BY_NAME = (
    "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|> <|fim_suffix|> "
    "<fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|> <|fim_middle|> <fim-middle> "
    "<fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>"
)


# Special tokens that llama.cpp's conversion of Gemma 4 makes visible in an answer, whose parser looks for them.
_SHOWN_BY_GEMMA4 = '<|channel> <channel|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> <|"|>'


class TokenizerMetadata(NamedTuple):
    """A trained tokenizer as GGUF metadata."""

    fields: dict[str, Any]
    """Text, flags, ids (uint32) and lists, by their keys. Lists are of strings (tokens, merges), floats (scores:
    float32) and ints (token_type, eos_token_ids: int32)."""
    differences: list[Difference]
    """Where llama.cpp's tokenizer will differ from the trained one; often empty."""

    @property
    def add_bos(self) -> bool:
        """True if llama.cpp puts a BOS before every prompt."""
        return bool(self.fields["tokenizer.ggml.add_bos_token"])


def probe_texts() -> list[str]:
    """200 texts on which two different tokenizers are likely to differ."""
    own = Path(__file__).with_name("texts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sample_rows().read_text(encoding="utf-8").splitlines()[: 200 - len(own)]
    talks = ["\n".join(message["content"] for message in json.loads(row)["messages"]) for row in rows]
    return [*(json.loads(text) for text in own), *talks]


def expected_ids(model: Path, metadata: dict[str, Any], texts: Iterable[str]) -> list[tuple[str, list[int]]]:
    """Pairs of a text for llama.cpp, with special tokens added and parsed, and the trained tokenizer's ids of it.

    With a chat template a text comes after BOS, as it does in a conversation; without one it stands alone.

    Args:
        model: The folder.
        metadata: The fields of `read_tokenizer`.
        texts: Such as `probe_texts`.

    Raises:
        ExportError: The tokenizer cannot be loaded.
    """
    tokenizer = trained_tokenizer(model)
    if tokenizer.chat_template is None:
        return [(text, tokenizer(text)["input_ids"]) for text in texts]
    bos = tokenizer.bos_token if metadata["tokenizer.ggml.add_bos_token"] else ""
    before = ""
    if metadata["tokenizer.ggml.model"] == "llama" and not metadata["tokenizer.ggml.add_space_prefix"]:
        # Some tokenizers insert a space at the start of a text. A conversation never starts with plain text, so the
        # text gets a prefix.
        before = "" if bos else tokenizer.eos_token
        first = tokenizer.tokenize(f"{tokenizer.eos_token}a", add_special_tokens=False)[1]
        before += " " if first.startswith(SPACE) else ""
    return [(before + text, tokenizer(bos + before + text, add_special_tokens=False)["input_ids"]) for text in texts]


def read_tokenizer(model: Path) -> TokenizerMetadata:
    """The tokenizer of a model as GGUF metadata.

    Args:
        model: A folder as transformers saves it.

    Raises:
        ExportError: A part is missing or damaged, or llama.cpp has nothing like it.
    """
    file = model / "tokenizer.json"
    vocab, merges = read_bpe(file)
    tokenizer = trained_tokenizer(model)
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    source = TokenizerFiles(file, tokenizer, merges, dict(tokenizer.get_vocab()), added)
    if any(source.ids.get(token) != i for token, i in vocab.items()):
        raise source.refuse(f"{type(tokenizer).__name__} gives its tokens other ids than the file; save it anew")
    _check_bpe_model(source)
    metadata, used = _special_tokens(source, model)
    rows = _embedding_rows(source, model, used)
    for key in ("unknown", "padding"):
        if metadata.get(f"tokenizer.ggml.{key}_token_id", 0) >= rows:
            del metadata[f"tokenizer.ggml.{key}_token_id"]
    by_bytes = bool(tokenizer.backend_tokenizer.model.byte_fallback)
    types = [UNUSED] * rows
    unknown = tokenizer.unk_token
    for token, i in source.ids.items():
        types[i] = CONTROL if i in used else UNKNOWN if token == unknown else _token_type(source, token, by_bytes)
    config = read_unique_json(model / "config.json")
    bos_first = source.opening.startswith(tokenizer.bos_token or "\0") or metadata["tokenizer.ggml.add_bos_token"]
    if by_bytes and is_gemma4(source, str(config.get("model_type")), bos_first):
        if not metadata["tokenizer.ggml.add_bos_token"]:
            source.differs("a text alone begins with BOS, as texts in a conversation do")
        metadata |= gemma4(source, rows)
        types[source.ids[unknown]] = CONTROL
        for token in _SHOWN_BY_GEMMA4.split():
            if token in source.ids:
                types[source.ids[token]] = USER_DEFINED
    else:
        metadata |= byte_fallback(source, rows) if by_bytes else byte_level(source)
    metadata |= {"tokenizer.ggml.tokens": _token_texts(source, types), "tokenizer.ggml.token_type": types}
    _special_by_name(source, used)
    return TokenizerMetadata(metadata, source.differences)


def _check_bpe_model(source: TokenizerFiles) -> None:
    model = source.tokenizer.backend_tokenizer.model
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if value := getattr(model, name):
            raise source.refuse(f"its model has {name} {value!r}, which llama.cpp lacks")
    for token, item in source.added.items():
        flags = [name for name in ("lstrip", "rstrip", "single_word") if getattr(item, name)]
        if flags:
            source.differs(
                f"{token} is {' and '.join(flags)}: llama.cpp leaves blanks where they are", contains_any(token)
            )


def _embedding_rows(source: TokenizerFiles, model: Path, used: set[int]) -> int:
    """The number of rows of the embedding; unused tokens beyond it, which no model can read, leave `source`."""
    config = read_unique_json(model / "config.json")
    rows = (config.get("text_config") or config).get("vocab_size")
    if not isinstance(rows, int):
        raise ExportError(f"{model / 'config.json'}: it has no vocab_size")
    template = json.dumps(source.tokenizer.chat_template, ensure_ascii=False)
    beyond = {token: i for token, i in source.ids.items() if i >= rows}
    for token, i in sorted(beyond.items(), key=lambda item: item[1]):
        if token not in source.added or i in used or token in template:
            raise source.refuse(
                f"{token!r} has the id {i}, and the model's embedding has {rows} rows (config.json: vocab_size)"
            )
        del source.ids[token], source.added[token]
    if beyond:
        names = ", ".join(sorted(beyond))
        source.differs(f"left out, as the embedding has no row for it: {names}", contains_any(*beyond))
    return rows


def _special_tokens(source: TokenizerFiles, model: Path) -> tuple[dict[str, Any], set[int]]:
    """The metadata on special tokens and the chat template, and the ids of all tokens that it names."""
    tokenizer, key = source.tokenizer, "tokenizer.ggml."
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None:
        raise source.refuse("it has no eos_token, and llama.cpp would take some token for it")
    before, after = _added_around(source)
    for name, added, wanted in (("bos", before, bos), ("eos", after, eos)):
        if added not in ([], [wanted]):
            raise source.refuse(f"its post_processor adds {added} where llama.cpp adds {name}_token alone ({wanted})")
    metadata: dict[str, Any] = {key + "add_bos_token": bool(before), key + "add_eos_token": bool(after)}
    stops = _stop_ids(model)
    turn = None
    if tokenizer.chat_template is not None:
        turn = _end_of_turn(source)
        metadata |= _chat_templates(source)
        # llama.cpp adds them to conversations too, which are trained as the template writes them.
        metadata[key + "add_bos_token"] = bool(before) and source.opening.startswith(tokenizer.bos_token)
        metadata[key + "add_eos_token"] = False
        if bool(before) != metadata[key + "add_bos_token"] or after:
            source.differs("a text alone gets no BOS or EOS, so that conversations are what the template writes")
    others = [i for i in dict.fromkeys([turn, *stops]) if i not in (None, eos)]
    # Without a BOS of its own, llama.cpp would name one by a number that means nothing here.
    metadata |= {key + "bos_token_id": eos if bos is None else bos, key + "eos_token_id": eos}
    metadata |= dict(zip((key + "eot_token_id", key + "eom_token_id"), others or [eos], strict=False))
    if others:
        metadata[key + "eos_token_ids"] = [eos, *others]  # Ollama reads these
    for name, i in (("unknown", tokenizer.unk_token_id), ("padding", tokenizer.pad_token_id)):
        if i is not None:
            metadata[f"{key}{name}_token_id"] = i
    used = {eos, *others, *before, *after} | ({bos} - {None})
    names = {i: token for token, i in source.ids.items()}
    for i in used:
        if i not in names:
            raise source.refuse(f"generation_config.json: eos_token_id {i} is no token")
    late = [names[i] for i in others[2:] if names[i] not in _STOPS_BY_NAME.split()]
    if late:
        source.differs(f"llama.cpp does not stop at {', '.join(late)}: it knows three stop tokens")
    return metadata, used


def _added_around(source: TokenizerFiles) -> tuple[list[int], list[int]]:
    """The ids that the post-processor adds before and after a text."""
    steps = [step for step in source.parts("post_processor") if step["type"] != "ByteLevel"]
    if not steps:
        return [], []
    if len(steps) > 1 or steps[0]["type"] != "TemplateProcessing":
        raise source.refuse(f"its post_processor is {shown_steps(steps)}; llama.cpp knows TemplateProcessing alone")
    around: tuple[list[int], list[int]] = ([], [])
    behind = False
    for piece in steps[0]["single"]:
        if "Sequence" in piece:
            behind = True
        else:
            around[behind].extend(steps[0]["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    return around


def _stop_ids(model: Path) -> list[int]:
    """The ids that end an answer: of generation_config.json, or config.json where there is none."""
    file = model / "generation_config.json"
    stops = read_unique_json(file if file.is_file() else model / "config.json").get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if not all(isinstance(i, int) for i in stops):
        raise ExportError(f"{file}: eos_token_id {stops} are no ids")
    return stops


def _end_of_turn(source: TokenizerFiles) -> int | None:
    """The id of the token that ends a turn, or None; sets `source.opening`."""
    chat = Chat(source.tokenizer)
    try:
        source.opening = chat.render(_SHORT_CONVERSATION, add_generation_prompt=True)
        turn = source.tokenizer.convert_ids_to_tokens(chat.end_of_turn_id)
    except (LabelError, TemplateError) as error:
        if not source.opening:
            raise source.refuse(str(error)) from error
        # A turn may end with a token on which no run of ours trains: one that is not special, or is BOS as well.
        behind = source.opening.partition(_SHORT_CONVERSATION[1]["content"])[2]
        turn = max((token for token in source.added if behind.startswith(token)), key=len, default=None)
        if turn is None:
            source.differs(f"where a turn ends cannot be told: {error}")
    # A turn that ends with some text, a line break say, ends where eos_token comes.
    return source.ids[turn] if turn in source.added else None


def _chat_templates(source: TokenizerFiles) -> dict[str, Any]:
    templates = source.tokenizer.chat_template
    named = templates if isinstance(templates, dict) else {"default": templates}
    if "default" not in named:
        raise source.refuse(f"its chat templates are {', '.join(named)}; one must be named default")
    # llama.cpp's server sets this variable in every request, to true where a template can think (xllamacpp 2026.10).
    named = {name: with_values_forced(text, ["enable_thinking"]) for name, text in named.items()}
    if source.tokenizer.bos_token is None:
        # llama.cpp gives templates the text of what it holds for BOS, where transformers gives them nothing.
        named = {
            name: f"{{%- set bos_token = '' -%}}{{{{ '' }}}}{text}" if "bos_token" in text else text
            for name, text in named.items()
        }
    written = {
        "tokenizer.chat_template" + (f".{name}" if name != "default" else ""): text for name, text in named.items()
    }
    if len(named) > 1:
        written["tokenizer.chat_templates"] = [name for name in named if name != "default"]
    return written


def _special_by_name(source: TokenizerFiles, used: set[int]) -> None:
    """Notes tokens that llama.cpp treats otherwise because of their names."""
    stops = [token for token in _STOPS_BY_NAME.split() if token in source.ids and source.ids[token] not in used]
    if stops:
        source.differs(f"llama.cpp ends an answer at {', '.join(stops)} too, because of the name")
    plain = [t for t in f"{_STOPS_BY_NAME} {_CONTROL_BY_NAME}".split() if t in source.ids and t not in source.added]
    if plain:
        source.differs(f"llama.cpp takes {', '.join(plain)} for special, because of the name", contains_any(*plain))


def _token_type(source: TokenizerFiles, token: str, by_bytes: bool) -> int:
    """The GGUF type of a token that neither begins nor ends a text."""
    item = source.added.get(token)
    if by_bytes and token in BYTE_TOKENS:
        return BYTE
    # llama.cpp writes a token of the user's as it stands, and a space that is spelt otherwise in no other.
    if item is None or (by_bytes and SPACE in token):
        return NORMAL
    return CONTROL if item.special else USER_DEFINED


def _token_texts(source: TokenizerFiles, types: list[int]) -> list[str]:
    """The texts of the tokens by their ids; rows without a token get a text that no input can be tokenized to."""
    names = {i: token for token, i in source.ids.items()}
    found = []
    for i, kind in enumerate(types):
        token = names.get(i, "")
        if "\0" in token:
            # llama.cpp reads a name up to its first zero.
            source.differs(f"{token!r} cannot be written", contains_any("\0"))
            types[i] = kind = UNUSED
        if kind == UNUSED:
            token = f"[PAD{i}]"
            while token in source.ids or any(
                token[:at] in source.ids and token[at:] in source.ids for at in range(1, len(token))
            ):
                token = f"[{token}]"
        found.append(token)
    return found
