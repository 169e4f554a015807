#!/usr/bin/env bash
# Everything that a GPU is needed for, in parts, the most telling first; rows are written as they come, to bench/results.
#
#   bench/gpu.sh                 all parts, within about 10 minutes: from 8 on no further part is begun
#   bench/gpu.sh PART ...        these alone: check step decoder kernels op memory sanitize rest
#   bench/gpu.sh --check         in under a minute: what it needs, and whether that is here (the part check)
#   bench/gpu.sh --dry [PART...] every path on the CPU at tiny sizes: shows that the script works, its rows are no figures
#
# From a bare checkout or an installation. Wheels in bench/wheels (not in the repository) are unpacked first, for a machine
# without a network: `pip download --no-deps -d bench/wheels rich ...` elsewhere. The tests of the kernels run in Triton's
# interpreter, so they prove nothing here: on a GPU each provider's first call is held against float64 instead.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v python || command -v python3)
parts=(check step decoder kernels op memory sanitize rest)
usage() { echo "usage: bench/gpu.sh [--check | --dry] [PART ...], of: ${parts[*]}" >&2; exit 2; }

dry=""
case "${1:-}" in
  --dry) dry=1; shift ;;
  --check) set -- check ;;
  -*) usage ;;
esac
for part in "$@"; do [[ " ${parts[*]} " == *" $part "* ]] || usage; done
wanted=("${@:-${parts[@]}}")
[ $# -gt 0 ] || wanted=("${parts[@]}")

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if compgen -G 'bench/wheels/*.whl' >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --target "$work/site" bench/wheels/*.whl
  export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi
if (cd / && "$python" -c 'import fastslots' 2>/dev/null); then
  export PYTHONSAFEPATH=1 # the installed package, not the source folder
else
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # the checkout itself: all but its C++ module
fi

out=bench/results
common=(--device cuda --rounds 20)
if [ -n "$dry" ]; then
  out=$work/results
  export TRITON_INTERPRET=1 # the GPU kernels too, on the CPU
  common=(--device cpu --tiny --rounds 1)
elif [ "${wanted[*]}" != check ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch sees no GPU here: bench/gpu.sh --dry walks through on the CPU" >&2
  exit 2
fi
mkdir -p "$out"
common+=(--out "$out")
notes=$work/notes

say() { printf '\n== %s (after %s s)\n' "$*" "$SECONDS"; }
run() { # NAME COMMAND...: what fails is noted, and the rest goes on; a traceback is no wrong result
  local name=$1 code=0
  shift
  "$@" 2>&1 | tee "$work/log" || code=$?
  if grep -q '^Traceback (most recent call last)' "$work/log"; then
    echo "broken: $name: $(tail -n 1 "$work/log")" >>"$notes"
  elif [ "$code" -eq 1 ]; then
    echo "wrong: $name: a provider is off, see its row" >>"$notes"
  elif [ "$code" -gt 1 ]; then
    echo "broken: $name: exit code $code: $(tail -n 1 "$work/log")" >>"$notes"
  fi
}
bench() { run "bench $1 ${*: -2}" "$python" -m fastslots bench "$@"; }

part_check() { # op against float64, the compiler, the places that are written
  if [ -n "$dry" ]; then run check env -u TRITON_INTERPRET "$python" -m fastslots.bench.check
  else run check "$python" -m fastslots.bench.check; fi
}
part_step() { # the whole training step against the published one, eager and compiled
  bench step "${common[@]}" --no-memory --skip autotune --precision bf16
}
part_decoder() { # its training step, compiled and max-autotune peers included, with a profile
  bench layer "${common[@]}" --no-memory --profile --skip autotune --precision bf16
  bench layer "${common[@]}" --no-memory --only "autotune|fastslots, triton" --precision bf16
}
part_kernels() { # one decoder layer, in 16 and 32 bits: each kernel against float64
  bench block "${common[@]}" --no-memory --skip "compiled|autotune" --precision bf16
  bench block "${common[@]}" --no-memory --skip "compiled|autotune" --precision fp32
}
part_op() { # attention and penalty against SDPA, padded SDPA, FlexAttention, xformers
  bench op "${common[@]}" --no-memory --precision bf16
}
part_memory() {
  bench memory "${common[@]}" --batch 4 --skip compiled --precision bf16
}
part_sanitize() { # races and bounds, on a small decoder step with every kernel of it
  command -v compute-sanitizer >/dev/null || { echo "not run: sanitize: no compute-sanitizer here" >>"$notes"; return; }
  for tool in memcheck racecheck; do
    run "$tool" env FASTSLOTS_CUDA_GRAPHS=0 compute-sanitizer --tool "$tool" --error-exitcode 3 \
      "$python" -m fastslots bench layer --device "${common[1]}" --tiny --rounds 1 --no-memory --only "fastslots, triton" --out "$work/sanitize"
  done
}
part_rest() {
  if [ -z "$dry" ]; then bench step "${common[@]}" --no-memory --skip "compiled|autotune" --precision tf32; fi
  bench step "${common[@]}" --no-memory --skip "compiled|autotune" --precision fp32
  bench jacobian "${common[@]}" --rounds 3
  bench loader "${common[@]}" --rounds 3
}

for part in "${wanted[@]}"; do
  if [ "$SECONDS" -gt 480 ] && [ -z "$dry" ]; then
    echo "not run: $part: after $SECONDS s; bench/gpu.sh $part" >>"$notes"
    continue
  fi
  say "$part"
  "part_$part"
done

touch "$notes"
if [ "${wanted[*]}" = check ]; then # nothing was timed: what it printed says all, even where torch is missing
  if grep -qE '^(wrong|broken):' "$notes"; then exit 1; else exit 0; fi
fi
say "what came of it"
"$python" -m fastslots.bench.reporting.summary "$out" | tee "$out/summary.txt"
cat "$notes" | tee -a "$out/summary.txt"
! grep -qE '^(wrong|broken):' "$notes"
