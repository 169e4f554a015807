#!/usr/bin/env bash
# The tests of ops, kernels and training on an NVIDIA GPU, the most telling first, from an installation or a bare checkout.
#
#   scripts/test_on_gpu.sh [FOLDER] [PYTEST ARGUMENTS ...]   FOLDER (test-results): tests.xml with every traceback, log.txt
#   SECONDS_AT_MOST=150 WORKERS=12 scripts/test_on_gpu.sh    after so long it stops, and reports what it has
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-test-results}
[ $# -gt 0 ] && shift
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # commands that a test starts find a bare checkout
tests=(
  tests/train/test_on_gpu.py tests/kernels/test_on_gpu.py tests/kernels/test_loss_kernels.py tests/kernels/test_row_passes.py
  tests/train/test_draws.py tests/data/test_data_sampling.py
  tests/ops/test_decoder_loss.py tests/ops/test_decoder_layer.py tests/ops/test_token_attention.py
  tests/ops/test_cross_attention.py tests/ops/test_folded_cross_attention.py tests/kernels/test_triton_gelu.py
  tests/kernels/test_triton_launch.py tests/ops/test_contract.py tests/ops/test_not_numbers.py
  tests/ops/test_query_layers.py tests/ops/test_triton_maps_and_slots.py
)
# Chunks of one test: the order above is kept, and a worker that compiles holds up none but its own. A line for each test
# as it ends, so that the log says how far it came whatever ends it.
timeout --foreground -s INT -k 30 "${SECONDS_AT_MOST:-150}" "$(command -v python || command -v python3)" -m pytest --device cuda \
  -n "${WORKERS:-8}" --dist load --maxschedchunk 1 --timeout 120 -v -rfE --tb short --durations 12 -p no:cacheprovider \
  --junitxml "$out/tests.xml" "${tests[@]}" "$@" 2>&1 | tee "$out/log.txt"
exit "${PIPESTATUS[0]}"
