"""The programs that the tier `clients` runs, in which releases, and what each is expected to make of our files."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from clients.artefacts import FOLDERS

SAME, LOSSY, WRONG, REFUSES = "same", "lossy", "wrong", "refuses"
VERDICTS = {
    SAME: "the same token ids, prompts and greedy tokens; logits differ by less than 0.01",
    LOSSY: "the program (or the file's type) rounds weights: the mean KL stays below the limit that the test states",
    WRONG: "loads it, says nothing, and computes something else",
    REFUSES: "raises an error",
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
_TYPE = Expected(LOSSY, "8 bit", max_kl=0.01)

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
)
