"""Adapters merged: every number beside PEFT's `merge_and_unload()`, bad input refused whole, nothing half written."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from hub import COMMIT, serve
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from processes import in_a_child
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import finetune.merge.run
import finetune.model.shards
from finetune import __version__
from finetune.cli.commands import main
from finetune.merge import tensor_map
from finetune.merge.changes import Change
from finetune.merge.plan import MergePlan, make_plan
from finetune.merge.request import MergeRequest
from finetune.merge.run import merge, plan_in_fresh_process
from finetune.model.load import load_base
from finetune.model.locate import locate
from finetune.model.shards import fingerprint, read_headers
from finetune.recipe.checks import RANDOM_ARCHITECTURES
from finetune.system.files import WEIGHTS_INDEX, sha256
from finetune.system.terminal import quiet

Options = dict[str, Any]
Dtype = torch.dtype
Locate = Callable[[str], Path]

PROMPT = torch.arange(3, 40)[None]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
NF4_SINGLE = NF4 | {"bnb_4bit_use_double_quant": False}
INT8 = {"load_in_8bit": True}

# ---------------------------------------------------------------------------------------------------------------
# Bases and adapters

SHAPE: Options = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
CONFIGS: dict[str, tuple[str, Options]] = {
    "llama with biases": ("llama", SHAPE | {"attention_bias": True, "mlp_bias": True}),
    "small llama": ("llama", SHAPE | {"hidden_size": 32}),
    "qwen2": ("qwen2", SHAPE),
    # Experts lie on the disk one by one and are one tensor in memory.
    "mixtral": ("mixtral", SHAPE | {"num_local_experts": 4}),
    "qwen2_moe": (
        "qwen2_moe",
        SHAPE | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    # Its linear layers are stored turned.
    "gpt2": (
        "gpt2",
        {"vocab_size": 1024, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
        | {"bos_token_id": 2, "eos_token_id": 1},
    ),
    # On the disk its names begin with language_model.
    "multimodal gemma3": (
        "gemma3",
        {
            "text_config": SHAPE
            | {
                "head_dim": 16,
                "sliding_window": 32,
                "layer_types": ["sliding_attention", "full_attention"],
                "query_pre_attn_scalar": 16,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": 5,
            "eoi_token_index": 6,
            "image_token_index": 7,
        },
    ),
    # Large enough that its merge can be killed at many different moments.
    "large llama": ("llama", SHAPE | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}),
}
TIED = {"random:gemma", "random:gemma2", "random:gemma3", "random:gemma3n", "random:gemma4", "random:gemma4_moe"}
TIED |= {"gpt2", "multimodal gemma3"}


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Locate:
    """The directory of a tiny base by its name, made when first asked for; "X, untied" has X's embeddings apart."""
    root = tmp_path_factory.mktemp("bases")

    def find(name: str) -> Path:
        if name.startswith("random:") and not name.endswith(", untied"):
            return Path(locate(name))
        folder = root / name.replace(" ", "-")
        if not folder.exists():
            with quiet():
                model = untied(find(name.removesuffix(", untied"))) if name.endswith(", untied") else new(name)
                model.save_pretrained(folder)
                AutoTokenizer.from_pretrained(locate("random:llama")).save_pretrained(folder)
        return folder

    return find


def new(name: str) -> Any:
    kind, shape = CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape), dtype=torch.float32)
    for parameter, tensor in model.named_parameters():
        if "bias" in parameter:
            torch.nn.init.normal_(tensor, 0, 0.1)
    return model


def untied(base: Path) -> Any:
    """The same model with an output matrix of its own."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    return model


@contextmanager
def unwarned() -> Iterator[None]:
    """PEFT warns of tied embeddings, of what it sets by itself and of what it saves; none of it is ours."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        yield


def make_run(
    base: Path, run: Path, dtype: Dtype = torch.float32, seed: int = 1, quantization: Options | None = None, **lora: Any
) -> Path:
    """A run directory with an adapter of which no number is zero, as the trainer would leave it."""
    with unwarned():
        model = load(base, dtype)
        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 7} | lora))
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.05)  # in place: what is tied stays tied
        model.save_pretrained(run)
    name = str(dtype).removeprefix("torch.")
    recipe = {"model": {"name_or_path": str(base), "dtype": name}, "quantization": quantization}
    (run / "recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v}))
    environment = {"dtype": name, "base_commit": None, "base_fingerprint": fingerprint(base)}
    (run / "environment.json").write_text(json.dumps(environment))
    return run


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in expected.items()}
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(PROMPT).logits.float()


def load(folder: Path, dtype: Dtype | str = "auto") -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture(autouse=True)
def _several_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tiny tensors, too, are read and written in several slices.
    monkeypatch.setattr(finetune.model.shards, "SLICE", 5000)


# ---------------------------------------------------------------------------------------------------------------
# To the bit

QV = ["q_proj", "v_proj"]
KINDS: dict[str, Options] = {
    "all linear": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": QV,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
    },
    "rslora": {"target_modules": QV, "use_rslora": True, "rank_pattern": {"v_proj": 6}},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "dora embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "bias lora_only": {"target_modules": QV, "bias": "lora_only"},
    "bias all": {"target_modules": QV, "bias": "all"},
    "lora_bias": {"target_modules": QV, "lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "both ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "both ends, kept tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "modules_to_save": {"target_modules": QV, "modules_to_save": ["embed_tokens", "norm"]},
    "modules_to_save, kept tied": {
        "target_modules": QV,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "modules_to_save, both ends": {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]},
    "token rows": {"target_modules": QV, "trainable_token_indices": [3, 5]},
    "token rows, both ends": {
        "target_modules": QV,
        "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 6]},
    },
    "experts": {"target_modules": QV, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "some experts": {"target_modules": QV, "target_parameters": ["mlp.experts.gate_up_proj"]},
    "router": {"target_modules": ["q_proj", "gate"]},
    "experts beside mlp": {"target_modules": QV, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "conv1d": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "conv1d dora": {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True},
    "conv1d and embedding": {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True},
}
# Where embeddings are tied and each side is trained by itself, or one alone, PEFT's merge adds every update to the one
# tensor that both sides are (0.21): the merged model then answers otherwise than the adapter. Ours has two tensors; the
# reference is PEFT's merge into the same base with its sides apart.
EACH_SIDE_BY_ITSELF = {
    "dora embedding",
    "embedding",
    "lm_head",
    "both ends",
    "both ends, kept tied",
    "token rows, both ends",
    "conv1d and embedding",
}
CASES = [
    ("llama with biases", "all linear"),
    ("llama with biases", "bias lora_only"),
    ("llama with biases", "lora_bias"),
    ("llama with biases", "dora embedding"),
    ("llama with biases", "both ends"),
    ("llama with biases", "token rows, both ends"),
    ("qwen2", "bias all"),
    ("qwen2", "rslora"),
    ("random:gemma", "dora"),
    ("random:gemma", "embedding"),
    ("random:gemma2", "patterns"),
    ("random:gemma2", "modules_to_save"),
    ("random:gemma3", "dora embedding"),
    ("random:gemma3", "lm_head"),
    ("random:gemma3", "token rows"),
    ("random:gemma3", "token rows, both ends"),
    ("random:gemma3", "both ends, kept tied"),
    ("random:gemma3", "modules_to_save, kept tied"),
    ("random:gemma3", "modules_to_save, both ends"),
    ("random:gemma3n", "all linear"),
    ("random:gemma4", "dora embedding"),
    ("random:gemma4_moe", "all linear"),
    ("random:gemma4_moe", "experts beside mlp"),
    ("multimodal gemma3", "all linear"),
    ("multimodal gemma3", "lm_head"),
    ("mixtral", "experts"),
    ("mixtral", "router"),
    ("qwen2_moe", "all linear"),
    ("qwen2_moe", "some experts"),
    ("gpt2", "conv1d"),
    ("gpt2", "conv1d dora"),
    ("gpt2", "conv1d and embedding"),
]
BASES = ["llama with biases", "qwen2", "mixtral", "qwen2_moe", "gpt2", "multimodal gemma3"]
BASES += [f"random:{name}" for name in RANDOM_ARCHITECTURES]


def fits(base: str, kind: str) -> bool:
    """True if a base has the layers that this kind needs."""
    if base == "gpt2" or kind.startswith("conv1d"):
        return base == "gpt2" and kind.startswith("conv1d")
    if kind == "experts beside mlp":
        return base == "random:gemma4_moe"
    if kind in ("experts", "some experts", "router"):
        return base == "mixtral" or (base == "qwen2_moe" and kind != "router")
    if kind == "dora" and base == "mixtral":
        return False  # all its linear layers are experts, too, which PEFT trains without DoRA
    return kind != "lora_bias" or base in ("llama with biases", "qwen2")


SOAK = [(b, k) for b in BASES for k in KINDS if fits(b, k) and (b, k) not in CASES]


# Every case in bfloat16, in which a sum in another order shows, and each sixth in float32; all in tier `soak`.
QUICK = {*((*case, "bfloat16") for case in CASES), *((*case, "float32") for case in CASES[::6])}


@pytest.mark.parametrize(
    ("name", "kind", "dtype_name"),
    [
        pytest.param(*case, dtype, marks=[] if (*case, dtype) in QUICK else [pytest.mark.soak])
        for case in (*CASES, *SOAK)
        for dtype in ("float32", "bfloat16")
    ],
)
def test_every_tensor_is_that_of_peft_and_the_logits_are_the_adapters(
    name: str, kind: str, dtype_name: str, base_of: Locate, tmp_path: Path
) -> None:
    dtype = getattr(torch, dtype_name)
    run = make_run(base_of(name), tmp_path / "run", dtype, **KINDS[kind])
    merge(run, tmp_path / "merged")

    both = name in TIED and kind in EACH_SIDE_BY_ITSELF
    with unwarned():
        adapted = PeftModel.from_pretrained(load(base_of(name), dtype), run)
        answered = logits(adapted)
        if both:
            if kind == "both ends, kept tied":
                ends = {"ensure_weight_tying": False, "target_modules": ["embed_tokens", "lm_head"]}
                configure(run / "adapter_config.json", **ends)
            adapted = PeftModel.from_pretrained(load(base_of(f"{name}, untied"), dtype), run)
        adapted.merge_and_unload().save_pretrained(tmp_path / "reference")

    found, expected = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "reference")
    if name == "multimodal gemma3" and "lm_head.weight" in expected:
        # transformers stores it without the prefix that all others have; it finds either.
        expected["language_model.lm_head.weight"] = expected.pop("lm_head.weight")
    merged = load(tmp_path / "merged")
    assert next(merged.parameters()).dtype == dtype
    kept_tied = name in TIED and kind.endswith("kept tied") and not any("lm_head" in n for n in found)
    if kept_tied and both:
        (head,) = (n for n in expected if "lm_head" in n)
        embeddings = expected[head.replace("lm_head", "model.embed_tokens")]
        assert torch.equal(expected.pop(head), embeddings)
    assert_same_tensors(found, expected)
    # float32: sums in another order. bfloat16: the adapter's product is rounded apart from the base's in each layer, to
    # eight bits, where the merged weight is rounded once, and a router may choose another expert; logits are near 1.
    tolerance = 1e-5 if dtype == torch.float32 else 0.5 if name == "random:gemma4_moe" else 0.15
    assert apart(logits(merged), answered) < tolerance
    assert apart(logits(load(base_of(name), dtype)), answered) > 1e-3  # the adapter does something
    ends = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert merged.config.get_text_config().tie_word_embeddings == (ends[0] is ends[1])
    if both and not kept_tied:
        assert ends[0] is not ends[1]
        assert not torch.equal(*ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.slow
def test_several_adapters_are_pefts_cat(dtype: Dtype, base_of: Locate, tmp_path: Path) -> None:
    base = base_of("llama with biases")
    one = make_run(base, tmp_path / "one", dtype, target_modules=[*QV, "embed_tokens"], rank_pattern={"v_proj": 3})
    other = make_run(base, tmp_path / "other", dtype, seed=2, r=2, target_modules=["q_proj", "o_proj", "embed_tokens"])
    merge(one, tmp_path / "merged", adapters=[(str(one), 0.7), (str(other), -0.3)])
    merge(one, tmp_path / "plus", adapters=[(str(other), -0.3)])
    for folder, weights in (("merged", [0.7, -0.3]), ("plus", [1.0, -0.3])):
        with unwarned():
            # On a bfloat16 base PEFT would round the sum of the adapters before it multiplies (0.21).
            model = PeftModel.from_pretrained(load(base, torch.float32), one, adapter_name="one")
            model.load_adapter(str(other), "other")
            model.add_weighted_adapter(["one", "other"], weights, "sum", combination_type="cat")
            model.save_pretrained(tmp_path / f"adapter of {folder}", selected_adapters=["sum"])
            adapter = tmp_path / f"adapter of {folder}" / "sum"
            model = PeftModel.from_pretrained(load(base, dtype), adapter)
            answered = logits(model)
            model.merge_and_unload().save_pretrained(tmp_path / f"reference of {folder}")
        assert_same_tensors(tensors_of(tmp_path / folder), tensors_of(tmp_path / f"reference of {folder}"))
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        assert apart(logits(load(tmp_path / folder)), answered) < tolerance
    record = json.loads((tmp_path / "merged/merge.json").read_text())
    assert [(item["path"], item["weight"]) for item in record["adapters"]] == [(str(one), 0.7), (str(other), -0.3)]


def test_the_run_itself_is_weighed_on_the_command_line(base_of: Locate, tmp_path: Path) -> None:
    base = base_of("llama with biases")
    run = make_run(base, tmp_path / "run", target_modules=QV, bias="lora_only", modules_to_save=["model.norm"])
    assert main(["merge", str(run), "--output", str(tmp_path / "half"), "--adapter", f"{run}=0.5"]) == 0
    assert main(["merge", str(run), "--output", str(tmp_path / "whole")]) == 0
    start, half, whole = (tensors_of(folder) for folder in (base, tmp_path / "half", tmp_path / "whole"))
    changed = {name for name in start if not torch.equal(start[name], whole[name])}
    ends = ("q_proj.weight", "q_proj.bias", "v_proj.weight", "v_proj.bias", "model.norm.weight")
    assert changed == {name for name in start if name.endswith(ends)}
    for name in start:
        # Half the update by other roundings: to some units in the last place of float32.
        torch.testing.assert_close(half[name], (start[name] + whole[name]) / 2, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------
# The base that a quantised run trained against


def dequantised(base: Path, dtype: Dtype, quantization: Options) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model loaded as in training, and the values of its quantised weights as bitsandbytes gives them back."""
    import bitsandbytes as bnb

    with unwarned():
        model = load_base(str(base), dtype, quantization)
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, bnb.nn.Linear4bit):
            found[f"{name}.weight"] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scales = weight.SCB if weight.SCB is not None else module.state.SCB
            found[f"{name}.weight"] = bnb.functional.int8_vectorwise_dequant(weight.data, scales).to(dtype)
    return model, found


def assert_starts_from_rounded_values(
    base: Path, run: Path, merged: Path, dtype: Dtype, quantization: Options, tolerance: float, turned: bool = False
) -> None:
    model, rounded = dequantised(base, dtype, quantization)
    adapter = load_file(run / "adapter_model.safetensors")
    options = json.loads((run / "adapter_config.json").read_text())
    scaling = options["lora_alpha"] / options["r"]
    start, found = tensors_of(base), tensors_of(merged)
    assert rounded
    for name, tensor in found.items():
        expected = rounded[name] if name in rounded else start[name].to(dtype)
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in adapter:
            expected = (expected + adapter[f"{key}B.weight"] @ adapter[f"{key}A.weight"] * scaling).to(dtype)
        expected = expected.T if turned and name in rounded else expected
        assert torch.equal(tensor, expected), name
    with unwarned():
        answered = logits(PeftModel.from_pretrained(model, run))
    merge(run, merged.with_name("from the original"))
    far = apart(logits(load(merged.with_name("from the original"))), answered)
    near = apart(logits(load(merged)), answered)
    assert near < tolerance
    assert near < (far if quantization.get("load_in_8bit") else far / 2)


@pytest.mark.parametrize(
    ("name", "dtype", "quantization", "tolerance"),
    [
        # float32: sums in another order.
        ("random:gemma3", torch.float32, NF4, 1e-5),
        ("llama with biases", torch.float32, NF4_SINGLE, 1e-5),
        # bfloat16 rounds the adapter's product apart from the base's.
        ("llama with biases", torch.bfloat16, NF4, 0.02),
        # The 8-bit layer rounds what goes into it, too.
        ("llama with biases", torch.float32, INT8, 0.01),
        ("qwen2", torch.float32, INT8 | {"llm_int8_skip_modules": ["lm_head", "v_proj"]}, 0.01),
    ],
    ids=["nf4", "nf4 without double quantisation", "nf4 in bfloat16", "int8", "int8 but for some"],
)
def test_the_merge_starts_from_what_the_run_trained_against(
    name: str, dtype: Dtype, quantization: Options, tolerance: float, base_of: Locate, tmp_path: Path
) -> None:
    run = make_run(base_of(name), tmp_path / "run", dtype, quantization=quantization, target_modules=QV)
    merge(run, tmp_path / "merged", base="dequantised")
    assert_starts_from_rounded_values(base_of(name), run, tmp_path / "merged", dtype, quantization, tolerance)
    assert json.loads((tmp_path / "merged/merge.json").read_text())["base_weights"] == "dequantised"
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished QLoRA run, by the trainer itself."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = {
        "model": {"name_or_path": "random:gemma3", "dtype": "float32"},
        "quantization": NF4,
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "data": {"train": [{"path": str(ROOT / "data" / "chat_sample.jsonl")}]},
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "gradient_checkpointing": False,
            "max_length": 128,
            "save_strategy": "steps",
            "save_steps": 1,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with warnings.catch_warnings():
        assert main(["train", "--quiet", str(folder / "recipe.yaml")]) == 0
    return folder / "run"


def test_a_trained_run_becomes_a_model_with_all_that_belongs_to_it(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    merged = tmp_path / "merged"
    capfd.readouterr()
    assert main(["merge", str(trained), "--output", str(merged), "--base", "dequantised"]) == 0
    out, err = capfd.readouterr()
    then = f"talk to it: finetune generate {merged}; serve it: finetune serve {merged}"
    done = rf"merged: {merged}\ndone in 0:\d\d; {then}\n"
    assert (out, bool(re.fullmatch(done, err))) == ("", True), err
    assert sorted(path.name for path in merged.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merge.json",
        "model.safetensors",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    base = Path(locate("random:gemma3"))
    assert json.loads((merged / "merge.json").read_text()) == {
        "base": "random:gemma3",
        "revision": None,
        "dtype_of_training": "float32",
        "finetune": __version__,
        "run": str(trained),
        "adapters": [{"path": str(trained), "weight": 1.0, "sha256": sha256(trained / "adapter_model.safetensors")}],
        "base_weights": "dequantised",
        "dtype": "float32",
    }
    for name in ("chat_template.jinja", "recipe.yaml"):
        assert (merged / name).read_bytes() == (trained / name).read_bytes()
    config = json.loads((merged / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("float32", ["Gemma3ForCausalLM"])
    with quiet():
        ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (merged, trained))
        eos = GenerationConfig.from_pretrained(merged).eos_token_id
    text = "Guten Tag, 世界!\n  def f(): <start_of_turn>"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.convert_ids_to_tokens(eos) == ["<eos>", "<end_of_turn>"]
    assert_starts_from_rounded_values(base, trained, merged, torch.float32, NF4, tolerance=1e-5)


@pytest.mark.slow
def test_a_checkpoint_of_a_run_is_merged_as_the_run_is(trained: Path, tmp_path: Path) -> None:
    merge(trained, tmp_path / "run")
    merge(trained / "checkpoint-2", tmp_path / "last")
    merge(trained / "checkpoint-1", tmp_path / "first")
    last = tensors_of(tmp_path / "last")
    assert_same_tensors(last, tensors_of(tmp_path / "run"))
    assert not torch.equal(
        *(t["model.layers.0.self_attn.q_proj.weight"] for t in (last, tensors_of(tmp_path / "first")))
    )
    assert (tmp_path / "last/recipe.yaml").read_bytes() == (trained / "recipe.yaml").read_bytes()


def test_an_adapter_of_somebody_else_names_its_base_itself(base_of: Locate, tmp_path: Path) -> None:
    """Without our recipe and environment: the base of adapter_config.json, in the type that its config names."""
    base = tmp_path / "base"
    with quiet():
        load(base_of("qwen2"), torch.bfloat16).save_pretrained(base)
    shutil.copy(base_of("qwen2") / "tokenizer.json", base)
    shutil.copy(base_of("qwen2") / "tokenizer_config.json", base)
    run = make_run(base, tmp_path / "run", torch.bfloat16, target_modules=QV)
    merge(run, tmp_path / "with")
    (run / "recipe.yaml").unlink()
    (run / "environment.json").unlink()
    merge(run, tmp_path / "without")
    assert_same_tensors(tensors_of(tmp_path / "without"), tensors_of(tmp_path / "with"))
    assert load(tmp_path / "without").dtype == torch.bfloat16
    assert not (tmp_path / "without/recipe.yaml").exists()


# ---------------------------------------------------------------------------------------------------------------
# Types and shards


@pytest.mark.parametrize("name", ["random:gemma3", "mixtral"])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_another_type_is_the_merge_in_the_runs_type_converted(
    name: str, wanted: Dtype, base_of: Locate, tmp_path: Path
) -> None:
    kind = "experts" if name == "mixtral" else "all linear"
    run = make_run(base_of(name), tmp_path / "run", torch.bfloat16, **KINDS[kind])
    word = str(wanted).removeprefix("torch.")
    merge(run, tmp_path / "plain")
    merge(run, tmp_path / "merged", dtype=word)
    found = tensors_of(tmp_path / "merged")
    assert_same_tensors(found, {n: t.to(wanted) for n, t in tensors_of(tmp_path / "plain").items()})
    assert load(tmp_path / "merged").dtype == wanted
    record = json.loads((tmp_path / "merged/merge.json").read_text())
    assert (record["dtype_of_training"], record["dtype"]) == ("bfloat16", word)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"])
def test_what_does_not_fit_float16_is_named(
    name: str, base_of: Locate, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_of("qwen2"), "base")
    tensors = load_file("base/model.safetensors")
    tensors[name][5, 3] = -70_000.0  # 70,144 in bfloat16
    save_file(tensors, "base/model.safetensors", {"format": "pt"})
    make_run(Path("base"), Path("run"), torch.bfloat16, target_modules=["q_proj"])
    assert refused(capsys, "run", "--dtype", "float16") == (
        f"{name}: 70,144 does not fit float16 (65,504 at most); write bfloat16"
    )


@pytest.mark.slow
def test_shards_have_an_index_and_load(base_of: Locate, tmp_path: Path) -> None:
    run = make_run(base_of("random:gemma3"), tmp_path / "run", target_modules="all-linear")
    merge(run, tmp_path / "one")
    merge(run, tmp_path / "many", max_shard_size="100KB")
    index = json.loads((tmp_path / "many" / WEIGHTS_INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 5
    assert files == [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    parts = {name: load_file(tmp_path / "many" / name) for name in files}
    assert index["weight_map"] == {tensor: name for name, part in parts.items() for tensor in part}
    sizes = {name: sum(t.nbytes for t in part.values()) for name, part in parts.items()}
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    assert all(size <= 100_000 or len(parts[name]) == 1 for name, size in sizes.items())
    assert_same_tensors(tensors_of(tmp_path / "many"), tensors_of(tmp_path / "one"))
    assert torch.equal(logits(load(tmp_path / "many")), logits(load(tmp_path / "one")))


def test_tensors_that_are_no_part_of_the_model_are_kept_as_they_are(base_of: Locate, tmp_path: Path) -> None:
    """As old checkpoints hold `rotary_emb.inv_freq`; whole numbers and odd sizes among them."""
    shutil.copytree(base_of("qwen2"), tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    other = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(3), "counts": torch.arange(5)}
    save_file(tensors | other, tmp_path / "base/model.safetensors", {"format": "pt"})
    run = make_run(tmp_path / "base", tmp_path / "run", target_modules=QV)
    merge(run, tmp_path / "merged")
    found = tensors_of(tmp_path / "merged")
    assert_same_tensors({name: found[name] for name in other}, other)
    assert found.keys() == tensors.keys() | other.keys()


def test_planning_tensors_leaves_the_changes_of_the_adapters_as_they_are() -> None:
    """The second of two tied tensors takes over the first one's changes only in the returned plan."""
    stored = read_headers(Path(locate("random:gemma3")))
    config = AutoConfig.from_pretrained(locate("random:gemma3"))
    model, types = tensor_map.skeleton(config, torch.float32, False)
    changes = {"model.embed_tokens.weight": [Change(0, "rows", {"rows": "delta"}, rows=(3,))]}
    before = dict(changes)
    names = tensor_map.TensorNames(model, stored)
    tensors, _, untied = tensor_map.plan_tensors(names, changes, {"lm_head.weight"}, types, types, {})
    assert changes == before
    assert not untied
    assert [item.name for item in tensors if item.changes] == ["model.embed_tokens.weight"]


@pytest.mark.slow
def test_a_plan_passes_between_processes_as_it_is(base_of: Locate, tmp_path: Path) -> None:
    """Also with fused experts, and without transformers in the calling process."""
    make_run(base_of("mixtral"), tmp_path / "run", **KINDS["all linear"])
    run = str(tmp_path / "run")
    request = MergeRequest(run, ((run, 0.1),), str(tmp_path), dtype="bfloat16")
    with unwarned():
        plan = make_plan(request)
    assert plan.fused
    assert plan_in_fresh_process(request) == plan
    code = "import sys, finetune.merge.run; print({'transformers', 'peft', 'trl'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"


# ---------------------------------------------------------------------------------------------------------------
# Bad input


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a merge into `merged` ends with; nothing that was there is changed, nothing new is there."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()}
    names = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert main(["merge", *arguments, *([] if "--output" in arguments else ["--output", "merged"])]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(Path().rglob("*")) == names
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()} == before
    return err.removeprefix("error: ").removesuffix("\n")


@pytest.fixture
def run(base_of: Locate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on `base`, both in the working directory, for a test to damage."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_of("qwen2"), "base")
    return make_run(Path("base"), Path("run"), target_modules=QV)


def configure(file: str | Path, **values: Any) -> None:
    path = Path(file)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_adapter(change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file("run/adapter_model.safetensors")
    change(tensors)
    save_file(tensors, "run/adapter_model.safetensors")


def base_shards() -> None:
    with quiet():
        load(Path("base")).save_pretrained("base", max_shard_size="200KB")
    Path("base/model.safetensors").unlink(missing_ok=True)


def cut(path: str) -> None:
    os.truncate(path, Path(path).stat().st_size - 100)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
SHARD = "model-00002-of-00004.safetensors"


def other_weights() -> None:
    tensors = load_file("base/model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, "base/model.safetensors", {"format": "pt"})


def two_models() -> None:
    tensors = load_file("base/model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, "base/model.safetensors", {"format": "pt"})
    Path("run/environment.json").unlink()


def pickled() -> None:
    Path("run/adapter_model.safetensors").unlink()
    Path("run/adapter_model.bin").write_bytes(b"not read")


def cut_shard() -> None:
    base_shards()
    cut(f"base/{SHARD}")


def no_shard() -> None:
    base_shards()
    Path(f"base/{SHARD}").unlink()


def ia3() -> None:
    IA3Config(target_modules=["k_proj"], feedforward_modules=[], base_model_name_or_path="base").save_pretrained("run")


BAD: dict[str, tuple[Callable[[], Any], list[str], str]] = {
    "adapter of another base": (
        lambda: change_adapter(lambda t: t.update({KEY: torch.ones(4, 32)})),
        [],
        f"run: {KEY} is [4, 32], but its base needs [4, 64]: the adapter is of another base",
    ),
    "other base weights": (
        other_weights,
        [],
        "run: was trained on another base: the weights in base are not those that environment.json records in "
        "base_fingerprint; write the directory of that base",
    ),
    "weights and config of two models": (
        two_models,
        [],
        "model.norm.weight of the base is [3], where its config.json makes [64]: the weights and the config are of two "
        "models",
    ),
    "pickled adapter": (
        pickled,
        [],
        "run holds only adapter_model.bin, a pickle, which can run code when it is read; an adapter must be saved as "
        "adapter_model.safetensors",
    ),
    "no adapter weights": (
        lambda: Path("run/adapter_model.safetensors").unlink(),
        [],
        "run holds no adapter_model.safetensors; an adapter must be saved as adapter_model.safetensors",
    ),
    "adapter cut off": (
        lambda: cut("run/adapter_model.safetensors"),
        [],
        "run/adapter_model.safetensors is damaged: it has {size:,} bytes where its header says {whole:,}",
    ),
    "base cut off": (
        lambda: cut("base/model.safetensors"),
        [],
        "base/model.safetensors is damaged: it has {size:,} bytes where its header says {whole:,}",
    ),
    "shard cut off": (
        cut_shard,
        [],
        f"base/{SHARD} is damaged: it has {{size:,}} bytes where its header says {{whole:,}}",
    ),
    "shard missing": (
        no_shard,
        [],
        f"base/{SHARD} is missing, though model.safetensors.index.json names it",
    ),
    "NaN": (
        lambda: change_adapter(lambda t: t[KEY].view(-1)[77:78].fill_(float("nan"))),
        [],
        f"run/adapter_model.safetensors: {KEY} holds NaN or infinity; the run that saved it is broken",
    ),
    "infinity": (
        lambda: change_adapter(lambda t: t[KEY].view(-1)[:1].fill_(-float("inf"))),
        [],
        f"run/adapter_model.safetensors: {KEY} holds NaN or infinity; the run that saved it is broken",
    ),
    "key of no layer": (
        lambda: change_adapter(lambda t: t.update({KEY.replace("layers.0", "layers.2"): t[KEY].clone()})),
        [],
        f"run is of another base: it holds {KEY.replace('layers.0', 'layers.2')}, which is no part of this one",
    ),
    "key missing": (
        lambda: change_adapter(lambda t: t.pop(KEY)),
        [],
        f"run is of another base, or damaged: it lacks {KEY}",
    ),
    "no such layers": (
        lambda: configure("run/adapter_config.json", target_modules=["query"]),
        [],
        "run does not fit its base: Target modules {{'query'}} not found in the base model. Please check the target "
        "modules and try again.",
    ),
    **{
        init: (
            partial(configure, "run/adapter_config.json", init_lora_weights=init),
            [],
            f"run: init_lora_weights is {init}, which changed the base's own weights before training; train it here, "
            "which saves it as plain LoRA, or let PEFT (path_initial_model_for_weight_conversion)",
        )
        for init in ("pissa", "pissa_niter_4", "olora")
    },
    "layer_replication": (
        lambda: configure("run/adapter_config.json", layer_replication=[[0, 2], [1, 2]]),
        [],
        "run: layer_replication has no merged form; use the adapter without a merge",
    ),
    "not LoRA": (ia3, [], "run: peft_type is IA3; only LORA is merged"),
    "lora_bias without a bias": (
        lambda: make_run(Path("base"), Path("run"), target_modules=["o_proj"], lora_bias=True),
        [],
        "run: model.layers.0.self_attn.o_proj has a lora_bias, but the base has no bias to take it up",
    ),
    "quantised base": (
        lambda: configure("base/config.json", quantization_config={"quant_method": "awq", "bits": 4}),
        [],
        "base: its weights are stored quantised (awq), and would be rounded again; the model that they were made from "
        "is needed: write its path or id with --base",
    ),
    "dequantised without quantisation": (
        lambda: None,
        ["--base", "dequantised"],
        "--base dequantised: run was not trained on a quantised base; leave it out",
    ),
    **{
        size: (
            lambda: None,
            ["--max-shard-size", size],
            f"--max-shard-size is '{size}'; write such as 5GB or 500MB",
        )
        for size in ("much", "0", "5XB", "GB", "0.0001KB")
    },
    "no such further adapter": (
        lambda: None,
        ["--adapter", "nowhere=0.5"],
        "--adapter nowhere=0.5: nowhere holds no adapter (adapter_config.json)",
    ),
    "weighted DoRA": (
        lambda: make_run(Path("base"), Path("run"), target_modules=QV, use_dora=True),
        ["--adapter", "run=0.5"],
        "model.layers.0.self_attn.q_proj.weight: DoRA adapters cannot be weighted or added to others; merge it alone",
    ),
    "output is a file": (
        lambda: Path("merged").write_text("mine"),
        ["--overwrite"],
        "--output: merged is a file; write the path of a new folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    damage: Callable[[], Any], arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage()
    size = Path(message.split(" ")[0]).stat().st_size if "{size" in message else 0
    assert refused(capsys, "run", *arguments) == message.format(size=size, whole=size + 100)


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf"])
def test_a_weight_that_is_not_finite_is_refused(weight: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "run" in refused(capsys, "run", "--adapter", f"run={weight}")


def test_a_weight_that_no_number_can_carry_is_told_by_the_tensor(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "run", "--adapter", "run=1e39")
    assert line.startswith("model.layers.0.self_attn.q_proj.weight: is not finite once it is merged")


def test_an_output_that_is_read_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "merge.json").write_text("{}")
    line = refused(capsys, "run", "--output", "run", "--overwrite")
    assert line == "--output: run contains run, which is read; write another path"


def test_a_further_adapter_of_another_base_is_refused(
    run: Path, base_of: Locate, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_run(Path("base"), Path("other"), target_modules=QV)
    configure(run / "environment.json", base_fingerprint=fingerprint(Path("base")))
    configure(other / "environment.json", base_fingerprint="0" * 32)
    line = refused(capsys, "run", "--adapter", "other=0.5")
    assert line.startswith("other: was trained on another base")


def test_an_output_layer_beside_token_rows_that_it_shares_is_refused(
    base_of: Locate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(
        base_of("random:gemma3"), Path("run"), target_modules=["q_proj", "lm_head"], trainable_token_indices=[3, 5]
    )
    line = refused(capsys, "run")
    assert line == "run: lm_head.weight is trained, and so are token rows that it shares; it is not merged"


@pytest.mark.usefixtures("run")
def test_a_base_on_this_machine_is_not_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "run", "--stream-base")
    assert line == "--stream-base: base is on this machine already; leave it out"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run/adapter_config.json", "{"),
        ("run/adapter_config.json", "[]"),
        ("run/environment.json", "{"),
        ("run/environment.json", "[]"),
        ("run/environment.json", '{"dtype": "float99"}'),
        ("run/recipe.yaml", "model: ["),
        ("run/recipe.yaml", "data: 1"),
        ("run/recipe.yaml", "model: {name_or_path: base, unknown: 1}"),
        ("base/config.json", "{}"),
        ("base/model.safetensors.index.json", '{"weight_map": {"a": 3}}'),
    ],
)
def test_a_damaged_file_of_the_run_or_its_base_is_named(
    file: str, content: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(file).write_text(content)
    assert Path(file).name in refused(capsys, "run")


def test_folders_made_on_the_way_to_an_output_go_with_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pickled()
    assert refused(capsys, "run", "--output", "new/deep/merged").startswith("run holds only adapter_model.bin")


def test_what_is_no_run_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = "it is a whole model already; finetune export makes other types of it"
    assert refused(capsys, "base") == f"base holds no adapter (adapter_config.json): {whole}"
    assert refused(capsys, "nowhere") == "nowhere holds no adapter (adapter_config.json): no finished run"


def test_a_base_that_is_not_there_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("base")
    assert refused(capsys, "run").startswith("base is not in this machine's cache, and HF_HUB_OFFLINE ")


def test_a_full_disk_is_seen_before_anything_is_written(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")
    total = sum(tensor.nbytes for tensor in tensors_of(Path("base")).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=total))
    there = Path().absolute()
    assert refused(capsys, "run") == (
        f"{there} has 1 MiB free, and 1 MiB are needed; make room, or write to another disk with --output"
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(total * 1.02)))
    assert main(["merge", "run", "--output", "merged"]) == 0


def test_a_disk_that_fills_up_while_writing_leaves_nothing(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert refused(capsys, "run").endswith("No space left on device")


# ---------------------------------------------------------------------------------------------------------------
# What is there already


@pytest.mark.slow
def test_an_existing_output_is_replaced_only_where_merge_wrote_it_and_only_at_the_end(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("merged").mkdir()
    assert main(["merge", "run", "--output", "merged"]) == 0  # an empty folder is free
    assert sorted(path.name for path in Path().iterdir()) == ["base", "merged", "run"]
    exists = "--output: merged exists; write another path, or add --overwrite to replace it"
    assert refused(capsys, "run") == exists
    (Path("merged") / "notes.txt").write_text("of the first merge")
    change_adapter(lambda tensors: tensors[KEY].fill_(float("nan")))
    assert refused(capsys, "run", "--overwrite").endswith("the run that saved it is broken")
    first = tensors_of(Path("merged"))
    change_adapter(lambda tensors: tensors[KEY].fill_(0.5))
    assert main(["merge", "run", "--output", "merged", "--overwrite"]) == 0
    assert not torch.equal(*(t["model.layers.0.self_attn.q_proj.weight"] for t in (first, tensors_of(Path("merged")))))
    assert not Path("merged/notes.txt").exists()
    assert sorted(path.name for path in Path().iterdir()) == ["base", "merged", "run"]
    foreign = "was not written by merge or export, and is not replaced; write another path"
    for folder in ("run", "base"):
        arguments = ("run", "--overwrite", "--output", folder)
        assert refused(capsys, *arguments) == f"--output: {folder} {foreign}"


def test_a_link_to_an_output_is_replaced_with_nothing_left_beside(run: Path) -> None:
    assert main(["merge", "run", "--output", "first"]) == 0
    Path("merged").symlink_to("first")
    assert main(["merge", "run", "--output", "merged", "--overwrite"]) == 0
    assert sorted(path.name for path in Path().iterdir()) == ["base", "first", "merged", "run"]


def test_a_folder_that_another_process_writes_is_left_alone(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, go = os.pipe(), os.pipe()

    def slow(request: MergeRequest) -> MergePlan:
        os.write(ready[1], b".")
        os.read(go[0], 1)
        return make_plan(request)

    def work() -> None:
        monkeypatch.setattr(finetune.merge.run, "plan_in_fresh_process", slow)
        merge("run", "merged")

    child = in_a_child(work)
    os.read(ready[0], 1)
    try:
        there = Path("merged").absolute()
        assert refused(capsys, "run") == f"--output: {there} is being written by another process"
    finally:
        os.write(go[1], b".")
        ended = os.waitpid(child, 0)[1]
    assert ended == 0
    assert sorted(path.name for path in Path().iterdir()) == ["base", "merged", "run"]
    for descriptor in (*ready, *go):
        os.close(descriptor)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("moments", [3, pytest.param(40, marks=pytest.mark.soak)])
@pytest.mark.slow
def test_killed_at_any_moment_the_output_is_whole_or_absent(
    base_of: Locate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moments: int
) -> None:
    base = base_of("large llama")
    run = make_run(base, tmp_path / "run", target_modules="all-linear")
    merge(run, tmp_path / "reference")
    expected = files_in(tmp_path / "reference")
    place = tmp_path / "place"
    place.mkdir()
    # Planned once: what is killed is the writing.
    rest = tmp_path / "rest"
    rest.mkdir()
    request = MergeRequest(str(run), ((str(run), 1.0),), str(rest))
    plan = plan_in_fresh_process(request)

    def planned(request: MergeRequest) -> MergePlan:
        shutil.copytree(rest, request.into, dirs_exist_ok=True)
        return plan

    monkeypatch.setattr(finetune.merge.run, "plan_in_fresh_process", planned)
    begun = time.monotonic()
    child = in_a_child(lambda: merge(run, place / "timed"))
    assert os.waitpid(child, 0)[1] == 0
    usual = time.monotonic() - begun
    assert files_in(place / "timed") == expected
    shutil.rmtree(place / "timed")

    left = set()
    for moment in range(moments):
        child = in_a_child(lambda: merge(run, place / "merged"))
        time.sleep(usual * moment / moments)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left |= {path.name for path in place.iterdir()}
        if (place / "merged").exists():
            assert files_in(place / "merged") == expected
            shutil.rmtree(place / "merged")
    assert ".merged.partial" in left  # it was killed while it wrote
    merge(run, place / "merged")
    assert files_in(place / "merged") == expected
    assert [path.name for path in place.iterdir()] == ["merged"]


@pytest.mark.parametrize("kill", [1, 2, 3], ids=["before", "between", "after"])
@pytest.mark.slow
def test_killed_while_one_output_takes_the_place_of_another_either_is_there_in_the_end(
    kill: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one goes aside, the new one in its place: a kill before, between and after these two."""
    merge("run", "merged")
    old = files_in(Path("merged"))
    change_adapter(lambda tensors: tensors[KEY].fill_(0.5))
    merge("run", "reference")
    new = files_in(Path("reference"))
    rename, remove = Path.rename, shutil.rmtree
    happened = []

    def die_at(step: int) -> None:
        happened.append(step)
        if len(happened) == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def renamed(path: Path, target: Path) -> Any:
        if "merged" in path.name:
            die_at(1)
        return rename(path, target)

    def removed(path: Any, *args: Any, **kwargs: Any) -> None:
        if len(happened) == 2:
            die_at(2)
        remove(path, *args, **kwargs)

    def work() -> None:
        monkeypatch.setattr(Path, "rename", renamed)
        monkeypatch.setattr(shutil, "rmtree", removed)
        merge("run", "merged", overwrite=True)

    assert os.waitpid(in_a_child(work), 0)[1] == signal.SIGKILL
    found = files_in(Path("merged")) if Path("merged").exists() else None
    assert found == {1: old, 2: None, 3: new}[kill]
    if kill == 2:
        # What was there before is put back even if the merge that finds it fails.
        with monkeypatch.context() as patch:
            patch.setattr(finetune.merge.run, "plan_in_fresh_process", lambda request: json.loads("no plan"))
            with pytest.raises(json.JSONDecodeError):
                merge("run", "merged", overwrite=True)
        assert files_in(Path("merged")) == old
    merge("run", "merged", overwrite=True)
    assert files_in(Path("merged")) == new
    assert sorted(path.name for path in Path().iterdir()) == ["base", "merged", "reference", "run"]


# ---------------------------------------------------------------------------------------------------------------
# A base on the Hub

FROM_THE_HUB = """
import sys, warnings
sys.path.insert(0, "tests")
import in_process
from finetune.cli.commands import main
from finetune.system import fresh_process

fresh_process._start = in_process.start
warnings.simplefilter("ignore")
for line in sys.argv[1:]:
    code = main(["merge", *line.split("|")])
    print(code, flush=True)
"""


def sharded(base: Path, into: Path) -> list[str]:
    """The base as a repository holds it, with files that nobody needs; the names of its shards."""
    with quiet():
        load(base).save_pretrained(into, max_shard_size="150KB")
        AutoTokenizer.from_pretrained(base).save_pretrained(into)
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "training_args.bin"):
        (into / name).write_bytes(b"not needed")
    return sorted(path.name for path in into.glob("model-*.safetensors"))


@pytest.mark.slow
def test_a_base_on_the_hub_is_fetched_whole_or_shard_by_shard(base_of: Locate, tmp_path: Path) -> None:
    """The same model under two names, so that what is asked for in either way can be told apart; and one of experts."""
    plain, experts = base_of("llama with biases"), base_of("mixtral")
    shards = sharded(plain, tmp_path / "served")
    assert len(shards) > 4
    sharded(experts, tmp_path / "served experts")
    repos = {"streamed": tmp_path / "served", "whole": tmp_path / "served", "experts": tmp_path / "served experts"}
    lines = []
    for name in repos:
        base, kind = (experts, "experts") if name == "experts" else (plain, "all linear")
        run = make_run(base, tmp_path / name, **KINDS[kind])
        merge(run, tmp_path / f"reference of {name}")
        recipe = {"model": {"name_or_path": f"tiny/{name}", "dtype": "float32"}}
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (run / "environment.json").write_text(json.dumps({"dtype": "float32", "base_commit": COMMIT}))
        stream = "" if name == "whole" else "|--stream-base"
        lines.append(f"{run}|--output|{tmp_path / f'merged {name}'}{stream}")

    home, temporary = tmp_path / "home", tmp_path / "temporary"
    temporary.mkdir()
    beside: dict[str, list[int]] = {"streamed": [], "experts": []}

    def look(method: str, file: str) -> None:
        name = file.split("/")[1]
        if name in beside and file.endswith(".safetensors"):
            folders = (home / f"hub/models--tiny--{name}", temporary)
            beside[name].append(len([p for folder in folders for p in folder.rglob("model-*.safetensors")]))

    with serve({f"tiny/{name}": folder for name, folder in repos.items()}) as hub:
        hub.watch = look
        done = subprocess.run(
            [sys.executable, "-c", FROM_THE_HUB, *lines],
            env=os.environ | hub.environment(home) | {"TMPDIR": str(temporary)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert (done.returncode, done.stdout) == (0, "0\n0\n0\n"), done.stderr

    for name in repos:
        assert_same_tensors(tensors_of(tmp_path / f"merged {name}"), tensors_of(tmp_path / f"reference of {name}"))
        record = json.loads((tmp_path / f"merged {name}/merge.json").read_text())
        assert (record["base"], record["revision"]) == (f"tiny/{name}", COMMIT)
    small = ["chat_template.jinja", "config.json", "generation_config.json", WEIGHTS_INDEX]
    small += ["tokenizer.json", "tokenizer_config.json"]
    assert sorted(hub.fetched("tiny/whole")) == sorted([*small, *shards])
    streamed = hub.fetched("tiny/streamed")
    assert sorted(streamed[: -len(shards)]) == sorted(small)
    # Each shard once, in order; when the next one is asked for, the one before is gone.
    assert streamed[-len(shards) :] == shards
    assert max(beside["streamed"]) == 0
    assert list(temporary.iterdir()) == []
    for name in beside:
        kept = [path for path in (home / f"hub/models--tiny--{name}").rglob("*") if path.is_file()]
        assert [p.name for p in kept if p.suffix == ".safetensors" or p.stat().st_size > 100_000] == []
    # An expert's tensors may lie in two shards, and then both are needed.
    assert max(beside["experts"]) <= 1
