"""fp8 and w4a16: the tensors, the config, what transformers computes with them, and what is refused."""

import importlib.util
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from finetune.cli.commands import main
from finetune.export import run
from finetune.export.gguf.imatrix.files import Importance
from finetune.export.gguf.tensors import gguf_names
from finetune.export.rows import HeldOutRows
from finetune.export.transformers import write_format
from finetune.export.w4a16 import importance_matrix, no_matrix_reason
from finetune.hub.card import export_card
from finetune.model.locate import locate
from finetune.recipe.schema import ExportSection
from finetune.system.extras import install_command
from finetune.system.terminal import quiet

# The largest error of a rounded weight, as a share of the largest weight of its scale: half a step.
HALF_STEP = {"fp8": 16 / 448, "w4a16": 0.5 / 7.5}
# Wide enough for w4a16, with a layer (`o_proj`, of 192 input features) whose shape no kernel of 4 bit takes.
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 48,
}


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    config = AutoConfig.for_model(request.param, vocab_size=1024, num_hidden_layers=2, **WIDE)
    torch.manual_seed(0)
    with quiet():
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(locate("random:llama")).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(folder: Path) -> Any:
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return found.eval()


@pytest.mark.parametrize("kind", ["fp8", "w4a16"])
def test_weights_are_within_half_a_step_and_read_by_transformers(model: Path, kind: str, tmp_path: Path) -> None:
    write_format(model, tmp_path, kind)
    exact, stored = load_file(model / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    QuantizationConfig.model_validate(config)
    assert config["format"] == {"fp8": "float-quantized", "w4a16": "pack-quantized"}[kind]
    scaled = {name.removesuffix("_scale") for name in stored if name.endswith("_scale")}
    layer = "model.layers.0.self_attn."
    assert (f"{layer}q_proj.weight" in scaled, f"{layer}o_proj.weight" in scaled) == (True, kind == "fp8")
    assert (f"{layer}o_proj" in config["ignore"], "lm_head" in config["ignore"]) == (kind == "w4a16", True)
    assert [name for name in scaled if "norm" in name or "embed" in name] == []
    # What is not quantised is written as it is.
    for name in stored.keys() & exact.keys() - scaled:
        assert torch.equal(stored[name], exact[name])
    # The library's own reading of the file, and that of transformers, agree.
    quantised, ids = load(tmp_path), torch.arange(3, 40)[None]
    with torch.no_grad():
        found, wanted = (whole(ids).logits.float().log_softmax(-1) for whole in (quantised, load(model)))
    assert 0 < float((wanted.exp() * (wanted - found)).sum(-1).mean()) < 0.01
    read = quantised.state_dict()  # which the first pass has decompressed
    assert scaled
    for name in scaled:
        scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
        own = {key: stored[f"{name}{suffix}"] for key, suffix in KEYS[kind].items()}
        plain = BaseCompressor.get_value_from_registry(config["format"]).decompress(own, scheme)["weight"]
        assert torch.equal(plain, read[name])
        rows = len(exact[name])
        shape = (rows, 1, -1) if kind == "fp8" else (rows, -1, 128)
        groups = exact[name].float().reshape(shape)
        error = (groups - plain.float().reshape(shape)).abs().amax(2)
        # Scales and weights are stored in bfloat16, which keeps 8 bits.
        assert (error / groups.abs().amax(2)).max() < HALF_STEP[kind] * 1.02 + 2**-8


KEYS = {
    "fp8": {"weight": "", "weight_scale": "_scale"},
    "w4a16": {"weight_packed": "_packed", "weight_scale": "_scale", "weight_shape": "_shape"},
}


def test_scales_of_an_importance_matrix_leave_the_least_error_of_some(model: Path, tmp_path: Path) -> None:
    """Compared with every ratio tried by hand; each weight goes by its own columns."""
    draw = torch.Generator().manual_seed(0)
    parts = {"q_proj": "attn_q", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    matrix = {
        f"blk.{layer}.{name}.weight": torch.rand(256, generator=draw).pow(8).numpy()
        for layer in (0, 1)
        for name in parts.values()
    }
    write_format(model, tmp_path, "w4a16", matrix=matrix)
    exact, stored = load_file(model / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    clipped = 0
    for name in (name for name in exact if name.split(".")[-2] in parts):
        groups = exact[name].float().unflatten(1, (2, 128))
        weights = torch.from_numpy(matrix[f"blk.{name.split('.')[2]}.{parts[name.split('.')[-2]]}.weight"])
        largest = torch.maximum(groups.amax(2), -groups.amin(2)) / 7.5
        scales = stored[f"{name}_scale"].float()

        def error(scales: torch.Tensor, groups: torch.Tensor = groups, weights: torch.Tensor = weights) -> torch.Tensor:
            rounded = (groups / scales[..., None]).round().clamp(-8, 7) * scales[..., None]
            return ((rounded - groups).square() * weights.unflatten(0, (2, 128))).sum(2)

        tried = [
            error((largest.bfloat16() * ratio).bfloat16().float()) for ratio in torch.arange(0.6, 1.06, 0.05).tolist()
        ]
        least = torch.stack(tried).amin(0)
        torch.testing.assert_close(error(scales), least, rtol=0.02, atol=0)
        clipped += int((scales < largest * 0.97).sum())
        assert error(scales).sum() < 0.9 * error(largest.bfloat16().float()).sum()
    assert clipped


def test_fp8_rounds_activations_as_servers_do(tmp_path: Path, model: Path) -> None:
    """Each token by its own scale: what the report measures is what a server computes."""
    write_format(model, tmp_path, "fp8")
    layer = load(tmp_path)
    with torch.no_grad():
        layer(torch.tensor([[3, 4]]))  # decompresses
        proj = layer.model.layers[0].self_attn.q_proj
        x = torch.randn(1, 3, proj.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
        found = proj(x).float()
        scale = x.abs().amax(-1, keepdim=True) / 448
        rounded = (x / scale).to(torch.float8_e4m3fn).bfloat16() * scale
        plain = x.float() @ proj.weight.float().T
        assert (found - rounded.float() @ proj.weight.float().T).abs().max() < (found - plain).abs().max() / 4


def test_its_card_says_how_to_use_it(model: Path) -> None:
    report = {"title": "out", "base": "owner/name", "model": "runs/a", "models": [], "rows": "", "machine": ""}
    card = export_card(report | {"missed": [], "notes": [], "gate": {}, "finetune": "0"}, "fp8")  # type: ignore[arg-type]
    assert "pip install transformers accelerate compressed-tensors\n" in card
    assert "\nvllm serve fp8\n" in card
    assert "base_model_relation: quantized\n" in card


@pytest.mark.parametrize(
    ("name", "kind", "fault"),
    [
        ("gpt2", "fp8", "--format fp8: this model has experts, or no linear layer of a shape"),
        ("random:gemma4_moe", "fp8", "--format fp8: this model has experts, or"),
    ],
)
def test_what_has_no_kernel_is_refused(
    name: str, kind: str, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(locate(name)) if name.startswith("random:") else tmp_path / name
    if not folder.exists():
        shape = {"vocab_size": 64, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64}
        with quiet():
            AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape)).save_pretrained(folder)
    assert main(["export", str(folder), "--output", "out", "--format", kind]) == 2
    assert capsys.readouterr().err.startswith(f"error: {fault}")
    assert not Path("out").exists()


def test_a_missing_package_is_named(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    hide = lambda name, *rest: None if name == "compressed_tensors" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    assert main(["export", str(model), "--output", "out", "--format", "fp8"]) == 2
    wanted = f"error: --format fp8: compressed-tensors is not installed; run {install_command('compressed')}\n"
    assert capsys.readouterr().err == wanted


@pytest.mark.parametrize("better", ["w4a16, with matrix", "w4a16"])
@pytest.mark.slow
def test_of_w4a16_with_and_without_a_matrix_the_better_is_kept(
    better: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {
        name: len(tensor[0]) for name, tensor in load_file(model / "model.safetensors").items() if tensor.ndim > 1
    }
    names = gguf_names(json.loads((model / "config.json").read_text()))
    means = {names(name): np.arange(1, width + 1, dtype=np.float64) ** 4 for name, width in weights.items()}
    matrix = Importance(means, dict.fromkeys(means, (1,)))  # type: ignore[arg-type]
    whole: dict[str, Any] = {"perplexity": 9.0, "loss": 2.0, "load_seconds": 1.0, "tokens": 8, "compared": 8}
    whole |= {"kl_p99": 1.0, "top1": 0.5, "answers": [[1]], "stopped": 0, "conversations": [[1]], "bytes": 9}
    stored = {}

    def measured(job: Any, rows: Any) -> dict[str, Any]:
        if job.against:
            stored[job.name] = (job.folder / "model.safetensors").read_bytes()
        return whole | {"name": job.name, "against": job.against, "dtype": job.dtype, "kl": float(job.name != better)}

    monkeypatch.setattr(run, "held_out", lambda *arguments: HeldOutRows([], "no rows"))
    monkeypatch.setattr(run, "importance_matrix", lambda *arguments: (matrix, None, []))
    monkeypatch.setattr(run, "measure", measured)
    # Of the one that is not kept no limit is asked.
    assert main(["export", str(model), "--output", "out", "--format", "w4a16", "--gate", "max_kl=0.5"]) == 0
    [kept] = {*stored.values()} & {Path("out/w4a16/model.safetensors").read_bytes()}
    assert (kept == stored[better], len({*stored.values()})) == (True, 2)
    assert sorted(path.name for path in Path("out").iterdir()) == ["report.json", "report.md", "w4a16"]
    [other] = stored.keys() - {better}
    table = Path("out/report.md").read_text()
    assert f"| {better} | 0.0 MB" in table
    assert f"| ({other}) | 0.0 MB" in table
    assert "\n| 9 | 0 | 1 |" in Path("out/w4a16/README.md").read_text()


def test_a_matrix_that_there_cannot_be(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert no_matrix_reason("llama") == ""
    assert no_matrix_reason("phi3").startswith("GGUF: a model of type phi3 is not written; known are gemma, ")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    rows, options = HeldOutRows([], ""), ExportSection()
    found = importance_matrix(model, model, rows, options, None, print, False)
    reason = f"gguf is not installed; run {install_command('gguf')}"
    assert found == (None, None, [f"\nw4a16 is rounded to nearest, without an importance matrix: {reason}."])
    never = ExportSection(imatrix="never")
    assert importance_matrix(model, model, rows, never, None, print, False) == (None, None, [])
    shutil.copytree(model, "model")
    Path("model/recipe.yaml").write_text("export: {imatrix: always}")
    assert main(["export", "model", "--output", "out", "--format", "w4a16"]) == 2
    line = f"error: export.imatrix: is always, and w4a16 can have no importance matrix: {reason}\n"
    assert capsys.readouterr().err == line


@pytest.mark.soak
def test_through_the_command_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["export", str(model), "--output", "out", "--format", "fp8", "--format", "w4a16", "--gate", "max_kl=0.01"])
        == 0
    )
    found = {one["name"]: one for one in json.loads(Path("out/report.json").read_text())["models"]}
    assert found["as trained"]["bytes"] > found["fp8"]["bytes"] > found["w4a16"]["bytes"]
    assert found["w4a16"]["kl"] > found["w4a16, with matrix"]["kl"]
    assert not found["w4a16"]["kept"]
    assert main(["generate", "out/w4a16", "--prompt", "Hi", "--max-new-tokens", "2"]) == 0
