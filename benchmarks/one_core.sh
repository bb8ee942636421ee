#!/usr/bin/env bash
# Train two methods side by side, each on a CPU core of its own, then report on both:
#
#   benchmarks/one_core.sh OUT nnUNetTrainer_adamw_budget MaskSAMTrainer_budget@MaskSAMPlans -d 27 -f 0 --minutes 60
#
# What follows the two methods are options of masksam benchmark; OUT is the folder of the report.
set -euo pipefail
out=$1 first=$2 second=$3
shift 3

scratch=$(mktemp -d)
trap 'kill $(jobs -p) 2> /dev/null || true; wait; rm -rf "$scratch"' EXIT
echo 'import os; os.cpu_count = lambda: 1' > "$scratch/sitecustomize.py" # nnU-Net takes as many threads as there are cores
export PYTHONPATH=$scratch${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1 nnUNet_n_proc_DA=0 nnUNet_def_n_proc=1

taskset -c 0 masksam benchmark "$@" -device cpu --out "$out/first" --trainers "$first" &
taskset -c 1 masksam benchmark "$@" -device cpu --out "$out/second" --trainers "$second"
wait $!
for trained in "$out"/{first,second}/train_*/nnUNet_results; do # of --train-cases, which keeps models in its folder
  [ -d "$trained" ] || continue
  subset=$out/$(basename "$(dirname "$trained")")
  mkdir -p "$subset" && cp -alf "$trained" "$subset/"
done
masksam benchmark "$@" -device cpu --out "$out" --trainers "$first" "$second"
