#!/usr/bin/env bash
# Set up an environment and run the whole test suite; arguments go to pytest.
# CM_TEST_WORKERS: processes that share the files (default 2).
set -eu -o pipefail
cd "$(dirname "$0")/.."
. scripts/setup_env.sh mpi quickstart plots lsun jax safetensors dev
ruff format --check .
ruff check .
# One thread per process: the processes of multi-rank tests would otherwise wait for each other's threads.
OMP_NUM_THREADS=1 exec python -m pytest -q -m "not perf" -n "${CM_TEST_WORKERS:-2}" --dist loadfile \
  --no-loadscope-reorder --durations=15 "$@" # in the order of tests/conftest.py, not of the number of tests
