#!/usr/bin/env bash
# Everything that a GPU is needed for, in parts, the most telling first; rows are written as they come, to bench/results.
#
#   bench/gpu.sh                 all parts, within about 10 minutes: from 8 on no further part is begun
#   bench/gpu.sh PART ...        these alone: check step decoder op maps kernels memory rest sanitize compiled
#   bench/gpu.sh --check         in under a minute: what it needs, and whether that is here (the part check)
#   bench/gpu.sh --dry [PART...] every path on the CPU at tiny sizes: shows that the script works, its rows are no figures
#
# From a bare checkout or an installation. Wheels in bench/wheels (not in the repository) are unpacked first, for a machine
# without a network: `pip download --no-deps -d bench/wheels rich ...` elsewhere. The tests of the kernels run in Triton's
# interpreter, so they prove nothing here: on a GPU each provider's first call is held against float64 instead.
# Every command is a process of its own with a time limit, and its rows are in the folder before it tries its next
# provider: what hangs or stops the GPU costs no more than its own row. What torch's compiler makes comes last.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v python || command -v python3)
parts=(check step decoder op maps kernels memory rest sanitize compiled)
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
common=(--device cuda --rounds 10)
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
run() { # SECONDS NAME COMMAND...: what fails or lasts too long is noted, and the rest goes on; a traceback is no wrong result
  local limit=$1 name=$2 code=0 limited=()
  shift 2
  if [ -z "$dry" ] && command -v timeout >/dev/null; then limited=(timeout -k 10 "$limit"); fi
  ${limited[@]+"${limited[@]}"} "$@" 2>&1 | tee "$work/log" || code=$?
  if [ -n "${limited[*]-}" ] && { [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; }; then
    echo "broken: $name: stopped after $limit s: $(tail -n 1 "$work/log"); rows up to there are written" >>"$notes"
  elif grep -q '^Traceback (most recent call last)' "$work/log"; then
    echo "broken: $name: $(tail -n 1 "$work/log")" >>"$notes"
  elif [ "$code" -eq 1 ]; then
    echo "wrong: $name: a provider is off, see its row" >>"$notes"
  elif [ "$code" -gt 1 ]; then
    echo "broken: $name: exit code $code: $(tail -n 1 "$work/log")" >>"$notes"
  fi
}
bench() { # SECONDS WHAT FLAGS...
  local limit=$1 what=$2
  shift 2
  run "$limit" "bench $what $*" "$python" -m fastslots bench "$what" "${common[@]}" "$@"
}
compilers="compiled|autotune|flex"

part_check() { # op against float64, the compiler, the places that are written
  if [ -n "$dry" ]; then run 120 check env -u TRITON_INTERPRET "$python" -m fastslots.bench.check
  else run 120 check "$python" -m fastslots.bench.check; fi
}
part_step() { # the whole training step as it is trained, against the published one, with profiles
  bench 240 step --no-memory --profile --skip "$compilers" --precision bf16
}
part_decoder() { # its training step, with profiles
  bench 150 layer --no-memory --profile --skip "$compilers" --precision bf16
}
part_op() { # attention and penalty against SDPA, padded SDPA, xformers
  bench 100 op --no-memory --skip "$compilers" --precision bf16
}
part_maps() { # attention to 77 tokens with its map, beside SDPA without; slot attention
  bench 60 map --no-memory --skip "$compilers" --precision bf16
  bench 60 map --no-memory --skip "$compilers" --precision fp32
  bench 60 slots --no-memory --skip "$compilers" --precision fp32
}
part_kernels() { # one decoder layer, in 16 and 32 bits: each kernel against float64
  bench 100 block --no-memory --skip "$compilers" --precision bf16
  bench 100 block --no-memory --skip "$compilers" --precision fp32
}
part_memory() { # what a training step adds at its peak; a process a provider
  local sizes=(--resolution 128)
  [ -z "$dry" ] || sizes=(--resolution 16)
  bench 150 memory "${sizes[@]}" --skip "$compilers" --precision bf16
}
part_rest() {
  if [ -z "$dry" ]; then bench 120 step --no-memory --skip "$compilers" --precision tf32; fi
  bench 120 step --no-memory --skip "$compilers" --precision fp32
  bench 100 jacobian --no-memory --rounds 3
  bench 60 loader --rounds 3
}
part_sanitize() { # races and bounds, on a small decoder step with every kernel of it
  command -v compute-sanitizer >/dev/null || { echo "not run: sanitize: no compute-sanitizer here" >>"$notes"; return; }
  for tool in memcheck racecheck; do
    run 150 "$tool" env FASTSLOTS_CUDA_GRAPHS=0 compute-sanitizer --tool "$tool" --error-exitcode 3 \
      "$python" -m fastslots bench layer --device "${common[1]}" --tiny --rounds 1 --no-memory --only "fastslots, triton" --out "$work/sanitize"
  done
}
part_compiled() { # the peers that torch's compiler makes, beside ours; a minute of compiling each
  bench 200 step --no-memory --only "compiled|fastslots, one graph" --precision bf16
  bench 150 layer --no-memory --only "compiled|fastslots, triton" --precision bf16
  bench 100 op --no-memory --only "flex|compiled|fastslots, triton" --precision bf16
  bench 240 step --no-memory --only "autotune|fastslots, one graph" --precision bf16
  bench 240 layer --no-memory --only "autotune|fastslots, triton" --precision bf16
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
