#!/usr/bin/env bash
# Install (once), then train, validate and query a tiny Dream: bash scripts/quickstart.sh [--option value …]
# The options (of trainer, model and data) go to all three commands; `dream-lightning fit --help` lists them.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh "" # no extra; without an argument it would get those of this script

# More threads are slower for so small a model, and threads that spin while they wait, beside other programs, ten times.
cores='import os; print(min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))'
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c "$cores")}
started=$SECONDS
echo "1 of 3: train 1 M parameters for 1,400 steps on $OMP_NUM_THREADS threads: about ten minutes on two free cores, longer beside other programs"
rm -f lightning_logs/tiny/predictions.jsonl* # of an earlier quickstart: a new model gives new answers
python -m dream_lightning fit --config tiny "$@"
echo "2 of 3: validate, with 64 scored answers: about a minute"
python -m dream_lightning validate --config tiny --ckpt_path last "$@"
echo "3 of 3: answer the validation questions into lightning_logs/tiny/predictions.jsonl"
python -m dream_lightning predict --config tiny --ckpt_path last "$@"

bin=$(dirname "$(command -v python)")
echo "trained, validated and queried in $((SECONDS - started)) s"
echo "curves:  $bin/tensorboard --logdir lightning_logs"
echo "         and open http://localhost:6006/#custom_scalars"
echo "chat:    $bin/dream-lightning chat --model lightning_logs/tiny"
