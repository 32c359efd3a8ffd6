"""Exports a run or a model to bf16, fp16, int8, nf4, fp8, w4a16, GGUF and Ollama; measures each file.

>>> export("runs/quickstart", "exports", ["bf16", "gguf:Q4_K_M"])
PosixPath('exports')
"""

from typing import TYPE_CHECKING

from finetune.system.lazy import lazy_names

if TYPE_CHECKING:
    from finetune.export.run import export as export

__getattr__ = lazy_names(__name__, export="run")
