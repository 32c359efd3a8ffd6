"""Makes the table of recipes/README.md: what `finetune plan` predicts for each shipped recipe on each GPU.

    python benchmarks/plan_table.py [--write]

Without `--write` it prints the table. A cell has the GiB that each GPU needs, and the largest batch that fits.
"""

import sys
import warnings
from pathlib import Path

from finetune.plan.run import HardwareFit, MemoryPlan, plan
from finetune.recipe.load import load_recipe
from finetune.system.devices import GPUS
from finetune.system.numbers import GIB

ROOT = Path(__file__).parents[1]
README = ROOT / "recipes" / "README.md"
BEGIN, END = "<!-- benchmarks/plan_table.py -->", "<!-- until here -->"
# The GPUs of recipes that are launched on several, under FSDP.
SEVERAL = {"fsdp_qlora": 2, "fsdp_sft": 8, "gemma4_31b_fsdp_qlora": 2}


def plan_of(path: Path) -> MemoryPlan:
    # The table must not depend on which rows are on this machine.
    gpu_count = SEVERAL.get(path.stem, 1)
    return plan(load_recipe(path), GPUS["h200"], gpu_count, use_rows=False)


def cell(fit: HardwareFit) -> str:
    if fit.required is None:
        return "no"
    size, other = f"{fit.required.total / GIB:.1f}", "\\*" if fit.overrides else ""
    return f"{size}{other} ({fit.largest_batch})" if fit.memory_suffices else f"**{size}**{other}"


def row(path: Path) -> str:
    made = plan_of(path)
    batch, count = made.settings.batch, SEVERAL.get(path.stem, 1)
    head = f"| `{path.name}`{f', {count} GPUs' if count > 1 else ''} | {batch.rows} x {batch.length:,} "
    return head + "".join(f"| {cell(fit)} " for fit in made.all_gpus) + "|"


def table() -> list[str]:
    names = " | ".join(GPUS)
    head = [f"| recipe | longest batch | {names} |", "|" + "---|" * (len(GPUS) + 2)]
    return head + [row(path) for path in sorted((ROOT / "recipes").glob("*.yaml"))]


def main() -> None:
    warnings.simplefilter("ignore")
    lines = table()
    if "--write" not in sys.argv:
        print("\n".join(lines))
        return
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text("\n".join([before + BEGIN, "", *lines, "", END + after]), encoding="utf-8")


if __name__ == "__main__":
    main()
