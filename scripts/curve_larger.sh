#!/usr/bin/env bash
# Set up (once), train a Dream of 15 M parameters on sums of eight digits, and draw its curve of accuracy against tokens
# per forward on hard ones: lightning_logs/sums/curve.md and .svg. Minutes on a GPU:
# bash scripts/curve_larger.sh [--option value …]
# The options (of trainer, model and data) go to the training. QUESTIONS: how many a point of the curve is measured on.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh ""

rm -rf lightning_logs/sums # an earlier run's model and curve
python scripts/write_sums.py --folder lightning_logs/sums_data --digits 8
python -m dream_lightning fit --config configs/sums_gpu.yaml "$@"
python scripts/export.py --checkpoint lightning_logs/sums/checkpoints/last.ckpt --folder lightning_logs/sums/model \
    --tokenizer bytes --dtype keep
python scripts/curve.py --pretrained lightning_logs/sums/model --source lightning_logs/sums_data/hard.jsonl \
    --questions "${QUESTIONS:-256}" --batch_size 256 --new_tokens 56 --block 8 --tokens_per_step '[1,2,4,8,14,28,56]' \
    --thresholds '[0.99,0.9,0.5]' --factors '[0.25,1,3]' --out lightning_logs/sums/curve
