#!/usr/bin/env bash
# Everything that only a GPU can show, in minutes: tests, steps, sampling, memory, profile, a learning run; a page.
#
#   bash scripts/gpu_report.sh [--minutes 8] [--data STORE] [--original CHECKOUT] [--out DIR] [--device cpu --tiny]
#
# Uses the Python environment as it is (torch 2.10 or newer) and no network; what is not installed is named and its
# parts are left out. Results are written as they come: docs/benchmarks/gpu_*.json and gpu_report.md there.
set -eu -o pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m cm.tools.bench.gpu.command "$@"
