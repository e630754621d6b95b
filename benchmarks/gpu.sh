#!/usr/bin/env bash
# The kernels on a GPU: correctness, sanitizers, what bounds them, speed. One command on a machine with nothing but
# python3, torch with CUDA, lightning and cuda-bindings; nothing is installed, nothing is fetched.
#
#   benchmarks/gpu.sh                    about seven minutes on an H100
#   benchmarks/gpu.sh --full             the whole grid; --seconds N ends either sooner
#   benchmarks/gpu.sh --step speed       one step; python -m benchmarks.gpu --help names them
#
# Results: benchmarks/results/gpu-<name of the GPU>.json and .png, and copies of both in $OUT, if that is set.
# Exit code: 0 if every step passed, 2 without a GPU. PYTHON names another interpreter.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 LIGHTNING_HINM_LAYOUTS=off
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
