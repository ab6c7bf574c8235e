# Sourced by the other scripts: installs this package, into a new .venv unless a virtual environment is active.
# Usage: source scripts/environment.sh [extra]
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -d .venv ] || "${PYTHON:-python3}" -m venv .venv
    source .venv/bin/activate
fi
extra=${1:+[$1]}
marker=$VIRTUAL_ENV/.dream_lightning${1:+-$1}
if [ ! -e "$marker" ] || [ pyproject.toml -nt "$marker" ]; then
    echo "installing into $VIRTUAL_ENV (once) …"
    # torch first and alone: the build for this machine, which the rest then keeps
    python -c 'import torch' 2>/dev/null || pip install --quiet --disable-pip-version-check "torch${TORCH_VERSION:-==2.13.0}"
    pip install --quiet --disable-pip-version-check --editable ".$extra"
    touch "$marker"
fi
