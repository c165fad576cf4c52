#!/usr/bin/env bash
# One command on a machine with a GPU: builds, checks every operator against float64, looks for wrong
# memory accesses and races, measures, and writes FOLDER/GPU.json (every figure) and FOLDER/GPU.txt
# (what each step said, and the tables). The limits of its steps add up to 15 minutes, most of which
# compilers take: tests are spread over processes where pytest-xdist is there. Its steps have run on
# an H200, but not yet all in one go.
#
#     bash bench/gpu_report.sh [FOLDER; default bench/results]
#
# Needs the package's [bench] extra, or --no-build-isolation's requirements and pytest-benchmark.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
case ${1:-} in
  -*)
    sed -n '2,10s/^# \{0,1\}//p' "bench/$(basename "$0")"
    exit 2
    ;;
esac
out=${1:-bench/results}
name=$("$python" - <<'EOF'
import re, sys
try:
    import torch
    if not torch.cuda.is_available():
        sys.exit("gpu_report.sh: error: expected a GPU, and PyTorch sees none")
    print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))
except ImportError as error:
    sys.exit(f"gpu_report.sh: error: expected a Python with PyTorch ({error})")
EOF
) || exit 2
mkdir -p "$out" || exit 1
log="$out/$name.txt"
status=0

# A step may fail: the others still say what they have to say.
step() {
  local title=$1 limit=$2
  shift 2
  echo "== $title" | tee -a "$log"
  local begin=$SECONDS
  timeout --signal=INT --kill-after=5 "$limit" "$@" >>"$log" 2>&1
  local code=$?
  echo "-- $title: exit status $code after $((SECONDS - begin)) s" | tee -a "$log"
  [ $code -eq 0 ] || status=1
}

{
  echo "$name, commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(date -u +%F)"
  "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.total --format=csv
} >"$log" 2>&1

# For this GPU alone: a minute less.
TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch
print("%d.%d" % torch.cuda.get_device_capability())')
export TORCH_CUDA_ARCH_LIST
step "build" 80 "$python" -m pip install -q --no-build-isolation --no-deps -e .
step "what was built" 20 "$python" -m clae_fast info
spread=$("$python" -c 'import os, xdist; print("-n", min(12, os.cpu_count() or 1))' 2>/dev/null)
# shellcheck disable=SC2086  # two words, or none
step "operators against float64" 300 "$python" -m pytest -q $spread tests/test_gpu.py
compiled=()
for dtype in bfloat16 float16 float32; do  # what the sanitizers then find in Triton's cache
  timeout 150 "$python" bench/gpu_small.py "$dtype" >>"$log" 2>&1 &
  compiled+=($!)
done
wait "${compiled[@]}"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    step "compute-sanitizer, $tool" 45 \
      compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" bench/gpu_small.py "$tool"
  done
else
  echo "-- compute-sanitizer: not installed" | tee -a "$log"
  status=1
fi
# Results are written after every test, those with a goal first: what a limit cuts off is little.
step "bench" 205 "$python" -m pytest bench --benchmark-only --device cuda --seconds 1.5 -q \
  --results "$out/$name.json"
step "the tables" 10 "$python" bench/report.py --print "$out/$name.json"
tail -n 60 "$log"
exit $status
