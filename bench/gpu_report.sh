#!/usr/bin/env bash
# One command on a machine with a GPU: builds, checks every operator against float64, looks for wrong
# memory accesses, measures, and writes bench/results/<gpu>.json and what it says. The limits of its
# steps add up to 8 minutes. Not run on a GPU yet.
#
#     bash bench/gpu_report.sh [folder for the results; default bench/results]
#
# Needs the package's [bench] extra, or --no-build-isolation's requirements and pytest-benchmark.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${1:-bench/results}
mkdir -p "$out" || exit 1
name=$("$python" -c 'import re, torch
print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))') || {
  echo "gpu_report.sh: error: expected a GPU, and PyTorch sees none" >&2
  exit 2
}
log="$out/$name.txt"
status=0

# A step may fail: the others still say what they have to say.
step() {
  local title=$1 limit=$2
  shift 2
  echo "== $title" | tee -a "$log"
  local begin=$SECONDS
  timeout "$limit" "$@" >>"$log" 2>&1
  local code=$?
  echo "-- $title: exit status $code after $((SECONDS - begin)) s" | tee -a "$log"
  [ $code -eq 0 ] || status=1
}

{
  echo "$name, commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(date -u +%F)"
  "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.total --format=csv
} >"$log" 2>&1

export CLAE_FAST_BUILD=${CLAE_FAST_BUILD:-cpu}
step "build" 90 "$python" -m pip install -q --no-build-isolation --no-deps -e .
step "operators against float64" 150 "$python" -m pytest -q tests/test_gpu.py
if command -v compute-sanitizer >/dev/null; then
  step "compute-sanitizer" 60 compute-sanitizer --error-exitcode 9 "$python" bench/gpu_small.py
else
  echo "-- compute-sanitizer: not installed" | tee -a "$log"
  status=1
fi
step "bench" 170 "$python" -m pytest bench --benchmark-only --device cuda -q --results "$out/$name.json"
echo "== the tables" | tee -a "$log"
"$python" bench/report.py --print "$out/$name.json" 2>&1 | tee -a "$log"
tail -n 60 "$log"
exit $status
