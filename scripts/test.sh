#!/usr/bin/env bash
# Install (once) and run the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh test
ruff check .
ruff format --check .
pytest -n 2 --dist loadgroup "$@" # two tests at a time, each on one core; -n 0 for a debugger
