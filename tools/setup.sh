#!/bin/sh
# Make .venv ready for this checkout: `sh tools/setup.sh [EXTRAS]`, EXTRAS as in pyproject.toml (dev, or s3,onnx).
# A second run does nothing while pyproject.toml is the same; what an interrupted run left is made anew.
#   PYTHON=/path/to/python3.12   the interpreter to use (default: the first that fits)
#   HPO_TORCH=cpu|cuda           the build of torch to prefer (default: cuda where the machine has an NVIDIA GPU)
set -eu
unset CDPATH
cd "$(dirname "$0")/.."
extras=${1:-}
ready=.venv/.ready-${extras:-core}
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

pip() {
    .venv/bin/python -m pip "$@"
}

probe='
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit("is Python %d.%d" % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError:
    sys.exit("has no venv module (Debian, Ubuntu: install the package python3-venv)")
'

# Print the first interpreter that runs, is new enough and can make virtual environments.
find_python() {
    tried=
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.13 python3.12 python3.11; fi
    for candidate; do
        if ! command -v "$candidate" >/dev/null; then
            why='not found'
        elif why=$("$candidate" -c "$probe" 2>&1 </dev/null); then
            echo "$candidate"
            return
        fi
        tried="$tried
  $candidate: $(printf '%s\n' "$why" | tail -n 1)"
    done
    fail 'Python 3.11, 3.12 or 3.13 with its venv module is missing;' \
        'install one, or name one: make ... PYTHON=/path/to/python3' "tried:$tried"
}

# Whether .venv is whole, was made in this folder and runs.
usable() {
    [ ! -e .venv/.unfinished ] || return 1
    for stamp in .venv/.ready-*; do
        [ ! -e "$stamp" ] || [ "$(head -n 1 "$stamp")" = "$(pwd -P)" ] || return 1
    done
    .venv/bin/python -c "$probe" >/dev/null 2>&1 && pip --version >/dev/null 2>&1
}

make_venv() {
    python=$(find_python)
    rm -rf .venv
    mkdir .venv || fail "cannot write in $(pwd -P); set up a clone of your own"
    touch .venv/.unfinished
    "$python" -m venv .venv || fail "$python could not make a virtual environment in .venv: the lines above say why"
}

wanted_build() {
    if [ -n "${HPO_TORCH:-}" ]; then
        echo "$HPO_TORCH"
    elif [ -e /dev/nvidia0 ] || [ -d /proc/driver/nvidia/gpus ] || nvidia-smi -L 2>/dev/null | grep -q GPU; then
        echo cuda
    else
        echo cpu
    fi
}

# Print the torch requirement of pyproject.toml. Where pip's sources offer CPU builds (versions that end in +cpu, which
# sort above the plain ones) it is narrowed to the newest build of the wanted kind; a torch already there stays.
torch_requirement() {
    range=$(sed -n 's/^ *"\(torch[<>=][^"]*\)".*/\1/p' pyproject.toml)
    versions=$(pip index versions torch 2>/dev/null | sed -n 's/^Available versions: //p' | tr -d ,) || versions=
    wanted=$(wanted_build)
    case $versions in *+cpu*) ;; *) versions= ;; esac
    ! .venv/bin/python -P -c 'import importlib.util as i; exit(not i.find_spec("torch"))' || versions=
    for version in $versions; do
        case $version in *+cpu) build=cpu ;; *) build=cuda ;; esac
        [ "$build" = "$wanted" ] || continue
        if pip install -q --dry-run --no-deps "$range" "torch===$version" >/dev/null 2>&1; then
            echo "torch===$version"
            return
        fi
    done
    echo "$range"
}

stamp() {
    pwd -P
    cat pyproject.toml
}

# One set-up at a time in one checkout, where the system has flock.
exec 9<pyproject.toml
if command -v flock >/dev/null; then flock 9 || true; fi

if usable; then
    for made in "$ready" .venv/.ready-dev; do
        if stamp | cmp -s - "$made"; then exit; fi
    done
else
    make_venv
fi
torch=$(torch_requirement)
echo "setup: installing hpo${extras:+[$extras]} with $torch into .venv (a few minutes the first time)"
touch .venv/.unfinished
pip install -q --no-compile -e ".${extras:+[$extras]}" "$torch" ||
    fail 'pip could not install the packages: the lines above say why' \
        '(needed: a package index within reach, some 3 GB of disk, with CUDA 8 GB)'
.venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true # pip itself compiles on one core only
stamp >"$ready"
rm .venv/.unfinished
