#!/usr/bin/env bash
# Set up (once), then train, validate and question a tiny Dream: bash scripts/quickstart.sh [--option value …]
# The options (of trainer, model and data) go to all three, see python -m dream_lightning fit --help.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh "" # no extra; without an argument it would see ours

started=$SECONDS
config=(--config configs/tiny.yaml)

rm -f lightning_logs/tiny/predictions.jsonl # of an earlier quickstart: a new model gives new answers
python -m dream_lightning fit "${config[@]}" "$@"
python -m dream_lightning validate "${config[@]}" --ckpt_path last "$@"
python -m dream_lightning predict "${config[@]}" --ckpt_path last "$@"

echo "trained, validated and questioned in $((SECONDS - started)) s"
echo "watch it:  $(dirname "$(command -v python)")/tensorboard --logdir lightning_logs"
echo "ask it:    python scripts/chat.py --model lightning_logs/tiny/checkpoints/last.ckpt --tokenizer bytes --params.max_new_tokens 30 --params.steps 15"
