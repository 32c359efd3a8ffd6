"""Exports: folders that load as they are, figures that plain torch gives, and nothing broken that passes unseen."""

# ruff: noqa: E501 (a line that a person reads is one line here, too)

import errno
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from huggingface_hub import ModelCard
from in_process import dies, start
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from finetune.cli.commands import main
from finetune.data.template import load_template
from finetune.export import verify
from finetune.export.report import as_markdown
from finetune.export.rows import held_out
from finetune.export.transformers import write_format
from finetune.export.verify import LIMITS, add_comparison, missed_limits
from finetune.hub.card import export_card
from finetune.model.generate import Sampling
from finetune.model.load import load_base
from finetune.model.load_generator import LoadOptions, load_generator
from finetune.model.locate import locate
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import ExportSection
from finetune.system import fresh_process
from finetune.system.errors import ModelError, RecipeError
from finetune.system.terminal import quiet

Options = dict[str, Any]
Copy = Callable[..., Path]
Said = pytest.CaptureFixture[str]

FORMATS = ["bf16", "fp16", "int8", "nf4"]
FLAGS = [f"--format={kind}" for kind in FORMATS]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
UPSTREAM = {
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16),
}
IDS = "conversations give other token ids than in training; its tokenizer or chat template was changed"

# ---------------------------------------------------------------------------------------------------------------
# Two runs, each exported once


def measures(name: str) -> Callable[[Any], bool]:
    """True for the argument of the process that measures this model."""
    return lambda argument: argument.get("job", {}).get("name") == name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    """A tiny Gemma whose predictions are far from uniform, and of whose answers some end by themselves."""
    return altered(Path(locate("random:gemma3")), folder / "base", louder)


def louder(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] *= 4
    tensors["model.embed_tokens.weight"][5] *= 6  # <end_of_turn>


def altered(source: Path, into: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a model with other weights."""
    shutil.copytree(source, into)
    tensors = load_file(into / "model.safetensors")
    change(tensors)
    save_file(tensors, into / "model.safetensors", {"format": "pt"})
    return into


def train(base: str | Path, run: Path, **sections: Any) -> Path:
    recipe: Options = {
        "model": {"name_or_path": str(base)},
        "lora": {"r": 4, "lora_alpha": 16, "trainable_token_indices": [4, 5]},
        "data": {"train": [{"path": str(ROOT / "data" / "chat_sample.jsonl")}], "eval_fraction": 0.1},
        "training": {
            "output_dir": str(run),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
            "gradient_checkpointing": False,
            "max_length": 128,
            "save_strategy": "steps",
            "save_steps": 3,
        },
    }
    path = run.with_name(f"{run.name}.yaml")
    path.write_text(yaml.safe_dump(recipe | sections), encoding="utf-8")
    assert main(["train", "--quiet", str(path)]) == 0
    return run


@pytest.fixture(scope="module")
def run(folder: Path, base: Path) -> Path:
    return train(base, folder / "run")


@pytest.fixture(scope="module")
def merged(run: Path) -> Path:
    assert main(["merge", "--quiet", str(run), "--output", str(run.with_name("merged"))]) == 0
    return run.with_name("merged")


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    output = run.with_name("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh_process, "_start", start)
        patch.setattr(verify, "ANSWER_TOKENS", 16)
        assert main(["export", "--quiet", str(run), "--output", str(output), *FLAGS]) == 0
    return output


@pytest.fixture(scope="module")
def qlora(folder: Path, base: Path) -> Path:
    """Its recipe says what is exported of it where flags do not."""
    section = {"formats": ["fp16"], "base": "dequantised", "gate": {"max_perplexity_ratio": 0.5, "min_top1": 0.5}}
    return train(base, folder / "qlora", quantization=NF4, export=section)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are measured in this process, on short answers."""
    monkeypatch.setattr(fresh_process, "_start", start)
    monkeypatch.setattr(verify, "ANSWER_TOKENS", 8)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """A copy of a folder, whose recipe has other values at dotted keys; None takes a key away."""

    def make(source: Path, name: str = "copy", **values: Any) -> Path:
        into = tmp_path / name
        shutil.copytree(source, into)
        if values:
            recipe = yaml.safe_load((into / "recipe.yaml").read_text())
            for key, value in values.items():
                section, name = key.split("__")
                recipe[section][name] = value
            (into / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return into

    return make


def export(model: Path, output: Path, *flags: str) -> int:
    return main(["export", "--quiet", str(model), "--output", str(output), *flags])


def report(output: Path) -> Options:
    return dict(json.loads((output / "report.json").read_text(encoding="utf-8")))


def figures(output: Path) -> dict[str, Options]:
    return {item["name"]: item for item in report(output)["models"]}


def plain(model: Path) -> Any:
    """A folder as anybody loads it, with no further argument."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(model)


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in model.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in expected.items()}
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


# ---------------------------------------------------------------------------------------------------------------
# What is written

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16, "nf4": torch.bfloat16}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.slow
def test_a_format_loads_with_no_further_argument(exported: Path, kind: str) -> None:
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = AutoModelForCausalLM.from_pretrained(exported / kind, output_loading_info=True)
    assert not any(info.values())
    layer = type(model.model.layers[0].mlp.up_proj).__name__
    assert layer == {"int8": "Linear8bitLt", "nf4": "Linear4bit"}.get(kind, "Linear")
    assert model.config.dtype == model.model.embed_tokens.weight.dtype == DTYPES[kind]
    assert model.generation_config.eos_token_id == [1, 5]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_format_is_a_whole_folder(exported: Path, run: Path, kind: str) -> None:
    assert {path.name for path in (exported / kind).iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (exported / kind / name).read_bytes() == (run / name).read_bytes()


def test_nothing_but_the_formats_and_the_report_is_left(exported: Path, folder: Path) -> None:
    assert {path.name for path in exported.iterdir()} == {*FORMATS, "report.json", "report.md"}
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_sixteen_bits_are_the_merged_tensors_rounded_once(exported: Path, merged: Path, kind: str) -> None:
    expected = {name: tensor.to(DTYPES[kind]) for name, tensor in tensors_of(merged).items()}
    assert_same_tensors(tensors_of(exported / kind), expected)


SHAPE = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 1}


@pytest.fixture(scope="module")
def bases(folder: Path, merged: Path) -> Callable[[str], Path]:
    """The directory of a whole model by its name, made when first asked for."""

    def find(name: str) -> Path:
        if name == "merged gemma3":
            return merged
        if name.startswith("random:"):
            return Path(locate(name))
        if not (folder / name).exists():
            options: dict[str, Options] = {
                "mixtral": SHAPE | {"num_local_experts": 4},
                "gpt2": {"vocab_size": 1024, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}
                | {"bos_token_id": 2, "eos_token_id": 1},
            }
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options[name]))
            with quiet():
                model.save_pretrained(folder / name)
                AutoTokenizer.from_pretrained(locate("random:llama")).save_pretrained(folder / name)
        return folder / name

    return find


def upstreams(model: Path, kind: str) -> Any:
    """The model quantised while transformers loads it."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, quantization_config=UPSTREAM[kind])


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["merged gemma3", "random:llama", "mixtral"])
def test_quantised_tensors_are_those_that_transformers_saves(
    name: str, kind: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "ours").mkdir()
    write_format(bases(name), tmp_path / "ours", kind)
    with quiet():
        upstreams(bases(name), kind).save_pretrained(tmp_path / "theirs")
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    assert_same_tensors(ours, theirs)
    configs = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[0]["dtype"] == configs[1]["dtype"] == "bfloat16"
    # What upstream leaves alone, and what it does not.
    quantised = {n for n, t in ours.items() if n.endswith(".weight") and t.dtype in (torch.int8, torch.uint8)}
    assert "model.layers.0.self_attn.q_proj.weight" in quantised
    assert [n for n in quantised if "embed" in n or "norm" in n or "lm_head" in n or "experts" in n] == []
    assert ("lm_head.weight" in ours) == (name != "merged gemma3")
    assert any("experts" in n for n in ours) == (name == "mixtral")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_layer_that_is_stored_turned_answers_as_upstreams(
    kind: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """GPT-2's layers; that what upstream saves of them cannot always be loaded again is no reason not to compare."""
    write_format(bases("gpt2"), tmp_path, kind)
    ours, theirs = plain(tmp_path), upstreams(bases("gpt2"), kind)
    assert type(ours.transformer.h[0].mlp.c_fc).__name__ in ("Linear8bitLt", "Linear4bit")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_a_float16_model_is_quantised_in_float16(merged: Path, tmp_path: Path) -> None:
    for name, kind in (("half", "fp16"), ("small", "nf4")):
        (tmp_path / name).mkdir()
        write_format(merged if name == "half" else tmp_path / "half", tmp_path / name, kind)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["dtype"] == config["quantization_config"]["bnb_4bit_compute_dtype"] == "float16"
    assert tensors_of(tmp_path / "small")["model.embed_tokens.weight"].dtype == torch.float16


@pytest.mark.parametrize("kind", FORMATS)
def test_the_card_is_that_of_its_format(exported: Path, kind: str) -> None:
    card = ModelCard.load(exported / kind / "README.md")
    assert card.data.to_dict() == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert card.text.strip().startswith(f"# exported, {kind}\n\n`{report(exported)['base']}`, fine-tuned")
    found = figures(exported)[kind]
    assert (
        f"| {found['perplexity']:.4g} | {found['kl']:.2g} | {found['kl_p99']:.2g} | {100 * found['top1']:.2f}% "
        f"| {found['answers_equal']} of 6 | {found['stopped']} of 6 |"
    ) in card.text
    assert ("pip install transformers accelerate bitsandbytes\n" in card.text) == (kind in ("int8", "nf4"))


@pytest.mark.parametrize(
    ("kind", "relation"), [("bf16", "finetune"), ("fp16", "finetune"), ("int8", "quantized"), ("nf4", "quantized")]
)
def test_the_card_of_a_model_from_the_hub_names_its_base(exported: Path, kind: str, relation: str) -> None:
    found = report(exported)
    card = ModelCard(export_card(found | {"base": "owner/name"}, kind))
    assert (card.data.base_model, card.data.base_model_relation) == ("owner/name", relation)


# ---------------------------------------------------------------------------------------------------------------
# What is measured

# bfloat16 keeps 8 bits, and how many rows a matrix product has decides how it rounds.
ROUNDING = {"bf16": 1e-2, "fp16": 1e-3, "int8": 1e-2, "nf4": 1e-2}


def predictions(model: Any, rows: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (N, V) of all predicted tokens and these tokens (N)."""
    logs, targets = [], []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].float()
        labels = torch.tensor(row.labels[1:])
        logs.append(logits[labels != -100].log_softmax(-1))
        targets.append(labels[labels != -100])
    return torch.cat(logs), torch.cat(targets)


def distances(before: torch.Tensor, now: torch.Tensor) -> dict[str, float]:
    each = functional.kl_div(now, before, log_target=True, reduction="none").sum(-1).numpy()
    same = (before.argmax(-1) == now.argmax(-1)).double().mean()
    return {"kl": float(each.mean()), "kl_p99": float(np.percentile(each, 99)), "top1": float(same)}


def test_the_adapters_perplexity_is_that_of_the_evaluation_in_training(exported: Path, run: Path) -> None:
    """So the rows are those that were held out, their labels training's, and the adapter is on its base."""
    evaluated = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = [record["eval_loss"] for record in evaluated if "eval_loss" in record][-1]
    found = figures(exported)["adapter on its base"]
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    ledger = json.loads((run / "ledger.json").read_text())
    assert found["tokens"] == ledger["eval"]["trained_tokens"]
    assert report(exported)["rows"] == "held-out rows of the run"


def test_the_merged_model_is_the_adapters(exported: Path) -> None:
    adapter, merged = list(figures(exported).values())[:2]
    assert (adapter["against"], merged["against"]) == (None, "adapter on its base")
    assert (adapter["kl"], adapter["top1"], adapter["compared"]) == (None, None, 0)
    assert merged["name"] == "merged, original base"
    assert merged["kl"] < merged["kl_p99"] < 1e-6
    assert merged["top1"] == 1.0
    assert merged["perplexity_ratio"] == pytest.approx(1, abs=1e-6)
    assert (merged["answers_equal"], merged["conversations_equal"]) == (6, 10)
    assert merged["stopped"] == adapter["stopped"]


@pytest.mark.parametrize("kind", FORMATS)
def test_the_figures_of_a_format_are_those_of_plain_torch(exported: Path, merged: Path, run: Path, kind: str) -> None:
    rows, _ = held_out(run)
    before, targets = predictions(plain(merged), rows)
    now, _ = predictions(plain(exported / kind), rows)
    found, expected, tolerance = figures(exported)[kind], distances(before, now), ROUNDING[kind]
    assert found["against"] == "merged, original base"
    assert found["tokens"] == found["compared"] == len(targets)
    loss = float(functional.nll_loss(now, targets))
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=tolerance)
    ratio = loss - float(functional.nll_loss(before, targets))
    assert found["perplexity_ratio"] == pytest.approx(math.exp(ratio), rel=tolerance)
    assert found["kl"] == pytest.approx(expected["kl"], rel=0.05, abs=1e-7)
    assert found["kl_p99"] == pytest.approx(expected["kl_p99"], rel=0.2)
    assert found["top1"] == pytest.approx(expected["top1"], abs=0.01)


def test_what_is_lost_is_in_the_order_of_the_bits(exported: Path) -> None:
    found = figures(exported)
    assert 0 < found["fp16"]["kl"] < found["bf16"]["kl"] < found["int8"]["kl"] < found["nf4"]["kl"]
    assert all(found[kind]["conversations_equal"] == 10 for kind in FORMATS)


@pytest.mark.slow
def test_answers_are_those_that_each_prompt_gets_alone(merged: Path, run: Path, exported: Path) -> None:
    rows, _ = held_out(run)
    generator = load_generator(str(merged))
    expected = []
    for row in rows:
        ids = torch.tensor([row.prompt])
        out = generator.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, eos_token_id=[1, 5]
        )
        expected.append(out[0, len(row.prompt) :].tolist())
    assert generator.answers([row.prompt for row in rows], 16) == expected
    stopped = sum(answer[-1] in (1, 5) for answer in expected)
    assert figures(exported)["merged, original base"]["stopped"] == stopped
    assert 0 < stopped < len(rows)  # both kinds were there


def test_sizes_types_and_seconds_are_those_of_the_folder(exported: Path) -> None:
    for kind in FORMATS:
        found = figures(exported)[kind]
        assert found["bytes"] == (exported / kind / "model.safetensors").stat().st_size
        assert found["dtype"] == str(DTYPES[kind]).removeprefix("torch.")
        assert 0 < found["load_seconds"] < 60


def test_the_report_says_what_was_compared_and_with_what(exported: Path, run: Path, base: Path) -> None:
    found = report(exported)
    assert list(figures(exported)) == ["adapter on its base", "merged, original base", *FORMATS]
    assert (found["title"], found["model"], found["base"]) == ("exported", str(run), str(base))
    assert (found["gate"], found["missed"]) == ({}, [])
    tokens = found["models"][0]["tokens"]
    assert found["notes"][0] == (
        f"Perplexity: on {tokens:,} trained tokens of held-out rows of the run. KL (nats per token) and top-1: on the first "
        f"{tokens:,}, against the model named in the last column. Answers: greedy, to the prompts of at most "
        "ten rows, each at most 64 tokens. Token ids: of ten conversations."
    )
    # Only of float16, which alone can overflow.
    half = figures(exported)["fp16"]["activations"]
    assert found["notes"][1:] == [
        f"\nfp16: the largest activation is {half['largest']:,.0f}, in {half['in']} (at most: 65,504)"
    ]
    assert [name for name, item in figures(exported).items() if "activations" in item] == ["fp16"]


def loud(size: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """Makes the largest weight of one layer of a Llama this large."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        up = tensors["model.layers.1.mlp.up_proj.weight"]
        up *= size / up.abs().max()

    return change


@pytest.mark.slow
def test_the_largest_activation_is_told_with_its_module(tmp_path: Path) -> None:
    model = altered(Path(locate("random:llama")), tmp_path / "loud", loud(5_000))
    assert export(model, tmp_path / "out", "--format=fp16") == 0
    whole, seen = plain(tmp_path / "out" / "fp16"), [0.0]
    whole.model.layers[1].mlp.up_proj.register_forward_hook(
        lambda module, inputs, output: seen.append(float(output.abs().max()))
    )
    predictions(whole, held_out(model)[0])
    found = figures(tmp_path / "out")["fp16"]["activations"]
    assert (found["in"], found["overflow"]) == ("model.layers.1.mlp.up_proj", None)
    assert 5_000 < max(seen) <= found["largest"] < 65_504  # answers may reach further than rows
    assert report(tmp_path / "out")["notes"][1] == (
        f"\nfp16: the largest activation is {found['largest']:,.0f}, in model.layers.1.mlp.up_proj (at most: 65,504)"
    )


def test_the_table_has_a_line_for_each_model(exported: Path) -> None:
    lines = (exported / "report.md").read_text(encoding="utf-8").splitlines()
    assert lines[:4] == [
        "# exported",
        "",
        "|  | size | load | perplexity | KL mean | KL 99% | top-1 | answers equal | they stop | token ids | compared with |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line, item in zip(lines[4:10], figures(exported).values(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:2] == [item["name"], f"{item['bytes'] / 1e6:.1f} MB"]
        assert cells[3] == f"{item['perplexity']:.4g}"
        assert cells[8] == f"{item['stopped']} of 6"
        assert cells[10] == (item["against"] or "")
        if item["name"] in FORMATS:
            assert cells[4:6] == [
                f"{value:.2g}" if value >= 1e-6 else "< 1e-6" for value in (item["kl"], item["kl_p99"])
            ]
            assert cells[6:8] == [f"{item['top1']:.2%}", f"{item['answers_equal']} of 6"]
            assert cells[9] == "10 of 10"
    assert lines[5].split("|")[5:7] == [" < 1e-6 ", " < 1e-6 "]


@pytest.mark.slow
def test_a_model_is_nothing_apart_from_itself(merged: Path, tmp_path: Path) -> None:
    """The bfloat16 export of a bfloat16 model is the same model: the comparison itself adds nothing."""
    half = tmp_path / "half"
    half.mkdir()
    write_format(merged, half, "bf16")
    assert export(half, tmp_path / "out", "--format=bf16") == 0
    whole, found = report(tmp_path / "out")["models"]
    assert (whole["name"], whole["against"], found["against"]) == ("as trained", None, "as trained")
    assert (found["kl"], found["kl_p99"], found["top1"], found["perplexity_ratio"]) == (0.0, 0.0, 1.0, 1.0)
    assert_same_tensors(tensors_of(tmp_path / "out" / "bf16"), tensors_of(half))


@pytest.mark.slow
def test_a_quantised_run_is_merged_in_both_ways_and_the_report_says_which_is_nearer(
    qlora: Path, tmp_path: Path, capsys: Said
) -> None:
    assert export(qlora, tmp_path / "out", "--base=original", "--format=nf4", "--gate=max_perplexity_ratio=9") == 0
    found = figures(tmp_path / "out")
    names = ["adapter on its base", "merged, original base", "merged, dequantised base"]
    assert list(found) == [*names, "nf4"]
    original, dequantised = found[names[1]], found[names[2]]
    assert [item["against"] for item in (original, dequantised)] == [names[0]] * 2
    assert found["nf4"]["against"] == names[1]
    # The base as it was trained against is what the adapter has learned on; the float base is a rounding away.
    assert dequantised["kl"] < 1e-6 < 1e-3 < original["kl"]
    rows, _ = held_out(qlora)
    with_adapter = load_generator(str(qlora)).model
    assert isinstance(with_adapter, PeftModel)
    before, _ = predictions(with_adapter, rows)
    assert main(["merge", "--quiet", str(qlora), "--output", str(tmp_path / "merged")]) == 0
    expected = distances(before, predictions(plain(tmp_path / "merged"), rows)[0])
    assert original["kl"] == pytest.approx(expected["kl"], rel=1e-4)
    low, high = sorted((original, dequantised), key=lambda item: float(item["perplexity"]))
    assert report(tmp_path / "out")["notes"][1] == (
        f"\nNearer to the adapter as trained: merged, dequantised base (mean KL {dequantised['kl']:.3g} against "
        f"{original['kl']:.3g}). Lower perplexity: {low['name']} ({low['perplexity']:.4g} against {high['perplexity']:.4g})."
    )
    assert report(tmp_path / "out")["notes"][1] in capsys.readouterr().out


@pytest.mark.slow
def test_models_are_measured_and_planned_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Said, request: pytest.FixtureRequest
) -> None:
    """Processes that start cold, as users' do, find the same as this one; the base is measured here both times."""
    monkeypatch.setattr(verify, "ANSWER_TOKENS", 64)
    shutil.copytree(locate("random:llama"), tmp_path / "llama")
    assert export(tmp_path / "llama", tmp_path / "here", "--format=fp16") == 0
    cold = request.getfixturevalue("_forked")

    def some_cold(names: tuple[str, ...], *rest: Any) -> Any:
        argument = json.loads(Path(names[2]).read_text(encoding="utf-8"))
        here = "job" in argument and not measures("fp16")(argument)
        return (start if here else cold)(names, *rest)

    monkeypatch.setattr(fresh_process, "_start", some_cold)
    assert export(tmp_path / "llama", tmp_path / "apart", "--format=fp16") == 0
    here, apart = figures(tmp_path / "here"), figures(tmp_path / "apart")
    for item in (*here.values(), *apart.values()):
        assert item.pop("load_seconds") > 0
        item["kl"] = item["kl"] and pytest.approx(item["kl"], rel=1e-3)
    assert apart == here
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------------------
# What must not pass


def refused(output: Path, said: Said) -> str:
    """The one line that is said; nothing is left."""
    assert not output.exists()
    assert [path.name for path in output.parent.iterdir() if path.name.startswith(f".{output.name}")] == []
    line, end, rest = said.readouterr().err.partition("\n")
    assert (end, rest) == ("\n", "")
    return line


def gates(said: Said) -> list[str]:
    return said.readouterr().err.splitlines()


def test_a_swapped_chat_template_is_told_by_its_token_ids(
    merged: Path, copy: Copy, tmp_path: Path, capsys: Said
) -> None:
    model = copy(merged)
    (model / "chat_template.jinja").write_text(load_template("chatml"), encoding="utf-8")
    assert export(model, tmp_path / "out", "--format=bf16") == 3
    assert gates(capsys) == [f"gate: merged: 10 of 10 {IDS}", f"gate: bf16: 10 of 10 {IDS}"]
    assert report(tmp_path / "out")["missed"] == [f"{name}: 10 of 10 {IDS}" for name in ("merged", "bf16")]
    assert (
        (tmp_path / "out" / "report.md")
        .read_text()
        .endswith(f"\n\nIt falls short:\n\n- merged: 10 of 10 {IDS}\n- bf16: 10 of 10 {IDS}\n")
    )
    assert (tmp_path / "out" / "bf16" / "model.safetensors").exists()  # what was written stays


def test_a_folder_without_its_tokenizer_is_told(merged: Path, copy: Copy, tmp_path: Path, capsys: Said) -> None:
    model = copy(merged)
    (model / "tokenizer.json").unlink()
    assert export(model, tmp_path / "out", "--format=bf16") == 3
    why = "cannot be loaded: Couldn't instantiate the backend tokenizer from one of:"
    made = tmp_path / "out" / "bf16"
    assert gates(capsys) == [
        f"gate: merged: cannot be used: ModelError: model.name_or_path: {model} {why}",
        f"gate: bf16: cannot be used: ModelError: model.name_or_path: {made} {why}",
    ]


def test_a_truncated_shard_is_named(merged: Path, copy: Copy, tmp_path: Path, capsys: Said) -> None:
    shard = copy(merged) / "model.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    assert export(shard.parent, tmp_path / "out", "--format=bf16") == 2
    assert refused(tmp_path / "out", capsys) == (
        f"error: {shard} is damaged: it has {len(content) - 100:,} bytes where its header says {len(content):,}"
    )


def scaled(run: Path, into: Path) -> Path:
    """A merge with twice the adapter, whose record says once."""
    assert main(["merge", "--quiet", str(run), "--adapter", f"{run}=2.0", "--output", str(into)]) == 0
    record = json.loads((into / "merge.json").read_text())
    assert [item["weight"] for item in record["adapters"]] == [2.0]
    record["adapters"][0]["weight"] = 1.0
    (into / "merge.json").write_text(json.dumps(record))
    return into


def test_a_merge_that_does_not_predict_as_its_adapter_is_told_without_a_gate(
    run: Path, tmp_path: Path, capsys: Said
) -> None:
    assert export(scaled(run, tmp_path / "scaled"), tmp_path / "out", "--format=bf16") == 3
    kl = figures(tmp_path / "out")["merged"]["kl"]
    assert kl > 0.02
    assert gates(capsys) == [
        f"gate: merged: does not predict as its adapter does: mean KL is {kl:.3g}, above 0.02; "
        "rounding alone gives less than a tenth of that"
    ]


def test_one_changed_tensor_is_told_without_a_gate(merged: Path, tmp_path: Path, capsys: Said) -> None:
    def negate(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"] *= -1

    model = altered(merged, tmp_path / "changed", negate)
    assert export(model, tmp_path / "out", "--format=bf16") == 3
    assert re.fullmatch("gate: merged: does not predict as its adapter does: .*\n", capsys.readouterr().err)


@pytest.mark.slow
def test_a_scaled_adapter_of_a_quantised_run_is_told_by_a_gate(qlora: Path, tmp_path: Path, capsys: Said) -> None:
    """Its merge is not its adapter on the quantised base anyway; how far it may be from it, a person says."""
    model = scaled(qlora, tmp_path / "scaled")
    assert export(model, tmp_path / "out", "--format=bf16", "--gate=max_perplexity_ratio=9", "--gate=max_kl=0.05") == 3
    kl = figures(tmp_path / "out")["merged"]["kl"]
    assert gates(capsys) == [f"gate: merged: mean KL is {kl:.4g}, and max_kl is 0.05"]


@pytest.mark.slow
def test_a_weighted_merge_is_not_compared_with_the_run(run: Path, tmp_path: Path) -> None:
    into = tmp_path / "half"
    assert main(["merge", "--quiet", str(run), "--adapter", f"{run}=0.5", "--output", str(into)]) == 0
    assert export(into, tmp_path / "out", "--format=bf16") == 0
    assert list(figures(tmp_path / "out")) == ["merged", "bf16"]
    assert report(tmp_path / "out")["rows"] == "held-out rows of the run"  # by the recipe beside it


@pytest.mark.slow
def test_rounding_alone_is_told_of_nobody(run: Path, tmp_path: Path) -> None:
    into = tmp_path / "half"
    assert main(["merge", "--quiet", str(run), "--dtype", "bfloat16", "--output", str(into)]) == 0
    assert export(into, tmp_path / "out", "--format=bf16") == 0
    assert figures(tmp_path / "out")["merged"]["against"] == "adapter on its base"
    assert 0 < figures(tmp_path / "out")["merged"]["kl"] < 0.002


@pytest.mark.slow
def test_activations_that_float16_cannot_hold_are_told_with_their_module(tmp_path: Path, capsys: Said) -> None:
    """Every weight fits."""
    model = altered(Path(locate("random:llama")), tmp_path / "loud", loud(60_000))
    assert export(model, tmp_path / "out", "--format=fp16", "--format=bf16") == 3
    assert gates(capsys) == [
        "gate: fp16: activations overflow float16, first in model.layers.1.mlp.up_proj; export bf16"
    ]
    found = figures(tmp_path / "out")
    assert (found["fp16"]["kl"], found["fp16"]["perplexity"]) == (None, None)  # JSON has no NaN
    assert 0 <= found["bf16"]["kl"] < 0.5
    assert " nan " in (tmp_path / "out" / "report.md").read_text()


def test_a_weight_that_float16_cannot_hold_is_refused_by_name(tmp_path: Path, capsys: Said) -> None:
    def heavy(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = -70_000

    model = altered(Path(locate("random:llama")), tmp_path / "heavy", heavy)
    assert export(model, tmp_path / "out", "--format=bf16", "--format=fp16") == 2
    assert refused(tmp_path / "out", capsys) == (
        "error: model.layers.0.mlp.up_proj.weight: 70,000 does not fit float16 (65,504 at most); write bfloat16"
    )


def test_a_process_that_dies_is_told(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    dying = dies(1, "Traceback\nMemoryError: 9 GB\n", measures("int8"))
    monkeypatch.setattr(fresh_process, "_start", dying)
    assert export(merged, tmp_path / "out", "--format=int8", "--format=bf16") == 3
    why = "its process ended with code 1: MemoryError: 9 GB"
    captured = capsys.readouterr()
    assert captured.err == f"gate: int8: cannot be used: {why}\n"
    assert re.search(rf"\n\| int8 \| \S+ MB \| {why} \|( +\|){{8}}\n", captured.out)
    found = figures(tmp_path / "out")
    assert found["int8"]["error"] == why
    assert found["bf16"]["kl"] > 0  # the others are measured all the same
    assert f"It could not be measured: {why}" in (tmp_path / "out" / "int8" / "README.md").read_text()


@pytest.mark.slow
def test_a_merge_that_dies_over_its_answers_is_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    """Its predictions are kept by then, and the formats are compared with them."""
    dying = dies(-9, "", measures("merged, original base"), late=True)
    monkeypatch.setattr(fresh_process, "_start", dying)
    assert export(run, tmp_path / "out", "--format=bf16") == 3
    why = "its process ended with code -9: it was killed, most likely because memory ran out"
    assert gates(capsys) == [f"gate: merged, original base: cannot be used: {why}"]


def test_an_adapter_that_cannot_be_measured_is_what_is_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    dying = dies(-9, "", measures("adapter on its base"))
    monkeypatch.setattr(fresh_process, "_start", dying)
    assert export(run, tmp_path / "out", "--format=bf16") == 3
    why = "its process ended with code -9: it was killed, most likely because memory ran out"
    assert gates(capsys) == [f"gate: adapter on its base: cannot be used: {why}"]


def test_a_disk_that_fills_up_ends_an_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    """The predictions that formats are compared with are the largest of its files."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fresh_process, "_start", start)
    monkeypatch.setattr(os, "posix_fallocate", full)
    capsys.readouterr()
    assert export(run, tmp_path / "out", "--format=bf16") == 2
    assert refused(tmp_path / "out", capsys) == f"error: {tmp_path / 'out'}: No space left on device"


def test_nothing_is_left_of_an_export_that_is_stopped(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(fresh_process, "_start", stop)
    assert export(merged, tmp_path / "out", "--format=bf16") == 130
    assert refused(tmp_path / "out", capsys) == "stopped"


# ---------------------------------------------------------------------------------------------------------------
# Limits

FOUND: Options = {
    "name": "nf4",
    "loss": 2.0,
    "kl": 0.25,
    "kl_p99": 1.5,
    "top1": 0.75,
    "perplexity": 8.0,
    "perplexity_ratio": 1.25,
    "conversations": [[1]] * 10,
    "conversations_equal": 10,
}
MISSES = {
    ("max_kl", 0.24): "nf4: mean KL is 0.25, and max_kl is 0.24",
    ("max_kl_p99", 1.4): "nf4: 99th percentile KL is 1.5, and max_kl_p99 is 1.4",
    ("min_top1", 0.76): "nf4: top-1 agreement is 0.75, and min_top1 is 0.76",
    ("max_perplexity_ratio", 1.2): "nf4: perplexity ratio is 1.25, and max_perplexity_ratio is 1.2",
}
KEPT = {"max_kl": 0.25, "max_kl_p99": 1.5, "min_top1": 0.75, "max_perplexity_ratio": 1.25}


@pytest.mark.parametrize(("limit", "line"), MISSES.items(), ids=[name for name, _ in MISSES])
def test_each_limit_is_kept_at_its_value_and_missed_beyond_it(limit: tuple[str, float], line: str) -> None:
    assert missed_limits(FOUND, {limit[0]: limit[1]}) == [line]
    assert missed_limits(FOUND, {limit[0]: KEPT[limit[0]]}) == []


@pytest.mark.parametrize("key", ["kl", "kl_p99", "top1", "perplexity_ratio"])
def test_a_figure_that_is_not_finite_keeps_no_limit(key: str) -> None:
    limit = next(name for name, (figure, _) in LIMITS.items() if figure == key)
    lines = missed_limits(FOUND | {key: math.nan}, {limit: KEPT[limit]})
    assert lines[-1].startswith(f"nf4: {LIMITS[limit][1]} is nan, and {limit} is ")


@pytest.mark.parametrize("key", ["loss", "kl"])
def test_predictions_that_are_not_finite_are_told(key: str) -> None:
    assert missed_limits(FOUND | {key: math.nan}, {}) == ["nf4: its predictions are not finite"]


def test_a_limit_on_what_was_not_measured_is_missed() -> None:
    line = "nf4: mean KL could not be measured, and max_kl is 1"
    assert missed_limits(FOUND | {"kl": None}, {"max_kl": 1.0}) == [line]


def test_only_what_must_be_the_same_is_held_to_it() -> None:
    line = (
        "nf4: does not predict as its adapter does: mean KL is 0.25, above 0.02; rounding alone gives less than a tenth "
        "of that"
    )
    assert missed_limits(FOUND, {}, must_match=True) == [line]
    assert missed_limits(FOUND, {}) == missed_limits(FOUND | {"kl": 0.02}, {}, must_match=True) == []


def test_a_comparison_counts_answers_and_conversations_that_are_equal() -> None:
    reference = {"perplexity": 4.0, "answers": [[1, 2], [3], []], "conversations": [[1], [2]]}
    found = {"perplexity": 6.0, "answers": [[1, 2], [4], []], "conversations": [[1], [2, 3]]}
    add_comparison(found, reference, reference)
    assert (found["perplexity_ratio"], found["answers_equal"], found["conversations_equal"]) == (1.5, 2, 1)
    assert missed_limits(FOUND | {"conversations": [[1], [2]], "conversations_equal": 1}, {}) == [f"nf4: 1 of 2 {IDS}"]


@pytest.mark.slow
def test_gates_are_kept_and_missed_by_the_command(merged: Path, tmp_path: Path, capsys: Said) -> None:
    keeps = ["--gate=max_kl=5", "--gate=max_kl_p99=50", "--gate=min_top1=0.1", "--gate=max_perplexity_ratio=2"]
    misses = ["--gate=max_kl=1e-12", "--gate=max_kl_p99=1e-12", "--gate=min_top1=1", "--gate=max_perplexity_ratio=0.5"]
    assert export(merged, tmp_path / "keeps", "--format=nf4", *keeps) == 0
    assert gates(capsys) == []
    assert export(merged, tmp_path / "misses", "--format=nf4", *misses) == 3
    found, whole = (figures(tmp_path / "misses")[name] for name in ("nf4", "merged"))
    assert gates(capsys) == [
        f"gate: merged: mean KL is {whole['kl']:.4g}, and max_kl is 1e-12",
        f"gate: merged: 99th percentile KL is {whole['kl_p99']:.4g}, and max_kl_p99 is 1e-12",
        f"gate: merged: perplexity ratio is {whole['perplexity_ratio']:.4g}, and max_perplexity_ratio is 0.5",
        f"gate: nf4: mean KL is {found['kl']:.4g}, and max_kl is 1e-12",
        f"gate: nf4: 99th percentile KL is {found['kl_p99']:.4g}, and max_kl_p99 is 1e-12",
        f"gate: nf4: top-1 agreement is {found['top1']:.4g}, and min_top1 is 1",
        f"gate: nf4: perplexity ratio is {found['perplexity_ratio']:.4g}, and max_perplexity_ratio is 0.5",
    ]
    assert report(tmp_path / "misses")["gate"] == {
        "max_kl": 1e-12,
        "max_kl_p99": 1e-12,
        "min_top1": 1.0,
        "max_perplexity_ratio": 0.5,
    }


def test_an_error_in_the_table_keeps_its_columns() -> None:
    entry = {"name": "nf4", "bytes": 2_500_000_000, "error": "ModelError: no"}
    text = as_markdown({"title": "t", "models": [entry], "notes": ["n"], "missed": []})
    assert text.splitlines()[4] == "| nf4 | 2.50 GB | ModelError: no |" + "  |" * 8
    assert [line.count("|") for line in text.splitlines()[2:5]] == [12, 12, 12]


# ---------------------------------------------------------------------------------------------------------------
# The recipe's section


@pytest.mark.slow
def test_a_recipe_says_what_is_exported_where_flags_do_not(qlora: Path, tmp_path: Path, capsys: Said) -> None:
    assert export(qlora, tmp_path / "out") == 3
    names = ["adapter on its base", "merged, dequantised base", "merged, original base", "fp16"]
    found = figures(tmp_path / "out")
    assert list(found) == names
    assert found["fp16"]["against"] == "merged, dequantised base"
    assert report(tmp_path / "out")["gate"] == {"max_perplexity_ratio": 0.5, "min_top1": 0.5}
    # The other merge is shown, and held to nothing.
    assert gates(capsys) == [
        f"gate: {name}: perplexity ratio is {found[name]['perplexity_ratio']:.4g}, and max_perplexity_ratio is 0.5"
        for name in (names[1], "fp16")
    ]


@pytest.mark.slow
def test_flags_go_before_the_recipe(qlora: Path, tmp_path: Path) -> None:
    flags = ["--format=bf16", "--base=original", "--gate=max_perplexity_ratio=9", "--gate=max_kl=9"]
    assert export(qlora, tmp_path / "out", *flags) == 0
    names = ["adapter on its base", "merged, original base", "merged, dequantised base", "bf16"]
    assert list(figures(tmp_path / "out")) == names
    assert figures(tmp_path / "out")["bf16"]["against"] == names[1]
    assert report(tmp_path / "out")["gate"] == {"max_perplexity_ratio": 9.0, "min_top1": 0.5, "max_kl": 9.0}


@pytest.mark.slow
def test_a_very_small_limit_is_read_from_a_run(run: Path, copy: Copy, tmp_path: Path, capsys: Said) -> None:
    model = copy(run)
    recipe = load_recipe(model / "recipe.yaml", ["export.gate.max_kl=0.000001", "export.formats=[bf16]"])
    (model / "recipe.yaml").write_text(recipe.to_yaml())  # as training leaves it
    assert export(model, tmp_path / "out") == 3
    kl = figures(tmp_path / "out")["bf16"]["kl"]
    assert gates(capsys) == [f"gate: bf16: mean KL is {kl:.4g}, and max_kl is 1e-06"]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    monkeypatch.chdir(tmp_path)

    def make(text: str) -> Path:
        start = "model: {name_or_path: owner/model}\ndata: {train: [{path: owner/rows}]}\n"
        Path("r.yaml").write_text(start + text)
        return Path("r.yaml")

    return make


def test_the_section_is_read_and_written_out_again(recipe: Callable[[str], Path]) -> None:
    assert load_recipe(recipe("")).export == ExportSection(formats=[], base="original", gate={})
    text = "export: {formats: [nf4, bf16], base: dequantised, gate: {max_kl: 0.05, min_top1: 1}}\n"
    first = load_recipe(recipe(text))
    section = ExportSection(formats=["nf4", "bf16"], base="dequantised", gate={"max_kl": 0.05, "min_top1": 1})
    assert first.export == section
    Path("again.yaml").write_text(first.to_yaml())
    assert load_recipe("again.yaml") == first
    assert load_recipe("r.yaml", ["export.gate.max_kl=0.1"]).export.gate == {"max_kl": 0.1, "min_top1": 1}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("export: {formats: [nf4, gguf]}", """r.yaml:3: export.formats.1: is "gguf"; write 'gguf:all'"""),
        (
            "export:\n  gate:\n    max_kl: -1\n",
            "r.yaml:5: export.gate.max_kl: is -1; write a number greater than or equal to 0",
        ),
        (
            "export: {gate: {kl: 1}}",
            "r.yaml:3: export.gate.kl: is unknown; write max_kl, max_kl_p99, min_top1, max_perplexity_ratio",
        ),
        ("export: {base: rounded}", """r.yaml:3: export.base: is "rounded"; write 'original' or 'dequantised'"""),
        ("export: {format: [nf4]}", "r.yaml:3: export.format: is not a recipe's key; write formats"),
    ],
    ids=["format", "limit", "name of a limit", "base", "key"],
)
def test_a_fault_of_the_section_is_one_line(text: str, fault: str, recipe: Callable[[str], Path]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(text))
    assert caught.value.faults == [fault]


# ---------------------------------------------------------------------------------------------------------------
# What can be exported, and what is refused


@pytest.mark.slow
def test_a_checkpoint_is_exported_as_its_run(run: Path, tmp_path: Path) -> None:
    assert export(run / "checkpoint-3", tmp_path / "out", "--format=bf16") == 0
    found = figures(tmp_path / "out")
    assert list(found) == ["adapter on its base", "merged, original base", "bf16"]
    assert report(tmp_path / "out")["rows"] == "held-out rows of the run"
    assert found["merged, original base"]["kl"] < 1e-6


@pytest.mark.slow
def test_a_merged_folder_is_compared_with_its_run(merged: Path, exported: Path, tmp_path: Path) -> None:
    assert export(merged, tmp_path / "out", "--format=nf4") == 0
    assert list(figures(tmp_path / "out")) == ["adapter on its base", "merged", "nf4"]
    assert figures(tmp_path / "out")["nf4"]["against"] == "merged"
    assert figures(tmp_path / "out")["merged"]["kl"] < 1e-6
    assert_same_tensors(tensors_of(tmp_path / "out" / "nf4"), tensors_of(exported / "nf4"))


@pytest.mark.slow
def test_a_full_fine_tuned_run_is_exported_as_it_is(tmp_path: Path) -> None:
    run = train("random:llama", tmp_path / "full", lora=None)
    assert not (run / "adapter_config.json").exists()
    assert export(run, tmp_path / "out", "--format=bf16", "--format=nf4") == 0
    assert list(figures(tmp_path / "out")) == ["as trained", "bf16", "nf4"]
    assert report(tmp_path / "out")["rows"] == "held-out rows of the run"
    evaluated = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = [record["eval_loss"] for record in evaluated if "eval_loss" in record][-1]
    assert figures(tmp_path / "out")["as trained"]["loss"] == pytest.approx(loss, rel=1e-5)
    expected = {name: tensor.bfloat16() for name, tensor in tensors_of(run).items()}
    assert_same_tensors(tensors_of(tmp_path / "out" / "bf16"), expected)


def test_steps_are_said(merged: Path, tmp_path: Path, capsys: Said) -> None:
    output = tmp_path / "out"
    assert main(["export", str(merged), "--output", str(output), "--format=bf16", "--format=bf16"]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "bf16: writing",
        "adapter on its base: measuring",
        "merged: measuring",
        "bf16: measuring",
        f"exported: {output}",
        said.err.splitlines()[-1],
    ]
    loads = f"how each folder is loaded: {output}/*/README.md; finetune serve {output}/bf16; finetune push {output} uploads them"
    assert re.fullmatch(rf"done in 0:\d\d; {re.escape(loads)}", said.err.splitlines()[-1])
    assert said.out == (output / "report.md").read_text()


@pytest.mark.parametrize(
    ("model", "flags", "line"),
    [
        ("nowhere", ["--format=bf16"], "nowhere is neither a run (adapter_config.json) nor a model (config.json)"),
        (
            "merged",
            [],
            "no format is given; write --format with bf16, fp16, int8, nf4, fp8, w4a16, mlx-bf16, mlx-8bit, mlx-4bit, adapter, gguf:TYPE (such as gguf:Q4_K_M), gguf:all, gguf:adapter or ollama",
        ),
        (
            "merged",
            ["--format=bf16", "--base=dequantised"],
            "--base dequantised: merged is a whole model, not a run; leave out --base, or export the run that it was merged from",
        ),
        (
            "run",
            ["--format=bf16", "--base=dequantised"],
            "--base dequantised: run was not trained on a quantised base; leave it out",
        ),
        (
            "run",
            ["--format=bf16", "--gate=kl=1"],
            "--gate kl is no limit; write one of max_kl, max_kl_p99, min_top1, max_perplexity_ratio",
        ),
        (
            "exported/nf4",
            ["--format=bf16"],
            "exported/nf4: its weights are stored quantised (bitsandbytes), and would be rounded again; the model that "
            "they were made from is needed: write that model",
        ),
    ],
    ids=["no model", "no format", "merged already", "nothing to dequantise", "no such limit", "quantised already"],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    model: str,
    flags: list[str],
    line: str,
    run: Path,
    merged: Path,
    exported: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Said,
) -> None:
    monkeypatch.chdir(folder)
    assert export(Path(model), Path("out"), *flags) == 2
    assert refused(folder / "out", capsys) == f"error: {line}"


def test_a_gate_without_a_number_is_refused(merged: Path, tmp_path: Path, capsys: Said) -> None:
    with pytest.raises(SystemExit) as stop:
        export(merged, tmp_path / "out", "--format=bf16", "--gate=max_kl")
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(
        "error: argument --gate: is 'max_kl'; write NAME=VALUE, such as max_kl=0.05\n"
    )


@pytest.mark.slow
def test_an_output_that_exists_is_replaced_only_when_asked(merged: Path, tmp_path: Path, capsys: Said) -> None:
    output = tmp_path / "out"
    assert export(merged, output, "--format=bf16") == 0
    before = (output / "report.json").read_bytes()
    capsys.readouterr()
    assert export(merged, output, "--format=fp16") == 2
    assert capsys.readouterr().err == (
        f"error: --output: {output} exists; write another path, or add --overwrite to replace it\n"
    )
    assert (output / "report.json").read_bytes() == before
    assert export(merged, output, "--format=fp16", "--overwrite") == 0
    assert {path.name for path in output.iterdir()} == {"fp16", "report.json", "report.md"}


@pytest.mark.slow
def test_a_failed_export_leaves_the_old_one(merged: Path, copy: Copy, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert export(merged, output, "--format=bf16") == 0
    model = copy(merged)
    (model / "model.safetensors").write_bytes(b"short")
    assert export(model, output, "--format=fp16", "--overwrite") == 2
    assert {path.name for path in output.iterdir()} == {"bf16", "report.json", "report.md"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "copy"}


def test_what_export_did_not_write_is_not_replaced(merged: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    assert export(merged, tmp_path / "mine", "--format=bf16", "--overwrite") == 2
    assert (tmp_path / "mine" / "letter.txt").read_text() == "x"


# ---------------------------------------------------------------------------------------------------------------
# The rows that are predicted


def test_held_out_rows_are_the_runs(run: Path) -> None:
    rows, where = held_out(run)
    ledger = json.loads((run / "ledger.json").read_text())
    assert where == "held-out rows of the run"
    assert len(rows) == ledger["eval"]["rows"]["kept"]
    assert all(len(row.input_ids) == len(row.labels) <= 128 for row in rows)


def test_rows_of_training_stand_in_where_none_were_held_out(run: Path, copy: Copy) -> None:
    rows, where = held_out(copy(run, data__eval_fraction=None))
    assert where == "rows that the run was trained on (it held none out)"
    assert len(rows) == 32


@pytest.mark.slow
def test_the_sample_rows_stand_in_where_the_data_are_gone(run: Path, copy: Copy, tmp_path: Path, capsys: Said) -> None:
    model = copy(run, data__train=[{"path": "gone.jsonl"}])
    said: list[str] = []
    rows, where = held_out(model, said.append)
    assert (where, len(rows)) == ("sample rows of this project", 32)
    assert len(said) == 1
    assert re.fullmatch(
        r"the run's rows cannot be read \(.*recipe.yaml:\d+: data.train.0.path: is .*gone.jsonl.*, and there is no such file; .*\); "
        "the project's sample rows are used",
        said[0],
    )
    output = tmp_path / "out"
    assert main(["export", str(model), "--output", str(output), "--format=bf16"]) == 0
    assert said[0] in capsys.readouterr().err.splitlines()
    assert report(output)["rows"] == where
    assert "trained tokens of sample rows of this project." in (output / "report.md").read_text()


def test_streamed_training_rows_are_not_gone_through_for_it(run: Path, copy: Copy) -> None:
    source = {"path": str(ROOT / "data" / "chat_sample.jsonl"), "streaming": True}
    _, where = held_out(copy(run, data__train=[source], data__eval_fraction=None))
    assert where == "sample rows of this project"


@pytest.mark.slow
def test_a_model_without_a_template_predicts_bare_text(tmp_path: Path) -> None:
    model = tmp_path / "bare"
    shutil.copytree(locate("random:llama"), model)
    (model / "chat_template.jinja").unlink()
    rows, where = held_out(model)
    assert (where, len(rows)) == ("sample rows of this project", 32)
    assert all(row.labels[1:] == row.input_ids[1:] for row in rows)
    assert export(model, tmp_path / "out", "--format=bf16") == 0
    assert figures(tmp_path / "out")["bf16"]["conversations_equal"] == 10


# ---------------------------------------------------------------------------------------------------------------
# What loads an export


@pytest.mark.parametrize("kind", FORMATS)
def test_generate_answers_with_an_exported_folder(exported: Path, kind: str, capsys: Said) -> None:
    arguments = ["generate", str(exported / kind), "--prompt", "Hello", "--max-new-tokens", "8"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    generator = load_generator(str(exported / kind))
    answer = generator.answer_ids([{"role": "user", "content": "Hello"}], Sampling(8))
    assert first == generator.chat.tokenizer.decode(answer, skip_special_tokens=True) + "\n"
    assert generator.stop_ids == (1, 5)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_folder_is_loaded_as_it_is(exported: Path, kind: str) -> None:
    model = load_generator(str(exported / kind), LoadOptions(dtype="bfloat16")).model
    assert type(model.model.layers[0].mlp.up_proj).__name__ == ("Linear8bitLt" if kind == "int8" else "Linear4bit")
    stored = tensors_of(exported / kind)["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight.data.cpu(), stored)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_a_base_with_missing_weights_is_refused(tmp_path: Path) -> None:
    """Upstream fills them at random, and the model answers as if nothing were wrong."""

    def lose(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]

    path = altered(Path(locate("random:llama")), tmp_path / "holes", lose)
    with pytest.raises(ModelError) as error:
        load_base(str(path), torch.float32)
    assert str(error.value) == (
        f"model.name_or_path: {path} does not hold model.layers.1.mlp.up_proj.weight (and 1 more of its weights)"
    )


def test_an_export_of_a_model_with_missing_weights_is_refused(tmp_path: Path, capsys: Said) -> None:
    path = altered(Path(locate("random:llama")), tmp_path / "holes", lambda tensors: tensors.pop("model.norm.weight"))
    assert export(path, tmp_path / "out", "--format=nf4") == 2
    assert refused(tmp_path / "out", capsys) == (
        "error: the base's files do not hold model.norm.weight (and 0 more): they are of another model"
    )
