"""Every shipped recipe: what it says of itself, and what it does on a tiny model, from training to merging."""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from peft import PeftModel
from test_referee import GEMMA4, OURS
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import finetune.export.transformers
import finetune.merge.run
import finetune.train.run
from finetune.cli.commands import main
from finetune.data.chat import Chat
from finetune.data.encoded import IGNORE
from finetune.data.template import load_template
from finetune.model.compatibility import all_linear_targets, exclude_modules, non_text_modules
from finetune.model.load import load_tokenizer
from finetune.model.locate import locate
from finetune.plan.configs import base_config
from finetune.recipe.load import Recipe, load_recipe
from finetune.recipe.schema import ModelSection
from finetune.system.terminal import quiet

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
by_name = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
PROMPT = torch.arange(10, 47)[None]

Options = dict[str, Any]


@contextmanager
def unwarned() -> Iterator[None]:
    """PEFT warns of tied embeddings and of what it sets by itself; none of it is ours."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        yield


def talk(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=PROMPT).logits.float()


def load(folder: str | Path) -> Any:
    with unwarned():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


# ---------------------------------------------------------------------------------------------------------------
# What a recipe says of itself


def head(path: Path) -> str:
    """The comment before the first key, one blank between two words."""
    lines = path.read_text(encoding="utf-8").splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(" ".join(line.lstrip("#") for line in lines[:count]).split())


@by_name
def test_the_head_says_hardware_memory_and_launch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text, recipe = head(path), load_recipe(path)
    parts = re.fullmatch(r".+ Needs: (.+) Launch: (.+?)( Memory: .+)? Expect: .+", text)
    assert parts, text
    needs, launch, memory = parts.groups()
    assert f"recipes/{path.name}" in launch
    if recipe.model.name_or_path != "random:gemma3":
        assert re.search(r"\d GB", needs)
    if memory and "GPU" in needs.split(";")[0].split(",")[0]:
        assert "computed and not measured" in memory
    # Whoever has to accept a licence is told where.
    if recipe.model.name_or_path.startswith(("google/", "meta-llama/")):
        assert f"https://huggingface.co/{recipe.model.name_or_path} and `hf auth login`" in needs
    # What it offers to write on the command line is lawful.
    offered = re.findall(r"\b(?:model|quantization|lora|data|training)\.\w+=\S+", text)
    # A run to go on from is not in the repository.
    load_recipe(path, [each.rstrip(".;,") for each in offered if not each.startswith("model.adapter=")])


MODELS: dict[str, tuple[str, Options]] = {
    "google/gemma-1.1-7b-it": ("gemma", {}),
    "google/gemma-2b": (
        "gemma",
        {"hidden_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1}
        | {"intermediate_size": 16384},
    ),
    "google/gemma-2-2b": (
        "gemma2",
        {"hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "intermediate_size": 9216},
    ),
    "google/gemma-2-9b-it": (
        "gemma2",
        {"hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8}
        | {"intermediate_size": 14336},
    ),
    "google/gemma-3-4b-pt": (
        "gemma3",
        {
            "text_config": {"hidden_size": 2560, "num_hidden_layers": 34, "intermediate_size": 10240}
            | {"vocab_size": 262_208},
            "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16}
            | {"intermediate_size": 4304, "image_size": 896, "patch_size": 14},
        },
    ),
    "meta-llama/Llama-3.1-8B": (
        "llama",
        {"hidden_size": 4096, "num_hidden_layers": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
        | {"vocab_size": 128_256},
    ),
    "Qwen/Qwen3-4B-Base": (
        "qwen3",
        {"hidden_size": 2560, "num_hidden_layers": 36, "num_key_value_heads": 8, "intermediate_size": 9728}
        | {"vocab_size": 151_936, "tie_word_embeddings": True},
    ),
}
COMPUTED = [path for path in RECIPES if " 10 A " in head(path)]


@pytest.mark.parametrize("path", COMPUTED, ids=lambda path: path.stem)
def test_the_memory_is_computed_from_the_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text, recipe = head(path), load_recipe(path)
    name = recipe.model.name_or_path
    kind, shape = MODELS.get(name, ("", {}))
    with torch.device("meta"):
        config = AutoConfig.for_model(kind, **shape) if kind else base_config(recipe.model)
        model = AutoModelForCausalLM.from_config(config)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    excluded = exclude_modules(non_text_modules(model), None) or "none"
    adapted = all_linear_targets(model).modules
    p = sum(parameter.numel() for parameter in model.parameters())
    q = sum(m.weight.numel() for m in linear.values())
    a = (recipe.lora or {})["r"] * sum(
        m.in_features + m.out_features
        for n, m in linear.items()
        if not re.fullmatch(excluded, n) and {n, n.rpartition(".")[2]} & {*adapted}
    )
    assert f"for P = {p / 1e9:.2f}e9 parameters" in text
    assert f"(A = {a / 1e6:.0f}e6), gradients, 8-bit moments {10 * a / 1e9:.1f} GB" in text
    if recipe.quantization:
        assert f"Q = {q / 1e9:.2f}e9 of them in 4 bit" in text
        assert re.search(rf"Q / 2 \+ Q / 63 \+ 2 \(P - Q\) [^0-9]+ {(q / 2 + q / 63 + 2 * (p - q)) / 1e9:.1f} GB", text)
    else:
        assert f" 2 P the base, in bfloat16 {2 * p / 1e9:.1f} GB" in text
    # What is added up fits into the card, with a fifth of it left.
    base, adapter, activations = (float(n) for n in re.findall(r" ([\d.]+) GB", text.split(" P = ")[1])[:3])
    (total,) = re.findall(r"about (\d+) GB with the CUDA context", text)
    assert 0.5 <= int(total) - base - adapter - activations <= 2
    assert int(total) <= 0.8 * int(re.search(r"one GPU with (\d+)", text)[1])  # type: ignore[index]
    tokens = recipe.training["per_device_train_batch_size"] * recipe.training["max_length"]
    assert f"activations of {tokens:,} tokens: {model.config.get_text_config().num_hidden_layers} layers'" in text


def test_the_table_names_every_recipe_with_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8").partition("<!-- benchmarks/")[0]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert {cells[0].strip("`"): cells[1] for cells in rows} == {
        path.name: load_recipe(path).model.name_or_path for path in RECIPES
    }
    for cells in rows:
        recipe = load_recipe(f"recipes/{cells[0].strip('`')}")
        assert [s.path for s in recipe.data.train if s.path.split("/")[-1] not in cells[2]] == []


# ---------------------------------------------------------------------------------------------------------------
# Templates

SYSTEM = {
    "behind BOS": ({"chat_template": "gemma2_system"}, "<bos>Be kind.\n"),
    "a turn": ({"system_role": "turn"}, "<bos><start_of_turn>system\nBe kind.<end_of_turn>\n"),
}
CONVERSATIONS = {
    "one": ("Hi", "Hello!"),
    "three": ("a", "b", "c\n\nd", "e", "f", "g"),
    "japanese": ("東京の天気は？", "晴れです。", "明日は？", "雨でしょう。"),
    "spaces": ("  two before", " one before", "behind  ", "behind \n "),
    "alike": ("Hi there", "Hi", "system", "model"),
}


@cache
def chat_of(**model: str) -> Chat:
    return Chat(load_tokenizer(ModelSection(name_or_path="random:gemma2", **model)))  # type: ignore[arg-type]


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("texts", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("role", SYSTEM)
def test_a_system_text_stands_once_and_nothing_else_moves(role: str, texts: tuple[str, ...], generation: bool) -> None:
    model, written = SYSTEM[role]
    chat, texts = chat_of(**model), texts[:-1] if generation else texts
    plain = chat_of(chat_template="gemma").render(talk(*texts), generation)
    assert chat.render(talk(*texts), generation) == plain
    assert chat.render(talk(*texts, system=" Be kind. "), generation) == written + plain.removeprefix("<bos>")
    if generation:
        return
    for system in (None, "Be kind."):
        messages = talk(*texts, system=system)
        row = chat.encode(messages, "assistant")
        ids, tokenizer = row.input_ids.tolist(), chat.tokenizer
        assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert ids.count(tokenizer.bos_token_id) == 1
        trained = [tokenizer.decode(ids[turn.start : turn.end]) for turn in row.turns]
        assert trained == [text.strip() + "<end_of_turn>" for text in texts[1::2]]
        assert (row.labels != IGNORE).sum() == sum(turn.end - turn.start for turn in row.turns)
        for turn in row.turns:
            fed = tokenizer.apply_chat_template(
                messages[: turn.message], tokenize=True, add_generation_prompt=True, return_dict=False
            )
            assert ids[: turn.start] == fed


def test_a_system_message_elsewhere_is_refused_and_an_empty_one_leaves_no_trace() -> None:
    chat = chat_of(chat_template="gemma2_system")
    assert chat.render(talk("Hi", "Yo", system=" ")) == chat.render(talk("Hi", "Yo"))
    with pytest.raises(ValueError, match="after the system message; turn 3 is system"):
        chat.render([*talk("Hi", "Yo"), {"role": "system", "content": "Be brief."}])


def test_llama3_is_the_official_template() -> None:
    import trl

    official = Path(trl.__file__).parent / "chat_templates" / "llama3.jinja"
    tokenizer = load_tokenizer(ModelSection(name_or_path="random:llama"))
    for texts in CONVERSATIONS.values():
        for messages in (talk(*texts), talk(*texts, system=" Be kind. ")):
            for generation in (False, True):
                ours, theirs = (
                    tokenizer.apply_chat_template(
                        messages, tokenize=False, add_generation_prompt=generation, chat_template=template
                    )
                    for template in (load_template("llama3"), official.read_text(encoding="utf-8"))
                )
                assert ours == theirs


# ---------------------------------------------------------------------------------------------------------------
# Sample rows


def test_the_japanese_rows_are_sound_and_no_prompt_is_among_them() -> None:
    import hashlib

    lines = (ROOT / "data" / "japanese_sample.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) >= 200
    texts = [[m["content"] for m in row["messages"]] for row in rows]
    assert [row["messages"] for row in rows] == [talk(*said) for said in texts]
    assert {len(said) for said in texts} == {2, 4}
    assert all(text == text.strip() and text for said in texts for text in said)
    assert [row["prompt"] for row in rows] == [said[0] for said in texts]
    assert [row["prompt_id"] for row in rows] == [hashlib.sha256(s[0].encode()).hexdigest() for s in texts]
    asked = [json.loads(line) for line in (ROOT / "data" / "japanese_prompts.jsonl").read_text("utf-8").splitlines()]
    assert {tuple(prompt) for prompt in asked} == {("prompt",)}
    prompts = [prompt["prompt"] for prompt in asked]
    firsts = [said[0] for said in texts]
    assert (len(prompts), len({*prompts, *firsts})) == (40, 40 + len(rows))


def test_the_tool_rows_call_declared_functions_with_valid_arguments() -> None:
    lines = (ROOT / "data" / "tools_sample.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) >= 40
    counts = {0: 0, 1: 0, 2: 0}
    for row in rows:
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row["tools"]}
        developer, *talking = row["messages"]
        assert developer == {"role": "developer", "content": rows[0]["messages"][0]["content"]}
        assert (talking[0]["role"], talking[-1]["role"], "tool_calls" in talking[-1]) == ("user", "assistant", False)
        most = 0
        for i, message in enumerate(talking):
            calls = [call["function"] for call in message.get("tool_calls", ())]
            assert [m.get("name") for m in talking[i + 1 : i + 1 + len(calls)]] == [call["name"] for call in calls]
            assert bool(message["content"]) is not bool(calls)
            most = max(most, len(calls))
            for call in calls:
                schema, given = schemas[call["name"]], call["arguments"]
                assert set(schema["required"]) <= given.keys() <= schema["properties"].keys()
                for key, value in given.items():
                    kind = JSON_TYPES[schema["properties"][key]["type"]]
                    assert isinstance(value, kind)
                    assert value in schema["properties"][key].get("enum", [value])
        counts[most] += 1
    assert min(counts.values()) >= 5
    assert len({json.dumps(row["messages"]) for row in rows}) == len(rows)


# ---------------------------------------------------------------------------------------------------------------
# On tiny models

JSON_TYPES: dict[str, Any] = {"string": str, "boolean": bool, "array": list, "integer": int, "number": (int, float)}

ROWS: dict[str, list[Options]] = {
    "HuggingFaceH4/ultrachat_200k": [],  # the sample rows have its schema
    "HuggingFaceTB/smoltalk": [
        {"messages": talk(f"Question {i}", "Yes.", "Sure?", "Quite.", system="Be brief." if i % 2 else None)}
        for i in range(8)
    ],
    # Of preferences: the prompt as text beside whole conversations, as texts, and rated answers as messages.
    "HuggingFaceH4/ultrafeedback_binarized": [
        {"prompt": f"Count to {i}.", "prompt_id": str(i), "score_chosen": 8.0, "score_rejected": 2.0}
        | {"chosen": talk(f"Count to {i}.", f"1 to {i}."), "rejected": talk(f"Count to {i}.", "No, I would not.")}
        for i in range(8)
    ],
    "Aratako/magpie-sft-v1.0-dpo-judged": [
        {"id": i, "prompt": f"{i}は何？", "chosen": f"数の{i}です。", "rejected": "分かりません。", "judge": "[[A]]"}
        for i in range(8)
    ],
    "trl-lib/kto-mix-14k": [
        {"prompt": [{"role": "user", "content": f"Count to {i}."}], "label": i % 4 < 2}
        | {"completion": [{"role": "assistant", "content": f"1 to {i}." if i % 4 < 2 else "No."}]}
        for i in range(16)
    ],
    "kunishou/databricks-dolly-15k-ja": [
        {"index": str(i), "category": "open_qa", "instruction": f"{i}は何？", "input": "", "output": f"数の{i}。"}
        for i in range(8)
    ]
    + [{"index": "8", "category": "closed_qa", "instruction": "空とは？", "input": "空は青い。", "output": ""}],
    "kunishou/oasst1-chat-44k-ja": [
        {"conversations": [{"from": "human", "value": f"やあ{i}"}, {"from": "gpt", "value": "こんにちは。"}]}
        for i in range(20)
    ],
    "Abirate/english_quotes": [
        {"quote": f"“{{quote}} number {i}.”", "author": f"Author {i}", "tags": ["a", "b"]} for i in range(8)
    ],
}
# Of those above that are kept to train on. Of the quotes a quarter is held out; of the Japanese rows, too, of which one
# is bad, and of the conversations that are left about a third is drawn.
KEPT = {"english_quotes_colab": 6, "japanese_sft": 11, "gemma4_e2b_japanese": 11, "functiongemma_tools": 38}


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A tiny model with the architecture, and where it matters the tokens, of the one that a recipe names."""
    root = tmp_path_factory.mktemp("bases")

    def find(name: str) -> str:
        for architecture in ("gemma2", "gemma3", "gemma"):
            if re.match(rf"(google/|package:|random:){architecture[:5]}[-_]?{architecture[5:]}", name):
                break
        if "gemma" in name and not re.match(r"google/(gemma-3-4b|gemma-4|functiongemma)", name):
            return f"random:{architecture}"
        folder = root / name.replace("/", "-")
        if not folder.exists():
            make(name, folder)
        return str(folder)

    return find


def make(name: str, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(locate("random:llama"))
    text = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]} | TINY
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    if name.startswith(("google/gemma-4", "google/functiongemma")):
        is_gemma4 = name.startswith("google/gemma-4")
        tokens = GEMMA4 if is_gemma4 else OURS["functiongemma"].special
        tokenizer.add_special_tokens({"additional_special_tokens": tokens.split()})
        text |= {"vocab_size": len(tokenizer)}
        config = gemma4_config(name, text, vision) if is_gemma4 else AutoConfig.for_model("gemma3_text", **text)
    elif name.startswith("google/gemma-3-4b"):
        vision |= {"image_size": 28, "patch_size": 14}
        tokens = {"boi_token_index": 8, "eoi_token_index": 9, "image_token_index": 10, "mm_tokens_per_image": 4}
        config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, **tokens)
    elif name.startswith("Qwen/"):
        config = AutoConfig.for_model("qwen3", **TINY, tie_word_embeddings=True)
        tokenizer.bos_token = None
    else:
        # Its turn tokens are there and were never learned.
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]}
        )
        config = AutoConfig.for_model("llama", **TINY | {"vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if name.startswith("meta-llama/"):
        for end in (model.get_input_embeddings(), model.get_output_embeddings()):
            end.weight.data[TINY["vocab_size"] :] *= 1e-3
    tokenizer.chat_template = None
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def gemma4_config(name: str, text: Options, vision: Options) -> Any:
    """A tiny config of the kind of model in the Gemma 4 family that a recipe names."""
    text |= {"final_logit_softcapping": 30.0, "global_head_dim": 32}
    if "12B" in name:
        text |= {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
        vision = {"mm_embed_dim": 64, "output_proj_dims": 64}
        return AutoConfig.for_model("gemma4_unified", text_config=text, vision_config=vision)
    vision |= {"num_key_value_heads": 2, "head_dim": 16}
    if "E2B" in name:
        text |= {"num_hidden_layers": 4, "layer_types": text["layer_types"] * 2, "num_kv_shared_layers": 2}
        text |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": text["vocab_size"]}
        text |= {"use_double_wide_mlp": True}
        audio = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 32}
        return AutoConfig.for_model("gemma4", text_config=text, vision_config=vision, audio_config=audio)
    text |= {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
    if "A4B" in name:
        text |= {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    return AutoConfig.for_model("gemma4", text_config=text, vision_config=vision)


TINY: Options = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def shrunk(recipe: Recipe, base: str, folder: Path) -> list[str]:
    """The overrides to try a recipe on a tiny model, a CPU and rows of the same schema."""
    values: Options = {
        "model.name_or_path": base,
        "model.dtype": "float32",
        "training.output_dir": str(folder / "run"),
        "training.max_steps": 2,
        "training.max_length": 1024 if "functiongemma" in recipe.model.name_or_path else 128,
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 1,
        "training.learning_rate": 0.01,
        "training.warmup_steps": 0,
        "training.optim": "adamw_torch",  # those in 8 bit need a GPU
    }
    if recipe.training.get("bf16"):
        values["training.bf16"] = False
    for key in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
        if key in (recipe.quantization or {}):
            values[f"quantization.{key}"] = "float32"
    if recipe.data.eval_fraction:
        values["data.eval_fraction"] = 0.25
    for kind, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for i, source in enumerate(sources):
            if source.path.endswith(".jsonl"):
                continue
            rows = ROWS[source.path] or [
                json.loads(line) for line in (ROOT / "data" / "chat_sample.jsonl").open(encoding="utf-8")
            ]
            file = folder / f"{kind}{i}.jsonl"
            half = rows if kind == "train" and not recipe.data.eval else rows[kind == "train" :: 2]
            file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in half), encoding="utf-8")
            key = f"data.{kind}.{i}"
            values |= {f"{key}.path": str(file), f"{key}.config": None, f"{key}.split": "train"}
            if source.samples:
                values[f"{key}.samples"] = 6
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Options:
    """The logits of the trained model as it was in memory when training ended, and whether it was quantised."""
    found: Options = {}
    finish = finetune.train.run._save_finished_run

    def look(trainer: Any, output: Path, say: Any) -> None:
        found["logits"] = logits(trainer.model)
        found["quantised"] = bool(getattr(trainer.model, "is_loaded_in_4bit", False))
        finish(trainer, output, say)

    monkeypatch.setattr(finetune.train.run, "_save_finished_run", look)
    return found


# One recipe of each kind (quantised, tools, a model of images, full, another family, preferences); all in tier `soak`.
TIERS: dict[str, Any] = dict.fromkeys(("english_quotes_colab", "functiongemma_tools", "systemgemma2_9b"), ())
SLOW = ("cpu_smoke", "dpo_gemma3_270m", "gemma4_e2b_japanese", "gemma4_e2b_qlora", "japanese_sft", "llama3_8b_qlora")
TIERS |= dict.fromkeys(SLOW, pytest.mark.slow)


@pytest.mark.usefixtures("short_samples")
@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=TIERS.get(p.stem, pytest.mark.soak), id=p.stem) for p in RECIPES]
)
@pytest.mark.slow
def test_a_tiny_model_goes_through_training_and_merging(
    path: Path,
    base_of: Callable[[str], str],
    seen: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(path)
    base = base_of(recipe.model.name_or_path)
    overrides = shrunk(recipe, base, tmp_path)
    if path.stem == "gemma_1.1_7b_it_qlora":
        assert recipe.model.chat_template is None  # the tiny model has one of its own, too
    assert main(["train", str(path), *overrides]) == 0, capsys.readouterr().err
    run, lora = tmp_path / "run", recipe.lora

    ledger = json.loads((run / "ledger.json").read_text())
    assert ledger["train"]["trained_tokens"] > 0
    assert ledger["train"]["end_of_turns_trained"] == ledger["train"]["turns_trained"] > 0
    if path.stem in KEPT:
        assert ledger["train"]["rows"]["kept"] == KEPT[path.stem]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (recipe.data.eval or recipe.data.eval_fraction) is not None
    assert records[-1]["step"] == 2
    assert any("eval_loss" in record for record in records)
    assert seen["quantised"] is (recipe.quantization is not None)

    merged = run
    if lora is not None:
        saved = json.loads((run / "adapter_config.json").read_text())
        keys = [key for key in lora if key not in ("target_modules", "trainable_token_indices")]
        assert {key: saved[key] for key in keys} == {key: lora[key] for key in keys}
        assert not [name for name in saved["target_modules"] if "vision" in name]
        merged = tmp_path / "merged"
        assert main(["merge", str(run), "--output", str(merged)]) == 0, capsys.readouterr().err
    found = logits(load(merged))
    untouched = logits(load(locate(base)))
    if recipe.quantization is not None:
        # It was trained on a base in 4 bit and is merged into the one that is not.
        with unwarned():
            adapted = PeftModel.from_pretrained(load(locate(base)), run)
        assert apart(found, seen["logits"]) > 1e-3
        seen["logits"] = logits(adapted)
    assert apart(found, seen["logits"]) < 1e-4
    assert apart(found, untouched) > 1e-2
    own = AutoTokenizer.from_pretrained(merged)
    template = recipe.model.chat_template
    wanted = load_template(template) if template else AutoTokenizer.from_pretrained(locate(base)).chat_template
    assert own.chat_template == wanted
    if path.stem == "llama3_8b_qlora":
        indices = json.loads((run / "adapter_config.json").read_text())["trainable_token_indices"]
        new = own.convert_tokens_to_ids(["<|end_header_id|>", "<|eot_id|>", "<|start_header_id|>"])
        assert {end: sorted(rows) for end, rows in indices.items()} == {
            "embed_tokens": sorted(new),
            "lm_head": sorted(new),
        }
    if path.stem == "english_quotes_colab":
        capsys.readouterr()
        assert main(["inspect", str(path), "--json", "--rows", "1", *overrides]) == 0
        row = json.loads(capsys.readouterr().out.splitlines()[0])
        said = re.search(r"user\nWho wrote: “\{quote\} number (\d)\.”<end", own.decode(row["input_ids"]))
        assert said
        trained = [label for label in row["labels"] if label != IGNORE]
        assert own.decode(trained) == f"Author {said[1]}<end_of_turn>"
    if path.stem == "functiongemma_tools":
        capsys.readouterr()
        assert main(["inspect", str(path), "--json", "--rows", "50", *overrides]) == 0
        answer = "response:.*?<end_function_response>"
        for line in capsys.readouterr().out.splitlines()[: KEPT[path.stem]]:
            row = json.loads(line)
            turns = re.findall("<start_of_turn>model\n(.*?<end_of_turn>)", own.decode(row["input_ids"]), re.DOTALL)
            # All of them but the tools' answers: of the first that follows a call only its token, which ends the call.
            wanted = re.sub(
                f"(<start_function_response>){answer}(<start_function_response>{answer})*", r"\1", "".join(turns)
            )
            assert own.decode([label for label in row["labels"] if label != IGNORE]) == wanted
    if re.match("gemma(3_4b_qlora|4|3_qat)", path.stem):
        from safetensors import safe_open

        with safe_open(run / "adapter_model.safetensors", "pt") as file:
            names = list(file.keys())
        assert names
        assert [name for name in names if re.search("vision|audio|projector|per_layer|router|experts", name)] == []


@pytest.mark.slow
def test_a_model_of_images_has_one_loss_however_its_batch_is_accumulated(
    base_of: Callable[[str], str], write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its class says that it takes no count of the tokens of a batch."""
    base = base_of("google/gemma-4-E2B")
    assert AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).accepts_loss_kwargs is False
    path = write_recipe(model={"name_or_path": base, "chat_template": "gemma4"}, training={"max_steps": 1})
    losses = []
    for rows, batches in ((4, 1), (1, 4)):
        batch = f"training.per_device_train_batch_size={rows} training.gradient_accumulation_steps={batches}".split()
        assert main(["train", str(path), *batch, f"training.output_dir=run{rows}"]) == 0, capsys.readouterr().err
        records = [json.loads(line) for line in Path(f"run{rows}/metrics.jsonl").read_text().splitlines()]
        losses.append([record["loss"] for record in records if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], abs=5e-6)


@pytest.mark.usefixtures("short_samples")
@pytest.mark.parametrize(
    "role", [pytest.param("a turn", marks=pytest.mark.slow), pytest.param("behind BOS", marks=pytest.mark.soak)]
)
def test_the_template_travels_to_the_export(
    role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the recipe to the run, the merged model and an export, which any program loads without us."""
    monkeypatch.chdir(ROOT)
    path, written = ROOT / "recipes" / "systemgemma2_9b.yaml", SYSTEM[role][1]
    # As the recipe says how to write it.
    chosen = ["model.chat_template=gemma", "model.system_role=turn"] if role == "a turn" else []
    assert " ".join(chosen) in head(path)
    overrides = [*shrunk(load_recipe(path), "random:gemma2", tmp_path), *chosen]
    assert main(["train", str(path), *overrides]) == 0, capsys.readouterr().err
    assert main(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged")]) == 0
    arguments = ["--format", "bf16", "--output", str(tmp_path / "exports")]
    assert main(["export", str(tmp_path / "run"), *arguments]) == 0, capsys.readouterr().err
    wanted = "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    for folder in ("run", "merged", "exports/bf16"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        for system, text in ((None, wanted), ("Be kind.", written + wanted.removeprefix("<bos>"))):
            messages = talk("Hi", system=system)
            found = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert found == text, folder
    # Whoever generates with it feeds just that.
    capsys.readouterr()
    asked = ["--system", "Be kind.", "--prompt", "Hi", "--max-new-tokens", "2"]
    assert main(["generate", str(tmp_path / "merged"), *asked]) == 0


# ---------------------------------------------------------------------------------------------------------------
# Kinds of adapters, by PEFT's own keys

VARIANTS: dict[str, Options] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "r": 6, "rank_pattern": {"v_proj": 3}},
    "token rows": {"trainable_token_indices": [4, 5, 300]},
}


@pytest.mark.parametrize("model", ["random:gemma2", pytest.param("random:gemma3", marks=pytest.mark.soak)])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_a_trained_adapter_merges_to_the_model_that_was_trained(
    variant: str, model: str, write_recipe: Callable[..., Path], seen: Options
) -> None:
    path = write_recipe(model={"name_or_path": model}, lora=VARIANTS[variant], training={"learning_rate": 0.02})
    assert main(["train", str(path)]) == 0
    assert main(["merge", "run", "--output", "merged"]) == 0
    # float32: sums in another order.
    assert apart(logits(load("merged")), seen["logits"]) < 1e-4
    assert apart(logits(load(locate(model))), seen["logits"]) > 1e-2
    saved = json.loads(Path("run/adapter_config.json").read_text())
    assert {key: saved[key] for key in VARIANTS[variant]} == VARIANTS[variant]
    # Each key does something: with another word in its place the same run ends elsewhere.
    plain = {key: value for key, value in VARIANTS[variant].items() if key in ("r", "rank_pattern")}
    other = write_recipe(
        "plain.yaml",
        model={"name_or_path": model},
        lora=plain | {"trainable_token_indices": "none"},
        training={"learning_rate": 0.02, "output_dir": "plain"},
    )
    was = seen["logits"]
    assert main(["train", str(other)]) == 0
    assert apart(seen["logits"], was) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"init_lora_weights": "pissa"}, marks=pytest.mark.soak),
        pytest.param({"init_lora_weights": "pissa_niter_4"}, marks=pytest.mark.soak),
        {
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "use_dora": True,
            "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {"v_proj": 4},
        },
        pytest.param(
            {"init_lora_weights": "olora", "target_modules": ["q_proj", "embed_tokens"]}, marks=pytest.mark.slow
        ),
        pytest.param({"init_lora_weights": "mica"}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "-".join(options) + f" {options['init_lora_weights']}",
)
@pytest.mark.slow
def test_an_adapter_that_begins_as_a_part_of_its_base_is_saved_as_a_plain_one(
    options: Options, write_recipe: Callable[..., Path], seen: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run, its checkpoint, and both merged answer as the model that was trained."""
    path = write_recipe(
        model={"name_or_path": "random:gemma2"},
        lora=options,
        training={"learning_rate": 0.002, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1},
    )
    assert main(["train", str(path)]) == 0, capsys.readouterr().err
    trained = seen["logits"]
    assert json.loads(Path("run/adapter_config.json").read_text())["init_lora_weights"] is True
    base = locate("random:gemma2")
    assert apart(logits(PeftModel.from_pretrained(load(base), "run")), trained) < 1e-4
    for folder in ("run", next(str(p) for p in Path("run").glob("checkpoint-*"))):
        assert main(["merge", folder, "--output", "merged", "--overwrite"]) == 0, capsys.readouterr().err
        assert apart(logits(load("merged")), trained) < 1e-4
    assert apart(logits(load(base)), trained) > 1e-2


@pytest.mark.slow
def test_such_an_adapter_is_gone_on_from_to_the_bit(write_recipe: Callable[..., Path]) -> None:
    """A checkpoint holds the factors that are trained beside the plain adapter."""
    training = {"learning_rate": 0.002, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    path = write_recipe(model={"name_or_path": "random:gemma2"}, lora={"init_lora_weights": "pissa"}, training=training)
    assert main(["train", str(path)]) == 0
    whole = Path("run/adapter_model.safetensors").read_bytes()
    shutil.rmtree("run/checkpoint-4")
    for file in Path("run").glob("*.safetensors"):
        file.unlink()
    assert main(["train", str(path), "training.resume_from_checkpoint=true"]) == 0
    assert Path("run/adapter_model.safetensors").read_bytes() == whole


def test_what_cannot_begin_with_its_base_is_refused(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(model={"name_or_path": "random:gemma2"}, lora={"init_lora_weights": "olora"})
    together = ["quantization.load_in_4bit=true", "data.eval_fraction=0.5"]
    together += [f"training.{key}" for key in ("save_only_model=true", "load_best_model_at_end=true")]
    assert main(["check", str(path), *together]) == 2
    said = capsys.readouterr().err
    assert "lora.init_lora_weights: is olora, which cannot be computed from quantised weights; remove" in said
    assert (
        "training.save_only_model: is true, but the best weights of olora are in the files that it leaves out" in said
    )
