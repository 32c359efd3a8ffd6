"""`finetune` where two CPU ranks may be FSDP: accelerate 1.15 turns it on for accelerators only.

accelerate launch --config_file accelerate_configs/fsdp.yaml --num_processes 2 tests/on_cpu.py RECIPE
"""

import os
import sys
from datetime import timedelta
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType

_init = state.AcceleratorState.__init__


def _on_cpu_too(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


state.AcceleratorState.__init__ = _on_cpu_too

if __name__ == "__main__":
    from finetune.cli.commands import main
    from finetune.system import distributed

    if silence := os.environ.get("FINETUNE_TEST_SILENCE"):
        distributed._SILENCE = float(silence)
        distributed.timedelta = lambda seconds: timedelta(seconds=float(silence))  # a new connection to the store
    sys.exit(main())
