#!/usr/bin/env bash
# All figures of one NVIDIA GPU for docs/benchmarks.md, within 12 minutes: see benchmarks/gpu.py.
#
#     bash benchmarks/gpu.sh [--minutes 12] [--output FILE] [--work FOLDER] [--only REGEX]
#     bash benchmarks/gpu.sh --dry-run        # or DRY=1: the same table with tiny models on a CPU, in one or two minutes
#
# Tests that need a GPU, one of this script among them, are run by: .venv/bin/python -m pytest -m gpu
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
[ -z "${DRY:-}" ] || set -- --dry-run "$@"
exec "$python" benchmarks/gpu.py "$@"
