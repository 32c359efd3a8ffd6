"""llama.cpp's rules for tensor types and its quantiser: compared with what llama.cpp's own tool chose and wrote."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGUFReader, quants
from gguf import GGMLQuantizationType as Kind

from finetune.export.gguf import quantize
from finetune.export.gguf.quantize import (
    TYPES,
    ModelTraits,
    ggml_library,
    is_quantized,
    quantize_rows,
    row_bytes,
    tensor_types,
)
from finetune.system.errors import ExportError
from finetune.system.extras import install_command

ROOT = Path(__file__).parents[1]
QUANTISED = [kind for kind in TYPES if kind not in ("F32", "F16", "BF16")]


def shapes(
    layers: int, hidden: int = 256, inner: int = 512, attention: int = 256, tied: bool = False
) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {} if tied else {"output.weight": (300, hidden)}
    found |= {"output_norm.weight": (hidden,), "token_embd.weight": (300, hidden)}
    for layer in range(layers):
        parts = {"attn_k": (64, hidden), "attn_norm": (hidden,), "attn_output": (hidden, attention)}
        parts |= {"attn_q": (attention, hidden), "attn_v": (64, hidden), "ffn_down": (hidden, inner)}
        parts |= {"ffn_gate": (inner, hidden), "ffn_norm": (hidden,), "ffn_up": (inner, hidden)}
        found |= {f"blk.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return found


def summary(found: dict[str, Kind]) -> tuple[str, ...]:
    """The types of the output layer, attn_v, ffn_down, attn_output and all else: first the one of most layers."""
    parts: dict[str, list[Kind]] = {}
    for name, kind in found.items():
        if name.endswith("norm.weight"):
            assert kind == Kind.F32
            continue
        part = name.split(".")[-2]
        top = part == "output" or (part == "token_embd" and "output.weight" not in found)
        part = "output" if top else part if part in ("attn_v", "ffn_down", "attn_output") else "all else"
        parts.setdefault(part, []).append(kind)
    said = []
    for part in ("output", "attn_v", "ffn_down", "attn_output", "all else"):
        kinds = parts[part]
        most = max(set(kinds), key=lambda kind: (kinds.count(kind), kind))
        said.append(most.name)
        for other in sorted(set(kinds) - {most}):
            layers = ",".join(str(layer) for layer, kind in enumerate(kinds) if kind == other)
            said[-1] += f" {other.name}@{layers}"
    return tuple(said)


# Where a file with the ending _M has fewer bits, of 18 layers and of 33.
FEW_18 = "2,3,5,6,8,9,11,12,14"
FEW_33 = "4,5,7,8,10,11,13,14,16,17,19,20,22,23,25,26"
# Types as llama-cpp-python 0.3.36's `llama_model_quantize` gave them: output, attn_v, ffn_down, attn_output, all else.
CHOSEN: dict[str, tuple[dict[str, tuple[int, ...]], str, int, dict[str, tuple[str, ...]]]] = {
    "llama, 4 queries a key": (
        shapes(18),
        "llama",
        4,
        {
            "Q8_0": ("Q8_0", "Q8_0", "Q8_0", "Q8_0", "Q8_0"),
            "Q6_K": ("Q6_K", "Q6_K", "Q6_K", "Q6_K", "Q6_K"),
            "Q5_K_M": ("Q6_K", f"Q6_K Q5_K@{FEW_18}", f"Q6_K Q5_K@{FEW_18}", "Q5_K", "Q5_K"),
            "Q4_K_M": ("Q6_K", f"Q6_K Q4_K@{FEW_18}", f"Q6_K Q4_K@{FEW_18}", "Q4_K", "Q4_K"),
            "Q4_0": ("Q6_K", "Q4_0", "Q4_0", "Q4_0", "Q4_0"),
            "IQ4_NL": ("Q6_K", "Q5_K", "IQ4_NL Q5_K@0,1", "IQ4_NL", "IQ4_NL"),
            "Q3_K_M": ("Q6_K", "Q4_K Q5_K@0,1", "Q4_K Q5_K@0", "Q4_K", "Q3_K"),
            "IQ3_S": ("Q6_K", "Q4_K", "IQ3_S", "IQ3_S", "IQ3_S"),
            "Q2_K": ("Q6_K", "Q4_K", "Q3_K", "Q3_K", "Q2_K"),
        },
    ),
    "llama, tied, 2 queries a key": (
        shapes(33, tied=True),
        "llama",
        2,
        {
            "Q8_0": ("Q8_0", "Q8_0", "Q8_0", "Q8_0", "Q8_0"),
            "Q6_K": ("Q6_K", "Q6_K", "Q6_K", "Q6_K", "Q6_K"),
            "Q5_K_M": ("Q6_K", f"Q6_K Q5_K@{FEW_33}", f"Q6_K Q5_K@{FEW_33}", "Q5_K", "Q5_K"),
            "Q4_K_M": ("Q6_K", f"Q6_K Q4_K@{FEW_33}", f"Q6_K Q4_K@{FEW_33}", "Q4_K", "Q4_K"),
            "Q4_0": ("Q6_K", "Q4_0", "Q4_0", "Q4_0", "Q4_0"),
            "IQ4_NL": ("Q6_K", "IQ4_NL", "IQ4_NL Q5_K@0,1,2,3", "IQ4_NL", "IQ4_NL"),
            "Q3_K_M": ("Q6_K", "Q4_K Q5_K@0,1", "Q4_K Q5_K@0,1", "Q4_K", "Q3_K"),
            "IQ3_S": ("Q6_K", "IQ3_S", "IQ3_S", "IQ3_S", "IQ3_S"),
            "Q2_K": ("Q6_K", "Q3_K", "Q3_K", "Q3_K", "Q2_K"),
        },
    ),
    "gemma3 270M": (
        shapes(18, 640, 2048, 1024, tied=True),
        "gemma3",
        4,
        {
            "Q8_0": ("Q8_0", "Q8_0", "Q8_0", "Q8_0", "Q8_0"),
            "Q6_K": ("Q8_0", "Q8_0", "Q6_K", "Q6_K", "Q8_0"),
            "Q5_K_M": ("Q8_0", f"Q8_0 Q5_1@{FEW_18}", f"Q6_K Q5_K@{FEW_18}", "Q5_K", "Q5_1"),
            "Q4_K_M": ("Q8_0", f"Q8_0 Q5_0@{FEW_18}", f"Q6_K Q4_K@{FEW_18}", "Q4_K", "Q5_0"),
            "Q4_0": ("Q8_0", "Q4_0", "Q4_0", "Q4_0", "Q4_0"),
            "IQ4_NL": ("Q8_0", "Q5_1", "IQ4_NL Q5_K@0,1", "IQ4_NL", "IQ4_NL"),
            "Q3_K_M": ("Q8_0", "Q5_0 Q5_1@0,1", "Q4_K Q5_K@0", "Q4_K", "Q4_0"),
            "IQ3_S": ("Q8_0", "Q5_0", "IQ3_S", "IQ3_S", "IQ4_NL"),
            "Q2_K": ("Q8_0", "Q5_0", "Q3_K", "Q3_K", "Q4_0"),
        },
    ),
    "narrow": (
        shapes(10, 40, 96, 64),
        "qwen3",
        2,
        {
            "Q8_0": ("F16", "F16", "Q8_0", "Q8_0", "F16"),
            "Q6_K": ("F16", "F16", "Q8_0", "Q8_0", "F16"),
            "Q5_K_M": ("F16", "F16", "Q8_0 Q5_1@1,2,4,5,7", "Q5_1", "F16"),
            "Q4_K_M": ("F16", "F16", "Q8_0 Q5_0@1,2,4,5,7", "Q5_0", "F16"),
            "Q4_0": ("F16", "F16", "Q4_0", "Q4_0", "F16"),
            "IQ4_NL": ("F16", "F16", "IQ4_NL Q5_1@0", "IQ4_NL", "F16"),
            "Q3_K_M": ("F16", "F16", "Q5_0", "Q5_0", "F16"),
            "IQ3_S": ("F16", "F16", "IQ4_NL", "IQ4_NL", "F16"),
            "Q2_K": ("F16", "F16", "Q4_0", "Q4_0", "F16"),
        },
    ),
}


@pytest.mark.parametrize(("model", "kind"), [(model, kind) for model in CHOSEN for kind in QUANTISED])
def test_each_tensor_gets_the_type_that_llama_cpp_gives_it(model: str, kind: str) -> None:
    found, architecture, groups, chosen = CHOSEN[model]
    traits = ModelTraits(architecture, groups)
    assert summary(tensor_types(found, kind, traits, matrix=False)) == chosen[kind]
    # A matrix changes the first eighth of ffn_down in two types.
    changed = list(chosen[kind])
    first = ",".join(str(layer) for layer in range(len([n for n in found if ".ffn_down." in n]) // 8))
    changed[2] = {"IQ4_NL": "IQ4_NL", "Q4_0": f"Q4_0 Q4_1@{first}"}.get(kind, changed[2])
    assert summary(tensor_types(found, kind, traits, matrix=True)) == tuple(changed)


def gemma4_shapes(layers: int = 9, experts: int = 0) -> dict[str, tuple[int, ...]]:
    """Each third layer takes its keys for values, and the last two layers share those of others."""
    found = {name: shape for name, shape in shapes(layers, tied=True).items() if ".attn_v." not in name}
    for layer in range(layers - 2):
        if layer % 3 != 2:
            found[f"blk.{layer}.attn_v.weight"] = (64, 256)
    for layer in range(layers):
        found |= {f"blk.{layer}.inp_gate.weight": (256, 256), f"blk.{layer}.proj.weight": (256, 256)}
        if experts:
            found[f"blk.{layer}.ffn_gate_inp.weight"] = (experts, 256)
            found[f"blk.{layer}.ffn_gate_up_exps.weight"] = (experts, 512, 256)
            found[f"blk.{layer}.ffn_down_exps.weight"] = (experts, 256, 256)
    found |= {"per_layer_token_embd.weight": (300, 2304), "per_layer_model_proj.weight": (2304, 256)}
    return found


# As `llama_model_quantize` of llama.cpp 0.5.0 gave them, which counts the layers of attn_v that are there.
GEMMA4_CHOSEN = {
    "Q8_0": ("Q8_0", "Q8_0", "Q8_0", "Q8_0"),
    "Q4_K_M": ("Q6_K", "Q4_K Q6_K@2,4", "Q6_K Q4_K@1,2,4,5", "Q4_K"),
    "Q4_0": ("Q6_K", "Q4_0", "Q4_0", "Q4_0"),
    "Q2_K": ("Q6_K", "Q4_K", "Q3_K", "Q2_K"),
}


@pytest.mark.parametrize("kind", GEMMA4_CHOSEN)
@pytest.mark.parametrize("experts", [0, 5])
def test_gemma_4_s_tensors_get_llama_cpp_s_types(kind: str, experts: int) -> None:
    found = tensor_types(
        gemma4_shapes(experts=experts),
        kind,
        ModelTraits("gemma4", 4, experts),
        matrix=False,
        stored={"per_layer_model_proj.weight": Kind.BF16},
    )
    assert found["per_layer_model_proj.weight"] == Kind.BF16  # never quantised
    embedding, values, down, rest = GEMMA4_CHOSEN[kind]
    assert {found[f"{name}.weight"].name for name in ("token_embd", "per_layer_token_embd")} == {embedding}
    assert summary({name: own for name, own in found.items() if name != "per_layer_model_proj.weight"})[1] == values
    for part in ("ffn_down", "ffn_down_exps")[: 2 if experts else 1]:
        kinds = [found[f"blk.{layer}.{part}.weight"].name for layer in range(9)]
        most = max(set(kinds), key=lambda name: (kinds.count(name), name == "Q6_K"))
        assert " @".join([most]) == down.split()[0]
        others = [str(layer) for layer, name in enumerate(kinds) if name != most]
        assert ",".join(others) == down.partition("@")[2]
    for part in ("inp_gate", "proj", "attn_k", "ffn_up", *(["ffn_gate_up_exps"] if experts else [])):
        assert {found[f"blk.{layer}.{part}.weight"].name for layer in range(9)} == {rest}
    if experts:
        assert {found[f"blk.{layer}.ffn_gate_inp.weight"] for layer in range(9)} == {Kind.F32}


def test_gemma_3n_s_altup_and_laurel_are_never_quantised() -> None:
    """As `llama_model_quantize` of llama.cpp 0.5.0, and its conversion for the two that are always F32."""
    kept = {f"altup_{part}.weight": (3, 256, 256) for part in ("proj", "unembd_proj")}
    kept |= {"blk.0.altup_router.weight": (4, 256), "blk.0.laurel_l.weight": (64, 256)}
    small = {f"blk.0.altup_{part}_coef.weight": (4, 4) for part in ("correct", "predict")}
    found = tensor_types(
        shapes(1) | kept | small, "Q4_0", ModelTraits("gemma3n", 2), False, dict.fromkeys(kept, Kind.BF16)
    )
    assert {found[name] for name in kept} == {Kind.BF16}
    assert {found[name] for name in small} == {Kind.F32}
    plain = tensor_types(shapes(1) | kept | small, "F16", ModelTraits("gemma3n", 2), False)
    assert {plain[name] for name in kept} == {Kind.F16}
    assert {plain[name] for name in small} == {Kind.F32}


def test_a_model_of_eight_experts_gets_more_bits_for_attention() -> None:
    found = tensor_types(gemma4_shapes(experts=8), "Q4_K_M", ModelTraits("gemma4", 2, 8), matrix=False)
    kinds = {part: found[f"blk.1.{part}.weight"].name for part in ("attn_k", "attn_v", "attn_output", "attn_q")}
    assert kinds == {"attn_k": "Q8_0", "attn_v": "Q8_0", "attn_output": "Q5_K", "attn_q": "Q4_K"}
    found = tensor_types(gemma4_shapes(experts=8), "Q4_0", ModelTraits("gemma4", 2, 8), matrix=False)
    assert found["blk.1.attn_output.weight"] == Kind.Q4_0


def test_small_values_of_a_70b_model_get_more_bits() -> None:
    found = shapes(80)
    wanted = {("llama", 8): "Q5_K", ("llama", 1): "Q3_K", ("qwen2", 1): "Q5_K", ("qwen3", 8): "Q4_K"}
    for (architecture, groups), kind in wanted.items():
        chosen = tensor_types(found, "Q2_K", ModelTraits(architecture, groups), matrix=False)
        assert {chosen[f"blk.{layer}.attn_v.weight"].name for layer in range(80)} == {kind}


def test_plain_files_keep_norms_and_biases_in_float32() -> None:
    for kind in ("F32", "F16", "BF16"):
        given = shapes(1, hidden=40) | {"blk.0.attn_q.bias": (256,)}
        found = tensor_types(given, kind, ModelTraits("llama", 1), matrix=False)
        for name, given in found.items():
            assert given == (Kind.F32 if "norm" in name or "bias" in name else TYPES[kind][1])


# ---------------------------------------------------------------------------------------------------------------
# The quantiser


def rows(count: int = 6, columns: int = 512) -> Any:
    return np.random.default_rng(0).standard_normal((count, columns)).astype(np.float32)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_simple_types_are_those_of_gguf(kind: str) -> None:
    pytest.importorskip("xllamacpp")
    assert np.array_equal(quantize_rows(Kind[kind], rows()), quants.quantize(rows(), Kind[kind]))


# How far the numbers of a normal distribution are off, on average, at most.
ERROR = {
    "Q8_0": 0.01,
    "Q6_K": 0.02,
    "Q5_K": 0.04,
    "Q4_K": 0.08,
    "Q4_0": 0.1,
    "IQ4_NL": 0.08,
    "Q3_K": 0.2,
    "IQ3_S": 0.2,
    "Q2_K": 0.3,
}


@pytest.mark.parametrize("kind", ERROR)
def test_numbers_come_back(kind: str) -> None:
    pytest.importorskip("xllamacpp")
    found = quantize_rows(Kind[kind], rows())
    assert found.shape == (6, row_bytes(Kind[kind], 512))
    back = quants.dequantize(found, Kind[kind])
    assert ERROR[kind] / 4 < np.sqrt(np.mean((back - rows()) ** 2)) < ERROR[kind]
    # Each row stands for itself: slices may be quantised apart.
    assert np.array_equal(np.concatenate([quantize_rows(Kind[kind], rows()[i : i + 1]) for i in range(6)]), found)


@pytest.mark.parametrize("kind", ["Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q4_1", "IQ4_NL", "Q3_K", "IQ3_S", "Q2_K"])
def test_columns_that_count_more_are_nearer(kind: str) -> None:
    pytest.importorskip("xllamacpp")
    weights = np.where(np.arange(512) % 8 == 0, 100, 0.01).astype(np.float32)
    off = [
        np.mean((quants.dequantize(quantize_rows(Kind[kind], rows(64), given), Kind[kind]) - rows(64))[:, ::8] ** 2)
        for given in (None, weights)
    ]
    assert off[1] < 0.9 * off[0]


def test_16_bit_is_rounded_to_the_nearest_even() -> None:
    import torch

    numbers = np.concatenate([rows(), rows() * 1e-6, np.float32(1) + rows() * 2**-8])
    for kind, dtype in ((Kind.F16, torch.float16), (Kind.BF16, torch.bfloat16)):
        expected = torch.from_numpy(numbers).to(dtype).view(torch.uint8).numpy()
        assert np.array_equal(quantize_rows(kind, numbers), expected)


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ExportError, match=r"^65,520 does not fit float16 \(65,504 at most\); write BF16 or Q8_0$"):
        quantize_rows(Kind.F16, np.full((1, 32), 65520, np.float32))
    pytest.importorskip("xllamacpp")
    with pytest.raises(ExportError, match=r"^cannot be quantised to Q8_0; its largest value is 1"):
        quantize_rows(Kind.Q8_0, np.full((1, 32), 1e9, np.float32))


# ---------------------------------------------------------------------------------------------------------------
# The library


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """Where packages of llama.cpp are said to be."""
    found: dict[str, Path] = {}

    def find(name: str) -> ModuleSpec | None:
        if name not in found:
            return None
        spec = ModuleSpec(name, None)
        spec.submodule_search_locations = [str(found[name])]
        return spec

    monkeypatch.setattr(quantize.importlib.util, "find_spec", find)
    ggml_library.cache_clear()
    yield found
    ggml_library.cache_clear()


def test_what_a_package_lacks_is_told(packages: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"^GGUF needs llama.cpp; run {re.escape(install_command('gguf'))}$"):
        ggml_library()
    packages["xllamacpp"] = tmp_path
    with pytest.raises(
        ExportError, match=r"^GGUF: xllamacpp cannot be used: it holds no shared library; install another"
    ):
        ggml_library()
    (tmp_path / "xllamacpp.abi3.so").write_bytes(b"no library")
    with pytest.raises(ExportError, match=r"xllamacpp.abi3.so cannot be loaded"):
        ggml_library()
    compiled = tmp_path / "libggml-base.so"
    (tmp_path / "xllamacpp.abi3.so").unlink()
    (tmp_path / "a.c").write_text("int nothing;")
    if subprocess.run(["cc", "-shared", "-o", str(compiled), str(tmp_path / "a.c")], capture_output=True).returncode:
        pytest.skip("no C compiler")
    with pytest.raises(ExportError, match="xllamacpp cannot be used: it has no ggml_quantize_chunk"):
        ggml_library()


FAKE = """
#include <stddef.h>
#include <stdint.h>
const char *ggml_type_name(int kind) { return NAMES[kind]; }
size_t ggml_row_size(int kind, int64_t n) { return n / BLOCKS[kind] * SIZES[kind]; }
size_t ggml_quantize_chunk(int k, void *s, void *d, int64_t a, int64_t n, int64_t c, void *w) { return 0; }
_Bool ggml_validate_row_data(int kind, void *data, size_t n) { return 1; }
"""


@pytest.mark.parametrize(
    ("moved", "message"), [(0, "its ggml_quantize_chunk does not do what was expected"), (1, "type 2 is not its Q4_0")]
)
def test_a_library_that_does_otherwise_is_not_used(
    moved: int, message: str, packages: dict[str, Path], tmp_path: Path
) -> None:
    names = [Kind(k).name if k in list(Kind) else "" for k in range(64)]
    sizes = [GGML_QUANT_SIZES.get(k, (1, 1)) for k in range(64)]
    names = names[moved:] + names[:moved]
    head = f"static const char *NAMES[] = {{{','.join(json.dumps(name) for name in names)}}};\n"
    head += f"static const int BLOCKS[] = {{{','.join(str(block) for block, _ in sizes)}}};\n"
    head += f"static const int SIZES[] = {{{','.join(str(size) for _, size in sizes)}}};\n"
    (tmp_path / "a.c").write_text(head + FAKE)
    command = ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "libggml-base.so"), str(tmp_path / "a.c")]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no C compiler")
    packages["llama_cpp"] = tmp_path
    with pytest.raises(ExportError, match=f"^GGUF: llama_cpp cannot be used: {message}; install another release"):
        ggml_library()


# ---------------------------------------------------------------------------------------------------------------
# llama.cpp's own tool, where a person has built it


QUANTISE = """
import ctypes, sys
import numpy as np
import llama_cpp

source, target, number, matrix = sys.argv[1:]
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.nthread = int(number), 2
if matrix:
    entry, weights = llama_cpp.llama_cpp.llama_model_imatrix_data, dict(np.load(matrix))
    entries = (entry * (len(weights) + 1))()
    for place, (name, numbers) in zip(entries, weights.items()):
        place.name, place.size = name.encode(), numbers.size
        place.data = numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    options.imatrix = ctypes.cast(entries, ctypes.POINTER(entry))
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options)))
"""


@pytest.mark.parametrize("kind", QUANTISED)
def test_files_are_those_of_llama_cpps_own_tool_byte_for_byte(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: nothing to compare with")
    pytest.importorskip("xllamacpp")
    from test_gguf_write import GEMMA4, SIZE, make, tensors, written

    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 9}
    gemma4 = GEMMA4 | wide | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 3}
    experts = {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 256}
    models: dict[str, dict[str, Any]] = {
        "llama": wide | {"num_key_value_heads": 1},
        "qwen3": {"hidden_size": 40, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 20},
        "gemma4_text": gemma4
        | {"num_kv_shared_layers": 3, "use_double_wide_mlp": True}
        | {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": SIZE},
        "gemma4_text, experts": gemma4 | experts | {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    }
    for name, options in models.items():
        model = make(tmp_path / name, name.partition(",")[0], options)
        plain = written(model, tmp_path / f"{name}.gguf")
        random = np.random.default_rng(0)
        matrix = {
            tensor.name: random.random(int(tensor.shape[0] * np.prod(tensor.shape[2:]))).astype(np.float32)
            for tensor in tensors(plain).values()
            if len(tensor.shape) > 1 and tensor.name.startswith("blk.") and is_quantized(tensor.name)
        }
        np.savez(tmp_path / "matrix.npz", **matrix)
        for given in (None, matrix):
            ours = written(model, tmp_path / f"{name}-{bool(given)}.gguf", kind, imatrix=given)
            theirs = tmp_path / "theirs.gguf"
            file = str(tmp_path / "matrix.npz") if given else ""
            command = [sys.executable, "-c", QUANTISE, str(plain), str(theirs), str(int(TYPES[kind][0])), file]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            found, expected = ([*GGUFReader(path).tensors] for path in (ours, theirs))
            assert [(t.name, t.tensor_type) for t in found] == [(t.name, t.tensor_type) for t in expected]
            assert all(a.data.tobytes() == b.data.tobytes() for a, b in zip(found, expected, strict=True))
