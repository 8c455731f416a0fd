#!/usr/bin/env bash
# All cases of one GPU that holds a 7B model twice (an H100 or H200, say), the most valuable first, in ten minutes at most.
#
#   benchmarks/accelerator.sh            PYTHON=python3 MINUTES=9.5 by default; raw output also into $OUT, if that is set
#   CACHE=/tmp/programs CASES="sample-7b fit-1.5b" benchmarks/accelerator.sh      some cases; compiled programs stay in $CACHE for the next call
#   WHEELS=wheels benchmarks/accelerator.sh             first makes the wheels in that folder importable, where nothing may be installed
#
# It fetches nothing: weights are random, made on the device. A case that does not end in its time is stopped, and the next one gets what is
# left; its rows until then are kept. What the device has no room for is left out, which is no failure.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
end=$(($(date +%s) + $(awk "BEGIN {print int(${MINUTES:-9.5} * 60)}")))
out=${OUT:-}
log=${out:-$(mktemp -d)}
mkdir -p "$log" || exit 1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --target "$scratch/wheels" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH=$scratch/wheels${PYTHONPATH:+:$PYTHONPATH}
fi
# Programs are compiled once for all the processes below; unless $CACHE says where, nothing outlives this run.
cache=${CACHE:-$scratch/programs}
export JAX_COMPILATION_CACHE_DIR=$cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5 PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

echo "# $(date -u +%FT%TZ) $(uname -srm), $(nproc) processors"
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,clocks.mem --format=csv,noheader
if ! "$python" - <<'PY'
import importlib, sys
missing = {}  # the package by what asked for it first: what lacks in the benchmarks' own imports too, not only in this list
for name in ("jax", "flax.linen", "optax", "numpy", "omegaconf", "yaml", "tqdm", "benchmarks.fit", "benchmarks.sample", "benchmarks.round"):
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing.setdefault(error.name or name, name)
if missing:
    found = ", ".join(package if package == name else f"{package} (for {name})" for package, name in missing.items())
    sys.exit(f"missing, and not installed by this script: {found}")
import jax
print("#", sys.version.split()[0], "jax", jax.__version__, jax.devices())
if jax.default_backend() == "cpu":
    sys.exit("JAX sees no accelerator here; on a CPU run the benchmarks themselves")
PY
then exit 1; fi

failed=0
run() { # run NAME SECONDS MODULE OPTION...: at most so many seconds, and no more than are left
  local name=$1 seconds=$2 module=benchmarks.$3 left
  shift 3
  if [ -n "${CASES:-}" ] && ! [[ " $CASES " == *" $name "* ]]; then return; fi
  left=$((end - $(date +%s)))
  if [ "$left" -lt 25 ]; then
    echo "# left out, no time: $name"
    return
  fi
  [ "$seconds" -gt "$left" ] && seconds=$left
  echo "# --- $name, at most $seconds s: python -m $module $*"
  # The benchmark plans with a little less than it is given: a case that runs on is better than one that is killed.
  timeout --kill-after=5 "$seconds" "$python" -m "$module" "$@" --minutes "$(awk "BEGIN {print ($seconds - 15) * 0.85 / 60}")" \
    --json "$log/lines.jsonl" 2>>"$log/stderr.txt" | tee -a "$log/stdout.txt"
  local status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] && return
  failed=1
  echo "# $name ended with $status; its last words:"
  tail -n 15 "$log/stderr.txt"
}

# Few lengths, because each that is used is a compilation or three, and these because they leave 19 to 24 % of padding (reckoned by
# workload.planned). Fits and the round have the same slots and tokens a step, so that the round finds its programs compiled.
lengths=${LENGTHS:-24,32,40,56,96,160,240,384}
fits=(--tokens-per-step 2048 --lengths "$lengths")
cases() { # cases COMMAND: it with the words of each
  "$1" fit-7b 230 fit --model qwen2.5-7b --k 64,1 "${fits[@]}" --epochs 2 --peer-edits 2 --sweep none --padded-steps 6
  "$1" round-7b 240 round --model qwen2.5-7b --contexts 5 --slots 64 "${fits[@]}" --repeats 1
  "$1" sample-7b 110 sample --model qwen2.5-7b --rows 128,32 --adapters 32
  "$1" fit-0.5b 90 fit --model qwen2.5-0.5b --k 64,1 "${fits[@]}" --epochs 3 --peer-edits 1 --sweep none --padded-steps 4
  "$1" fit-1.5b 90 fit --model qwen2.5-1.5b --k 64,1 "${fits[@]}" --epochs 3 --peer-edits 1 --sweep none --padded-steps 4
  "$1" fit-curve-7b 240 fit --model qwen2.5-7b --k 32,16,4 "${fits[@]}" --epochs 2 --no-peer --sweep none --padded-steps 0
  "$1" sample-0.5b 60 sample --model qwen2.5-0.5b --rows 128 --adapters 0
}
named() { echo "$1"; }
known=" $(cases named | tr '\n' ' ')"
for case in ${CASES:-}; do
  if [[ $known != *" $case "* ]]; then
    echo "CASES=\"$case\": none of$known" >&2
    exit 2
  fi
done
cases run

echo "# the JSON lines again, and how each case went"
grep -hE '^(warming up|timed|left out)' "$log/stderr.txt"
cat "$log/lines.jsonl" 2>/dev/null
exit "$failed"
