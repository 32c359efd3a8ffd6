"""The programs that the tier `clients` runs, in which releases, and what each is expected to make of our files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from clients.artefacts import FOLDERS

SAME, LOSSY, WRONG, REFUSES = "same", "lossy", "wrong", "refuses"
# Of a program that is not run: by the tables of its source.
TAKES, IGNORES = "takes", "ignores"
VERDICTS = {
    SAME: "the same token ids, prompts and greedy tokens; logits differ by less than 0.01",
    LOSSY: "the program (or the file's type) rounds weights: the mean KL stays below the limit that the test states",
    WRONG: "loads it, says nothing, and computes something else",
    REFUSES: "raises an error",
    TAKES: "not run; its source takes each part of it",
    IGNORES: "not run; its source leaves out a part of it, and says nothing",
}


@dataclass(frozen=True)
class Expected:
    """The verdict that a case must have.

    Attributes:
        verdict: One of `VERDICTS`.
        why: For the page: the reason of a verdict other than `same`.
        says: For `refuses`: a part of the program's message.
        max_kl: For `lossy`: the limit of the mean KL, nats per token.
    """

    verdict: str = SAME
    why: str = ""
    says: str = ""
    max_kl: float = 0.0


@dataclass(frozen=True, eq=False)
class Client:
    """A program of others, in a virtual environment of its own.

    Attributes:
        name: Its name and release.
        probe: The script in this folder that asks it.
        packages: What its environment holds, pinned.
        reads: What is expected of each artefact, by its name, or by name and base where these differ.
        note: A line for the page.
    """

    name: str
    probe: str
    packages: tuple[str, ...]
    reads: Mapping[str | tuple[str, str], Expected] = field(default_factory=dict)
    note: str = ""

    def expected(self, artefact: str, base: str) -> Expected | None:
        """The verdict that an artefact of a base must have; None if the program is not asked."""
        return self.reads.get((artefact, base), self.reads.get(artefact))


_TORCH = "torch==2.13.0"
_SAME = Expected()
_WHOLE = dict.fromkeys(("full run", "merged", *FOLDERS), _SAME)
_ADAPTERS = dict.fromkeys(("run", "run with token rows", "adapter"), _SAME)
_4 = (
    *(_TORCH, "transformers==4.57.6", "peft==0.17.1", "accelerate==1.10.1", "bitsandbytes==0.50.2"),
    *("compressed-tensors==0.12.2", "sentencepiece==0.2.3", "protobuf==7.36.2"),
)
_5_19 = (
    *(_TORCH, "transformers==5.19.0", "peft==0.18.1", "accelerate==1.15.0", "bitsandbytes==0.50.2"),
    "compressed-tensors==0.20.1",
)
_NEWEST = (
    *(_TORCH, "transformers==5.24.0", "peft==0.21.2", "accelerate==1.15.0", "bitsandbytes==0.50.2"),
    "compressed-tensors==0.20.1",
)
_GEMMA3_ROWS = Expected(WRONG, "before 0.18 PEFT leaves Gemma 3's embedding unscaled under token rows")
_TIES = Expected(
    REFUSES, "it ties embeddings again, which PEFT has wrapped", "is neither a parameter, buffer, nor extra state"
)
_CTRANSLATE2 = {
    "llama": Expected(WRONG, "its converter drops the scaling of llama3, which Llama 3.1 and later have"),
    "gemma3": Expected(
        REFUSES,
        "it scores no text longer than the sliding window; shorter prompts are answered alike",
        "buffer to copy",
    ),
}
_NO_BOS = Expected(
    WRONG,
    "weights and predictions are the same, but it puts a BOS in front of a Llama 3's text only in a folder whose name "
    "begins with Llama-3 or Meta-Llama-3",
)
_TYPE = Expected(LOSSY, "8 bit", max_kl=0.01)
_KERAS = {
    "llama": Expected(WRONG, "its converter of Llama 3 leaves rms_norm_eps at 1e-6; Llama 3 has 1e-5"),
    "gemma3": _SAME,
}

CLIENTS = (
    Client("transformers 4.57.6", "probe_transformers.py", _4, _WHOLE),
    Client("transformers 5.19.0", "probe_transformers.py", _5_19, _WHOLE, "the release that SGLang 0.5.23 asks for"),
    Client("transformers 5.24.0", "probe_transformers.py", _NEWEST, _WHOLE),
    Client(
        "PEFT 0.17.1 (transformers 4.57.6)",
        "probe_transformers.py",
        _4,
        _ADAPTERS | {("run with token rows", "gemma3"): _GEMMA3_ROWS},
    ),
    Client("PEFT 0.18.1 (transformers 5.19.0)", "probe_transformers.py", _5_19, _ADAPTERS),
    Client("PEFT 0.21.2 (transformers 5.24.0)", "probe_transformers.py", _NEWEST, _ADAPTERS),
    Client(
        "llama.cpp (xllamacpp 2026.10.11549)",
        "probe_llama_cpp.py",
        ("xllamacpp==2026.10.11549", "numpy==2.4.6"),
        {"gguf:F32": _SAME, "gguf:Q8_0": _TYPE, "gguf:adapter": _SAME, "ollama": _SAME},
    ),
    Client(
        "llama-cpp-python 0.3.36",
        "probe_llama_cpp_python.py",
        # It has no wheel: pip builds it once, in half an hour on 2 cores.
        ("llama-cpp-python==0.3.36", "numpy==2.4.6"),
        {"gguf:F32": _SAME, "gguf:Q8_0": _TYPE, "gguf:adapter": _SAME, "ollama": _SAME},
    ),
    Client(
        "lm-eval 0.4.13",
        "probe_lm_eval.py",
        (_TORCH, "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "lm-eval==0.4.13"),
        dict.fromkeys(("full run", "merged", "bf16"), _SAME) | _ADAPTERS | {("run with token rows", "gemma3"): _TIES},
    ),
    Client(
        "CTranslate2 4.8.5",
        "probe_ctranslate2.py",
        (_TORCH, "transformers==5.24.0", "accelerate==1.15.0", "ctranslate2==4.8.5"),
        {(name, base): seen for name in ("full run", "merged", "bf16") for base, seen in _CTRANSLATE2.items()},
    ),
    Client(
        "LitGPT 0.5.13",
        "probe_litgpt.py",
        (_TORCH, "litgpt==0.5.13", "numpy==2.4.6", "safetensors==0.8.0"),
        {(name, "llama"): _NO_BOS for name in ("full run", "merged", "bf16")},
    ),
    Client(
        "KerasHub 0.32.0 on JAX",
        "probe_keras_hub.py",
        # It reads our folders with safetensors, which it does not ask for.
        ("keras-hub==0.32.0", "jax==0.10.2", "safetensors==0.8.0", "sentencepiece==0.2.3"),
        {(name, base): seen for name in ("full run", "merged", "bf16") for base, seen in _KERAS.items()},
    ),
    Client(
        "torchao 0.18.0",
        "probe_torchao.py",
        (_TORCH, "transformers==5.23.0", "accelerate==1.15.0", "torchao==0.18.0"),
        dict.fromkeys(("full run", "merged", "bf16"), Expected(LOSSY, "it makes 8-bit weights of them", max_kl=0.01)),
    ),
    Client(
        "mlx-lm 0.32.2 (mlx 0.32.4 on a CPU)",
        "probe_mlx_lm.py",
        ("mlx-lm==0.32.2", "mlx[cpu]==0.32.4", "transformers==5.23.0"),
        dict.fromkeys(("full run", "merged", "bf16", "fp16", "mlx-bf16"), _SAME)
        | dict.fromkeys(("int8", "nf4"), Expected(REFUSES, "it has no reader of bitsandbytes", says="v_proj.weight"))
        | {
            "fp8": Expected(REFUSES, "it has no reader of this type", says="format 'float-quantized'"),
            "w4a16": Expected(REFUSES, "it knows packed weights under other names", says="weight_shape"),
            "mlx-8bit": Expected(LOSSY, "8 bit", max_kl=0.01),
            "mlx-4bit": Expected(LOSSY, "4 bit, of a tiny model with large weights", max_kl=0.3),
            "adapter": Expected(REFUSES, "it reads adapters of its own alone", says="num_layers"),
        },
    ),
)

# Programs that need a GPU, by their names in `adapter_readers.READERS`: the verdicts by their sources.
SERVERS = {
    "vllm": {"run": TAKES, "run with token rows": REFUSES, "adapter": TAKES, "fp8": TAKES, "w4a16": TAKES},
    "sglang": {"run": TAKES, "run with token rows": IGNORES, "adapter": TAKES, "fp8": TAKES, "w4a16": TAKES},
}


def server_takes(quantization: Mapping[str, Any]) -> bool:
    """True if vLLM and SGLang have a scheme for a `quantization_config`.

    Source: `_is_fp8_w8a8` and `_is_wNa16_group_channel` in their `layers/quantization/compressed_tensors`, 2026.
    """
    [group] = quantization["config_groups"].values()
    weights, inputs = group["weights"], group["input_activations"]
    kind = weights["type"], weights["num_bits"], quantization["format"]
    if weights["dynamic"] or not weights["symmetric"] or "Linear" not in group["targets"]:
        return False
    if kind == ("float", 8, "float-quantized"):
        return weights["strategy"] in ("tensor", "channel", "block") and inputs["type"] == "float" and inputs["dynamic"]
    return kind == ("int", 4, "pack-quantized") and weights["strategy"] in ("group", "channel") and inputs is None
