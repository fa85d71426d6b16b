#!/usr/bin/env bash
# What a GPU can show, in parts of at most nine minutes, each useful alone; results are JSON in one folder.
#
#   benchmarks/gpu.sh                    all parts, in this order
#   benchmarks/gpu.sh PART [OUT]         1 tests: tests/test_cuda.py, and parity on the GPU
#                                        2 generate: 2.3B in bfloat16 beside the readable loop and AR
#                                        3 few: 2.3B in 4 evaluations without guidance, as distilled
#                                        4 training: tokens/s and memory of tiny, small and 2.3B
#                                        5 bundled: trains the bundled model; start it again to go on
#                                        6 scaling: the scaling study; start it again to go on
#   benchmarks/gpu.sh --debug [PART]     the same at debug size on a CPU, in about three minutes
#   benchmarks/gpu.sh --help             all options
#
# OUT is $OUT or runs/gpu. The machine needs Python with torch and this repository; what else is needed is taken
# from KIT (runs/kit), which benchmarks/gather.py makes on a machine with a network. Missing packages are
# installed from there, without a network, into the environment of PYTHON (python3).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
kit=${KIT:-runs/kit}
if [ -d "$kit/wheels" ]; then
    "$python" -m pip install --quiet --no-index --find-links "$kit/wheels" --requirement "$kit/requirements.txt"
fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" GOMP_SPINCOUNT="${GOMP_SPINCOUNT-10000}"
exec "$python" -m benchmarks.gpu --kit "$kit" "$@"
