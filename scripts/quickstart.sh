#!/usr/bin/env bash
# Install (once), then train, validate and query a tiny Dream: bash scripts/quickstart.sh [--option value …]
# The options (of trainer, model and data) go to all three commands; `dream-lightning fit --help` lists them.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh "" # no extra; without an argument it would get those of this script

started=$SECONDS
rm -f lightning_logs/tiny/predictions.jsonl* # of an earlier quickstart: a new model gives new answers
python -m dream_lightning fit --config tiny "$@"
python -m dream_lightning validate --config tiny --ckpt_path last "$@"
python -m dream_lightning predict --config tiny --ckpt_path last "$@"

bin=$(dirname "$(command -v python)")
echo "trained, validated and queried in $((SECONDS - started)) s"
echo "curves:  $bin/tensorboard --logdir lightning_logs"
echo "chat:    $bin/dream-lightning chat --model lightning_logs/tiny"
