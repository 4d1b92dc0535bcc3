#!/bin/sh
# Makes .venv from the exact pins that the project was tested with. Called by make; a second call, or a second make
# beside it, waits its turn and then finds nothing to do.
set -eu
cd "$(dirname "$0")/.."
constraints=${1:-envs/cpu.txt}

exec 9>.venv.lock
flock 9

want=$(cat pyproject.toml "$constraints" | cksum)
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
command -v c++ >/dev/null || echo "warning: no C++ compiler; DeepSpeed needs one for make train (Debian: apt-get install g++)" >&2

echo "setting up .venv with $("$python" --version) and $constraints"
rm -f .venv/.ready
[ -x .venv/bin/python ] || "$python" -m venv .venv
# torch first and alone: asked for later, by a package that only wants some torch, another build could be chosen.
.venv/bin/python -m pip install --quiet --constraint "$constraints" torch
.venv/bin/python -m pip install --quiet --constraint "$constraints" --editable ".[train,serve,lora,tf,dev]"
.venv/bin/python -m pip check
echo "$want" >.venv/.ready
