#!/usr/bin/env bash
# The kernels on a GPU: correctness, sanitizers, what bounds them, speed. One command on a machine with nothing but
# python3, torch with CUDA, lightning and cuda-bindings; nothing is installed, nothing is fetched.
#
#   benchmarks/gpu.sh                    about seven minutes on an H100
#   benchmarks/gpu.sh --full             the whole grid; --seconds N ends either sooner
#   benchmarks/gpu.sh --step speed       one step; python -m benchmarks.gpu --help names them
#
# Results: benchmarks/results/gpu-<name of the GPU>.json and .png, and copies of both in $OUT, if that is set.
# Exit code: 0 if every step passed, 2 without a GPU. PYTHON names the interpreter; else it is the one in .venv, where
# that has a torch with CUDA, and else python3.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 LIGHTNING_HINM_LAYOUTS=off
export LIGHTNING_HINM_GPUS=off  # the planner works with the table that is shipped, wherever this runs
cuda='import sys, torch; sys.exit(torch.version.cuda is None)'
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ] && .venv/bin/python -c "$cuda" 2>/dev/null; then
    PYTHON=.venv/bin/python
fi
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
