#!/usr/bin/env bash
# Everything that a GPU is needed for, in one command: correctness first, then op, block, layer, step, jacobian, loader,
# memory, energy (in the rows) and a profile; rows and profile go to bench/results. Meant to fit in 8 minutes; what a
# slow compiler has used up is taken from the scaling sweep, which comes last.
#
#   bench/gpu.sh            on a machine with a GPU, from a checkout, installed ('.[test,bench,gpu]') or not
#   bench/gpu.sh --check    in under a minute: what it needs, and whether that is here
#   bench/gpu.sh --dry      every path on the CPU at tiny sizes: shows that the script works, its rows are no figures
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v python || command -v python3)
if (cd / && "$python" -c 'import fastslots' 2>/dev/null); then
  export PYTHONSAFEPATH=1 # the installed package, not the source folder
else
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # the checkout itself: all but its C++ module
fi
python() { "$python" "$@"; }
fastslots() { python -m fastslots "$@"; }
pytest() { python -m pytest "$@"; }

dry=""
case "${1:-}" in
  "") ;;
  --dry) dry=1 ;;
  --check) exec "$python" -m fastslots.bench.check ;;
  *) echo "usage: bench/gpu.sh [--check | --dry]" >&2; exit 2 ;;
esac

out=bench/results
common=(--device cuda --rounds 20)
if [ -n "$dry" ]; then
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
  export TRITON_INTERPRET=1 # the GPU kernels too, on the CPU
  common=(--device cpu --tiny --rounds 1)
elif ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch sees no GPU here: bench/gpu.sh --dry walks through on the CPU" >&2
  exit 2
fi
common+=(--out "$out")

say() { printf '\n== %s (after %s s)\n' "$*" "$SECONDS"; }

failed=0
bench() { # exit code 1: a provider was wrong; its row says so, and the others are still worth having
  local code=0
  fastslots bench "$@" || code=$?
  [ "$code" -le 1 ] || exit "$code"
  [ "$code" -eq 0 ] || failed=1
}

say correctness
if ! python -c 'import pytest' 2>/dev/null; then
  echo "no pytest here: the self-check of fastslots doctor stands in for the tests" >&2
  fastslots doctor
elif [ -n "$dry" ]; then
  pytest -q -x tests/ops/test_decoder_layer.py -k "triton and one-pixel"
else
  pytest -q -x tests/ops/test_{cross_attention,folded_cross_attention,decoder_layer,decoder_loss,contract}.py
fi

say "16 bits, compiled peers included"
bench op block layer step "${common[@]}" --precision bf16 --skip autotune --no-memory --profile
say "16 bits, max-autotune"
bench layer "${common[@]}" --precision bf16 --only "autotune|fastslots, triton" --no-memory

for precision in fp32 tf32; do
  [ -n "$dry" ] && [ "$precision" = tf32 ] && continue # a GPU's
  say "$precision"
  bench op block layer step "${common[@]}" --precision "$precision" --skip "compiled|autotune" --no-memory
done
say jacobian
bench jacobian "${common[@]}" --rounds 3
say loader
bench loader "${common[@]}" --rounds 3
say "memory by resolution"
bench memory "${common[@]}" --batch 4 --skip compiled

if [ "$SECONDS" -lt 400 ] || [ -n "$dry" ]; then
  say scaling
  bench scaling "${common[@]}" --axis resolution --axis slots --rounds 3
fi
say "done: $(find "$out" -name '*.json' | wc -l) files of rows in $out"
[ "$failed" -eq 0 ] || echo "a provider was wrong: see its row" >&2
exit "$failed"
