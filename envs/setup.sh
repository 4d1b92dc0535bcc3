#!/bin/sh
# Makes .venv from the exact pins that the project was tested with. Called by make; a second call, or a second make
# beside it, waits its turn and then finds nothing to do.
set -eu
cd "$(dirname "$0")/.."
exec 9>.venv.lock
flock 9

# What was chosen once stays chosen: make setup CONSTRAINTS=envs/cuda.txt, then plain make.
constraints=${1:-$(cat .venv/.constraints 2>/dev/null || echo envs/cpu.txt)}
[ -f "$constraints" ] || { echo "error: $constraints: no such file of constraints" >&2; exit 2; }
want=$(echo "$constraints" | cat - pyproject.toml envs/*.txt | cksum)
[ "$(cat .venv/.ready 2>/dev/null || true)" = "$want" ] && exit 0

python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3.11 python3.12 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
fi
if [ -z "$python" ]; then
    echo "error: no Python 3.11 or 3.12 found; install one, or name it: make setup PYTHON=/path/to/python3.11" >&2
    exit 2
fi

echo "setting up .venv with $("$python" --version) and $constraints"
rm -f .venv/.ready
# Also over an environment that is there: one whose making was cut off has a python but no pip.
"$python" -m venv .venv
# torch first and alone: asked for later, by a package that only wants some torch, another build could be chosen.
.venv/bin/python -m pip install --quiet --constraint "$constraints" torch
.venv/bin/python -m pip install --quiet --constraint "$constraints" --editable ".[train,serve,lora,qlora,tf,dev]"
.venv/bin/python -m pip check
echo "$constraints" >.venv/.constraints
echo "$want" >.venv/.ready
