#!/usr/bin/env bash
# Everything that only a GPU can show, in 10 minutes: tests, timings and compute-sanitizer, the most valuable first.
#
#   benchmarks/gpu_first.sh FOLDER [--rehearse]
#
# Each part writes FOLDER/PART.txt and a row of FOLDER/summary.md, has its own time limit, and does not stop the others. The exit
# code is 1 if a part failed. It runs from a copied tree, without network, with the interpreter $PYTHON (default: .venv's, else
# python3). --rehearse, or a machine without a GPU, runs the parts small on the CPU and skips those that need a GPU.
set -uo pipefail
out=${1:?usage: gpu_first.sh FOLDER [--rehearse]}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
gpu=1 slower=1 failed=0
if [ "${2:-}" = --rehearse ] || ! nvidia-smi -L >/dev/null 2>&1; then gpu=0 slower=4; fi
budget=$((590 * slower))

row() { echo "| $1 | $2 | $3 |" | tee -a "$out/summary.md"; }

# part NAME SECONDS COMMAND...
part() {
  local name=$1 limit=$(($2 * slower)) start=$SECONDS code=0 result=passed
  shift 2
  ((limit > budget - SECONDS)) && limit=$((budget - SECONDS))
  if ((limit < 10)); then row "$name" "skipped: no time left" 0; return; fi
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.txt" 2>&1 || code=$?
  if ((code == 124 || code == 137)); then result="failed: stopped after $limit s"
  elif ((code)); then result="failed: exit code $code"; fi
  if ((code)); then failed=1; tail -n 15 "$out/$name.txt"; fi
  row "$name" "$result" $((SECONDS - start))
}

# gpu_part NAME SECONDS COMMAND...: skipped without a GPU or without the command
gpu_part() {
  if ((!gpu)); then row "$1" "skipped: no GPU" 0
  elif ! command -v "$3" >/dev/null; then row "$1" "skipped: no $3" 0
  else part "$@"; fi
}

# sanitize TOOL SECONDS: every access of a kernel is checked, so only the smallest tests run
sanitize() {
  gpu_part "$1" "$2" compute-sanitizer --tool "$1" --error-exitcode 1 "$python" -m pytest -q -p no:cacheprovider -m gpu \
    tests/ops/test_cuda_shapes.py -k "ragged or one_roi"
}

if ((gpu)); then
  roi=(--device cuda) model=(--device cuda --dtype fp32,fp16,bf16)
else
  roi=(--rois 100 --sampling 2 --dtypes fp32 --channels 8 --repeats 3 --threads 1)
  model=(--dtype fp32 --image-size 64x96 --train-image-size 64x96 --train-batch 1 --detections 3 --threads 1)
fi
model+=(--config-file configs/torchvision_R_50_FPN.yaml --overwrite)
mapfile -t tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)

printf '| part | result | seconds |\n| --- | --- | ---: |\n' >"$out/summary.md"
gpu_part nvidia_smi 20 nvidia-smi
if ! compgen -G 'mask_rcnn_plus/ops/_roi_cpu*.so' >/dev/null; then
  part build 150 "$python" -c 'import setuptools; setuptools.setup()' build_ext --inplace
fi
part doctor 60 "$python" -m mask_rcnn_tools.cli doctor
part gpu_tests 170 "$python" -m pytest -q -p no:cacheprovider -m gpu "${tests[@]}"
part roi_align 90 "$python" -m benchmarks.roi_align "${roi[@]}" --output "$out/roi_align" --overwrite
part inference 100 "$python" -m benchmarks.model "${model[@]}" --mode inference --output "$out/inference"
part training 80 "$python" -m benchmarks.model "${model[@]}" --mode training --repeats $((gpu ? 20 : 1)) --output "$out/training"
# Freed memory is returned, so that an access to it is found.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
sanitize memcheck 80
sanitize racecheck 60
sanitize synccheck 40
exit $failed
