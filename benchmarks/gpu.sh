#!/usr/bin/env bash
# The kernels on a GPU: correctness, sanitizers, what bounds them, speed; and the permutation search there. One command
# on a machine with nothing but python3, torch with CUDA, lightning, cuda-bindings and scipy; nothing is installed,
# nothing is fetched.
#
#   benchmarks/gpu.sh                    at most eight minutes
#   benchmarks/gpu.sh --full             the whole grid; --seconds N ends either sooner
#   benchmarks/gpu.sh --step speed       one step; python -m benchmarks.gpu --help names them
#
# Results: benchmarks/results/gpu-<name of the GPU>.json and .png, and copies of both in $OUT, if that is set.
# Exit code: 0 if every step passed, 2 without a GPU. PYTHON names the interpreter; else it is the first of
# .venv/bin/python and python3 that has a torch with CUDA.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 LIGHTNING_HINM_LAYOUTS=off
export LIGHTNING_HINM_GPUS=off  # the planner works with the table that is shipped, wherever this runs
if [ -z "${PYTHON:-}" ]; then
    for found in .venv/bin/python python3; do
        "$found" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null && PYTHON=$found && break
        "$found" -c 'import torch' 2>/dev/null && last=$found  # without CUDA: it can at least say so
    done
fi
PYTHON=${PYTHON:-${last:-}}
if [ -z "$PYTHON" ]; then
    echo "error: neither .venv/bin/python nor python3 has torch, but the benchmark needs torch with CUDA. Set PYTHON." >&2
    exit 2
fi
exec "$PYTHON" -m benchmarks.gpu "$@"
