"""The adapter as a GGUF file: on the base's file, llama.cpp computes what it computes with the merged model's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from finetune.cli.commands import main
from finetune.export.adapter import write_adapter
from finetune.export.gguf.adapter import write_gguf_adapter
from finetune.export.gguf.llama_cpp.library import Llama
from finetune.export.gguf.write import write_gguf
from finetune.merge.run import merge
from finetune.model.adapter_readers import check_adapter
from finetune.model.locate import locate
from finetune.system.errors import ExportError
from finetune.system.terminal import quiet

# Ranks and alphas that differ by layer, and rsLoRA: plain LoRA has one of each.
OPTIONS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 6,
    "use_rslora": True,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"down_proj": 16},
    "target_modules": r".*(?<!per_layer_model)_(proj|gate|projection)",
    "task_type": "CAUSAL_LM",
}


def adapter_of(name: str, folder: Path, **options: Any) -> Path:
    """A PEFT adapter with random matrices."""
    base = locate(name)
    torch.manual_seed(0)
    with quiet():
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**OPTIONS | options))
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.1)
        model.save_pretrained(folder)
    return folder


def logits(file: Path, adapter: Path | None = None) -> np.ndarray[Any, Any]:
    with Llama(file, 64, adapter) as run:
        return np.stack(list(run.logits([2, *range(40, 80)])))


@pytest.mark.parametrize("name", ["random:llama", "random:gemma3", "random:gemma4"])
@pytest.mark.slow
def test_it_computes_what_the_merged_model_does(name: str, tmp_path: Path) -> None:
    run = adapter_of(name, tmp_path / "run")
    (tmp_path / "lora").mkdir()
    base = write_adapter(run, tmp_path / "lora").base
    write_gguf_adapter(tmp_path / "lora", base, tmp_path / "adapter.gguf")
    write_gguf(base, tmp_path / "base.gguf", "F32")
    write_gguf(merge(run, tmp_path / "merged", dtype="float32"), tmp_path / "merged.gguf", "F32")
    alone, merged = logits(tmp_path / "base.gguf"), logits(tmp_path / "merged.gguf")
    found = logits(tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    assert np.abs(merged - alone).max() > 0.3
    assert np.abs(found - merged).max() < 1e-3


def test_its_metadata_is_that_of_llama_cpps_conversion(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    base = write_adapter(adapter_of("random:llama", tmp_path / "run"), tmp_path / "lora").base
    write_gguf_adapter(tmp_path / "lora", base, tmp_path / "adapter.gguf")
    file = GGUFReader(tmp_path / "adapter.gguf")
    fields = {name: field.contents() for name, field in file.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
    }
    shapes = {tensor.name: tensor.shape.tolist() for tensor in file.tensors}
    assert shapes["blk.0.ffn_down.weight.lora_a"] == [128, 4]
    assert shapes["blk.0.ffn_down.weight.lora_b"] == [4, 64]
    assert len(shapes) == 2 * 2 * 7


def test_a_layer_that_llama_cpp_passes_over_is_refused(tmp_path: Path) -> None:
    run = adapter_of("random:gemma4", tmp_path / "run", target_modules="all-linear")
    assert any("ignores it" in line for line in check_adapter(run, "llama.cpp").problems)
    (tmp_path / "lora").mkdir()
    base = write_adapter(run, tmp_path / "lora").base
    with pytest.raises(ExportError, match=r"changes model\.per_layer_model_projection, and llama"):
        write_gguf_adapter(tmp_path / "lora", base, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


def test_a_part_that_llama_cpp_does_not_take_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = adapter_of("random:llama", tmp_path / "run", use_dora=True)
    assert main(["export", str(run), "--output", str(tmp_path / "out"), "--format", "gguf:adapter"]) == 2
    refused = capsys.readouterr().err
    assert refused.splitlines()[-1].startswith(f"error: --format gguf:adapter: {run} holds DoRA (")
    assert "merging" not in refused
    whole = ["export", locate("random:llama"), "--output", str(tmp_path / "out"), "--format", "gguf:adapter"]
    assert main(whole) == 2
    assert "gguf:adapter: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_through_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    once = lambda *arguments: written.append(arguments) or write_adapter(*arguments)  # noqa: E731
    monkeypatch.setattr("finetune.export.run.write_adapter", once)
    run = adapter_of("random:gemma3", tmp_path / "run")
    line = ["export", str(run), "--output", str(tmp_path / "out"), "--format", "gguf:adapter", "--format", "adapter"]
    assert main(line) == 0
    assert len(written) == 1
    assert sorted(file.suffix for file in (tmp_path / "out/adapter").iterdir() if "adapter" in file.name) == [
        ".json",
        ".safetensors",
    ]
    [file] = (tmp_path / "out/gguf").glob("*.gguf")
    assert file.name == "run-adapter.gguf"
    [figures] = [m for m in json.loads((tmp_path / "out/report.json").read_text())["models"] if "file" in m]
    assert figures["kl"] < 1e-5
    assert figures["bytes"] == file.stat().st_size
    card = (tmp_path / "out/gguf/README.md").read_text()
    assert "llama-server -m BASE.gguf --lora run-adapter.gguf" in card
    assert "ADAPTER ./run-adapter.gguf" in card
