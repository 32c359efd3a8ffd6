"""Folders for mlx-lm: the tensors, the config, what mlx-lm computes with them, and what is refused."""

import importlib.util
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import in_process
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from finetune.cli.commands import main
from finetune.export import mlx as export_mlx
from finetune.export import verify
from finetune.export.mlx import check_computable, load_mlx, notes, reader_of, write_dequantised, write_mlx
from finetune.hub.card import export_card
from finetune.model.locate import locate
from finetune.model.mlx import GROUP, dequantise, quantise
from finetune.system import fresh_process
from finetune.system.errors import ExportError
from finetune.system.extras import install_command
from finetune.system.terminal import quiet

needs_mlx = pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="needs the extra mlx")
SHAPE: dict[str, Any] = {
    **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": 16},
}
EVERY_SECOND = ["sliding_attention", "full_attention"] * 2
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 128,
}
LINEAR = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 64}),
    "gemma3": ("gemma3_text", {"layer_types": EVERY_SECOND, "query_pre_attn_scalar": 16, "rope_parameters": LINEAR}),
    "gemma4": (
        "gemma4_text",
        {"layer_types": EVERY_SECOND, "global_head_dim": 32, "num_kv_shared_layers": 2, "final_logit_softcapping": 30.0}
        | {"hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 512, "use_double_wide_mlp": True},
    ),
    "llama": ("llama", {"rope_parameters": LLAMA3, "attention_bias": True}),
    "llama-tied": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "gemma3-multimodal": ("gemma3", {"layer_types": EVERY_SECOND, "query_pre_attn_scalar": 16}),
    "gemma4-multimodal": ("gemma4", {"layer_types": EVERY_SECOND, "hidden_size_per_layer_input": 0}),
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def config_of(name: str, **changes: Any) -> Any:
    kind, own = MODELS[name]
    if not name.endswith("-multimodal"):
        return AutoConfig.for_model(kind, **SHAPE | own | changes)
    text = AutoConfig.for_model(f"{kind}_text", **SHAPE | own | changes).to_dict()
    vision = VISION | {"num_key_value_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14}
    return AutoConfig.for_model(kind, text_config=text, vision_config=vision, audio_config=None)


def saved(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A random model whose weights are large enough that a wrong setting shows."""
    factory = AutoModelForImageTextToText if name.endswith("-multimodal") else AutoModelForCausalLM
    torch.manual_seed(0)
    with quiet():
        model = factory.from_config(config_of(name, **changes), dtype=torch.float32)
        for tensor_name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim > 1:
                torch.nn.init.normal_(tensor, 0.0, 0.1)
            elif "norm" in tensor_name:
                torch.nn.init.normal_(tensor, float("gemma4" in name or "gemma" not in name), 0.1)
        model.to(dtype).save_pretrained(folder)
    for path in Path(locate("random:llama")).glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def weight(dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    numbers = torch.randn(40, 4 * GROUP)
    numbers[0] = 0
    numbers[1] = numbers[1].abs()
    numbers[2] = -numbers[2].abs()
    numbers[3] = 0.5
    numbers[4, ::2] = 0
    numbers[5, 3] = 100
    numbers[6] *= 0.01
    return numbers.to(dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_within_a_step(bits: int, dtype: torch.dtype) -> None:
    """Half a step, and what the rounding of scale and bias to the weight's type adds."""
    exact = weight(dtype)
    stored = dict(quantise(exact, bits))
    assert {name: (tuple(part.shape), part.dtype) for name, part in stored.items()} == {
        "weight": ((40, 4 * GROUP * bits // 32), torch.uint32),
        "scales": ((40, 4), dtype),
        "biases": ((40, 4), dtype),
    }
    found = dequantise(stored)
    assert (found.shape, found.dtype) == (exact.shape, dtype)
    groups = exact.float().reshape(40, 4, GROUP)
    error = (found.float().reshape(groups.shape) - groups).abs().amax(2)
    span = groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)
    assert (error <= 1.1 * span / (2**bits - 1) + span * 2**-7 + 1e-7).all()
    assert (found[0] == 0).all()


@needs_mlx
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tensors_equal_those_of_mlx_to_the_bit(bits: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx.core as mx

    monkeypatch.setattr("finetune.model.shards.SLICE", 10 * 4 * 4 * GROUP)  # ten rows at a time
    exact = weight(getattr(torch, dtype))
    array = mx.array(exact.float().numpy()).astype(getattr(mx, dtype))
    for (_, ours), theirs in zip(quantise(exact, bits), mx.quantize(array, group_size=GROUP, bits=bits), strict=True):
        whole = ours.view(torch.int32) if ours.dtype == torch.uint32 else ours.float()
        same = theirs.view(mx.int32) if theirs.dtype == mx.uint32 else theirs.astype(mx.float32)
        assert same.tolist() == whole.tolist()


@needs_mlx
@pytest.mark.parametrize("name", ["gemma3", "gemma4", "llama", "llama-tied", "gemma3-multimodal", "gemma4-multimodal"])
def test_the_folder_holds_what_mlx_lm_converts_it_to(name: str, tmp_path: Path) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model, quantize_model

    model = saved(name, tmp_path / "model")
    for kind in ("mlx-4bit", "mlx-bf16"):
        (tmp_path / kind).mkdir()
        write_mlx(model, tmp_path / kind, kind)
    plain, config = load_model(tmp_path / "mlx-bf16")
    theirs, _ = quantize_model(plain, config, GROUP, 4)
    ours, _ = load_model(tmp_path / "mlx-4bit")
    wanted, found = (dict(tree_flatten(one.parameters())) for one in (theirs, ours))
    assert wanted.keys() == found.keys()
    assert sum(key.endswith(".scales") for key in found) > 7
    for key, tensor in wanted.items():
        assert (tensor.dtype, tensor.tolist()) == (found[key].dtype, found[key].tolist()), key


@needs_mlx
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_mlx_lm_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    """On the model in float32: what remains is the order of sums, and in Gemma 1 mlx-lm's exact GELU."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    model = saved(name, tmp_path / "model")
    (tmp_path / "out").mkdir()
    write_mlx(model, tmp_path / "out", "mlx-bf16")
    ids = torch.randint(3, 500, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = loaded(model)(input_ids=ids).logits[0]
    inner, _ = load_model(tmp_path / "out")
    inner.set_dtype(mx.float32)
    found = torch.from_numpy(np.array(inner(mx.array(ids.numpy()))[0]))
    assert wanted.std() > 0.5
    assert (wanted - found).abs().max() < (5e-3 if name == "gemma" else 5e-4)


@needs_mlx
def test_transformers_measures_the_same_weights_where_mlx_lm_is_missing(tmp_path: Path) -> None:
    import mlx.core as mx

    model = saved("gemma3", tmp_path / "model")
    for name in ("out", "plain"):
        (tmp_path / name).mkdir()
    write_mlx(model, tmp_path / "out", "mlx-8bit")
    write_dequantised(tmp_path / "out", tmp_path / "plain")
    generator = load_mlx(tmp_path / "out")
    generator.model.inner.set_dtype(mx.float32)
    ids = torch.randint(3, 500, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = loaded(tmp_path / "plain")(input_ids=ids).logits[0]
    found = generator.model(ids, False, torch.arange(48)).logits[0]
    # The plain weights are rounded to bfloat16, and mlx-lm's are not.
    assert (wanted - found).abs().max() < 0.1
    answers = generator.answers([ids[0, :9].tolist(), ids[0, :5].tolist()], 6)
    assert [len(answer) for answer in answers] == [6, 6]
    with torch.no_grad():
        assert answers[1][0] == int(loaded(tmp_path / "plain")(input_ids=ids[:, :5]).logits[0, -1].argmax())
    assert (tmp_path / "plain" / "tokenizer.json").is_file()


def test_each_setting_is_written_out(tmp_path: Path) -> None:
    """mlx-lm ties a Llama's embeddings by default, and of a multimodal model it reads `vocab_size` beside the parts."""
    model = saved("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    del config["tie_word_embeddings"], config["attention_bias"]
    (model / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    (tmp_path / "out").mkdir()
    write_mlx(model, tmp_path / "out", "mlx-4bit")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (found["tie_word_embeddings"], found["attention_bias"], found["dtype"]) == (False, True, "bfloat16")
    settings = {"group_size": 64, "bits": 4, "mode": "affine"}
    assert found["quantization"] == found["quantization_config"] == settings
    (tmp_path / "multimodal").mkdir()
    write_mlx(saved("gemma3-multimodal", tmp_path / "m"), tmp_path / "multimodal", "mlx-bf16")
    found = json.loads((tmp_path / "multimodal" / "config.json").read_text())
    assert found["vocab_size"] == found["text_config"]["vocab_size"] == 512
    assert "quantization" not in found


@pytest.mark.parametrize(
    ("name", "changes", "kind", "fault"),
    [
        ("gemma2", {"attn_logit_softcapping": None}, "mlx-bf16", "attn_logit_softcapping: None, which mlx-lm does not"),
        ("gemma2", {"tie_word_embeddings": False}, "mlx-bf16", "tie_word_embeddings: False, which mlx-lm does not"),
        ("gemma3", {"layer_types": [*reversed(EVERY_SECOND)]}, "mlx-bf16", "layer_types: ['full_attention', 'slid"),
        ("gemma3", {"layer_types": ["sliding_attention"] * 4}, "mlx-bf16", "layer_types: ['sliding_attention', "),
        ("gemma3", {"attn_logit_softcapping": 9.0}, "mlx-bf16", "attn_logit_softcapping: 9.0, which mlx-lm does not"),
        ("gemma3", {"hidden_activation": "silu"}, "mlx-bf16", "hidden_activation: silu, which mlx-lm does not"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "mlx-bf16",
            "rope_type of sliding_attention: linear, which mlx-lm does not",
        ),
        ("qwen3", {"attention_bias": True}, "mlx-bf16", "attention_bias: True, which mlx-lm does not compute"),
        ("qwen2", {"head_dim": 32}, "mlx-bf16", "head_dim: 32, which mlx-lm does not compute for qwen2"),
        ("gemma", {"rope_parameters": LLAMA3}, "mlx-bf16", "rope_type: llama3, which mlx-lm does not compute"),
        ("mixtral", {}, "mlx-4bit", "--format mlx-4bit: this model has experts, which are written in 16"),
    ],
)
def test_what_mlx_lm_computes_otherwise_is_refused(name: str, changes: dict[str, Any], kind: str, fault: str) -> None:
    with pytest.raises(ExportError) as error:
        check_computable(config_of(name, **changes), [kind])
    assert str(error.value).removeprefix(f"--format {kind}: config.json has ").startswith(fault)


def test_a_merge_that_untied_the_embeddings_is_refused(tmp_path: Path) -> None:
    """The base's config, which is checked before the merge, had them tied."""
    model = saved("gemma", tmp_path / "model", tie_word_embeddings=False)
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="tie_word_embeddings: False"):
        write_mlx(model, tmp_path / "out", "mlx-bf16")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", MODELS)
def test_what_it_computes_is_not_refused(name: str) -> None:
    check_computable(config_of(name), ["mlx-bf16"])


def test_another_model_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shape = {"vocab_size": 64, "n_embd": 64, "n_layer": 1, "n_head": 4}
    with quiet():
        AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape)).save_pretrained("model")
    assert main(["export", "model", "--output", "out", "--format", "mlx-4bit", "--format", "bf16"]) == 2
    assert capsys.readouterr().err == (
        "error: --format mlx-4bit: a model of type gpt2 was not compared with mlx-lm's, or mlx-lm has none; known are "
        "gemma, gemma2, gemma3, gemma3_text, gemma4, gemma4_text, llama, mistral, mixtral, qwen2, qwen3\n"
    )
    assert not Path("out").exists()


def test_the_report_says_what_measured_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "mlx_lm" or found(name, *rest))
    monkeypatch.setattr(export_mlx.importlib.metadata, "version", lambda name: "0.32.2")
    assert [reader_of(kind) for kind in ("mlx-bf16", "mlx-8bit")] == ["mlx-lm", "mlx-lm"]
    text = "\nmlx-bf16, mlx-4bit: measured by mlx-lm 0.32.2, which computes in the dtype of the weights."
    assert notes(config_of("gemma3"), ["mlx-bf16", "mlx-4bit"]) == [text]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "mlx_lm" else found(name, *rest)
    )
    assert [reader_of(kind) for kind in ("mlx-bf16", "mlx-8bit")] == ["transformers", "dequantised"]
    assert notes(config_of("gemma2"), ["mlx-4bit"]) == [
        "\nmlx-4bit: mlx-lm is not installed, so transformers measured them, with dequantised weights "
        f"({install_command('mlx')}).",
        "\nmlx-4bit: mlx-lm 0.32 has no sliding window for gemma2; it answers texts of more than 64 tokens otherwise "
        "than transformers.",
    ]
    assert len(notes(config_of("qwen3"), ["mlx-4bit"])) == 1


@pytest.mark.parametrize(("kind", "relation"), [("mlx-4bit", "quantized"), ("mlx-bf16", "finetune")])
def test_its_card_says_how_to_use_it(kind: str, relation: str) -> None:
    report = {"title": "out", "base": "owner/name", "model": "runs/a", "models": [], "rows": "", "machine": ""}
    card = export_card(report | {"missed": [], "notes": [], "gate": {}, "finetune": "0"}, kind)  # type: ignore[arg-type]
    assert f'model, tokenizer = load("{kind}")\n' in card
    assert f"library_name: mlx\npipeline_tag: text-generation\ntags:\n- mlx\nbase_model_relation: {relation}\n" in card
    assert "vllm" not in card


def test_the_card_of_an_export_fetches_one_format(tmp_path: Path) -> None:
    for name in ("mlx-4bit", "mlx-8bit"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    report = {"title": "out", "base": "owner/name", "model": "runs/a", "models": [], "rows": "", "machine": ""}
    report |= {"missed": [], "notes": [], "gate": {}, "finetune": "0"}
    card = export_card(report, None, tmp_path, "you/all")
    assert "hf download you/all --include 'mlx-4bit/*' --local-dir model\n" in card
    assert 'load("model/mlx-4bit")\n' in card


@pytest.mark.slow
@pytest.mark.parametrize(
    ("installed", "kinds"),
    [
        pytest.param(True, ["mlx-4bit"], marks=needs_mlx),
        pytest.param(True, ["mlx-bf16", "mlx-8bit", "mlx-4bit"], marks=[needs_mlx, pytest.mark.soak]),
        (False, ["mlx-bf16", "mlx-8bit", "mlx-4bit"]),
    ],
)
def test_through_the_command_line(
    installed: bool, kinds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured like the other formats, by mlx-lm and without it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fresh_process, "_start", in_process.start)  # mlx compiles its kernels anew in each process
    monkeypatch.setattr(verify, "ANSWER_TOKENS", 8)
    if not installed:
        found = importlib.util.find_spec
        hide = lambda name, *rest: None if name == "mlx_lm" else found(name, *rest)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", hide)
    model = locate("random:gemma3")
    formats = [f"--format={kind}" for kind in kinds]
    assert main(["export", model, "--output", "out", *formats, "--gate", "max_kl=0.01"]) == 0
    report = json.loads(Path("out/report.json").read_text())
    made = report["models"][1:]
    assert [one["name"] for one in made] == kinds
    assert all(one["bytes"] > other["bytes"] for one, other in itertools.pairwise(report["models"]))
    assert all(one["kl"] < other["kl"] for one, other in itertools.pairwise(made))
    assert made[-1]["kl"] < 0.01
    assert [one["conversations_equal"] for one in made] == [10] * len(kinds)
    assert sorted(path.name for path in Path("out").iterdir()) == sorted([*kinds, "report.json", "report.md"])
    assert ("measured by mlx-lm" in report["notes"][1]) == installed
