#!/usr/bin/env bash
# Distill a model trained from scratch on its own trajectories, and compare accuracy × tokens per forward:
# bash scripts/accelerate.sh CONFIG TRAINING TEST NEW_TOKENS QUESTIONS BATCH [options of fit …]
#   e.g. bash scripts/accelerate.sh sudoku puzzles/sudoku_train.jsonl puzzles/sudoku_test.jsonl 82 60000 2048
# The teacher is the folder accelerate/CONFIG/teacher; if there is none, lightning_logs/CONFIG/checkpoints/last.ckpt.
# Everything new goes to accelerate/CONFIG.
set -euo pipefail
config=$1 training=$2 test=$3 tokens=$4 count=$5 batch=$6
shift 6
out=accelerate/$(basename "$config")
style=$(python -c "import sys, yaml; from dream_lightning.cli import config_path; \
print(yaml.safe_load(open(config_path(sys.argv[1])))['data'].get('style', 'chat'))" "$config")
asked=(--style "$style" --batch_size "$batch" --sampling.max_new_tokens "$tokens" --sampling.steps "$tokens"
  --sampling.alg maskgit_plus --sampling.forbid_mask true)

export_model() { python -m dream_lightning export --checkpoint "$1" --tokenizer bytes --dtype keep --folder "$2"; }
grid() {
  python -m dream_lightning evaluate-grid --model "$1" --task "$test" --out "$2" "${asked[@]}" \
    --grid '{threshold: [0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]}'
}

started=$SECONDS
[ -d "$out/teacher" ] || export_model "lightning_logs/$(basename "$config")/checkpoints/last.ckpt" "$out/teacher"
grid "$out/teacher" "$out/before" # also says that the teacher can do it, before anything long begins
python -m dream_lightning write-trajectories --model "$out/teacher" --source "$training" --count "$count" \
  --out "$out/trajectories.jsonl" "${asked[@]}" --sampling.steps "$(((tokens + 1) / 2))"
python -m dream_lightning fit --config "$config" --config objective/certainty \
  --model.new_model null --model.pretrained "$out/teacher" --data.source "$out/trajectories.jsonl" \
  --checkpoint.dirpath "$out/checkpoints" --autosave.dirpath "$out/checkpoints" --trainer.logger false "$@"
export_model "$out/checkpoints/last.ckpt" "$out/student"
grid "$out/student" "$out/after"
echo "AUP before and after, in $((SECONDS - started)) s:"
python -c "import json, sys; print(*(json.load(open(f'{f}/grid.json'))['aup'] for f in sys.argv[1:]))" "$out/before" "$out/after"
