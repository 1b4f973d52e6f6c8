#!/bin/sh
# Make .venv ready for this checkout: `sh tools/setup.sh [EXTRAS]`, EXTRAS as in pyproject.toml (dev, or s3,onnx).
# A second run does nothing while pyproject.toml is the same; what an interrupted run left is made anew.
#   PYTHON=/path/to/python3.12   the interpreter to use (default: the first that fits)
#   HPO_TORCH=cpu|cuda           the build of torch to prefer (default: cuda where the machine has an NVIDIA GPU);
#                                a torch of the other kind that is there already is replaced
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

case ${HPO_TORCH:-} in
'' | cpu | cuda) ;;
*) fail "HPO_TORCH must be cpu or cuda, got '$HPO_TORCH'" ;;
esac

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

# Torch says so in a file of its own; it is not imported, which takes seconds and may fail.
build_probe='
import importlib.util, pathlib
torch, facts = importlib.util.find_spec("torch"), {}
if torch:
    exec(pathlib.Path(torch.origin).with_name("version.py").read_text(), facts)
    print("cuda" if facts.get("cuda") or facts.get("hip") else "cpu")
'

# Print what the torch in .venv is built for, cpu or cuda; nothing where there is none.
installed_build() {
    .venv/bin/python -P -c "$build_probe"
}

# Whether HPO_TORCH asks for another build than the one in .venv.
other_build_wanted() {
    [ -n "${HPO_TORCH:-}" ] && [ -n "$installed" ] && [ "$HPO_TORCH" != "$installed" ]
}

# Print the torch requirement of pyproject.toml, narrowed to the newest build of the wanted kind where pip's sources
# offer CPU builds (versions that end in +cpu, which sort above the plain ones), or a build is to be replaced.
torch_requirement() {
    range=$(sed -n 's/^ *"\(torch[<>=][^"]*\)".*/\1/p' pyproject.toml)
    versions=$(pip index versions torch 2>/dev/null | sed -n 's/^Available versions: //p' | tr -d ,) || versions=
    wanted=$(wanted_build)
    if ! other_build_wanted; then
        [ -z "$installed" ] || versions= # it stays
        case $versions in *+cpu*) ;; *) versions= ;; esac
    fi
    for version in $versions; do
        case $version in *+cpu) build=cpu ;; *) build=cuda ;; esac
        [ "$build" = "$wanted" ] || continue
        if pip install -q --dry-run --no-deps "$range" "torch===$version" >/dev/null 2>&1; then
            echo "torch===$version"
            return
        fi
    done
    if other_build_wanted; then
        echo "setup: pip's sources offer no $wanted build of $range, so the $installed build in .venv stays; name one" \
            'that does: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu (or cu126, cu130)' >&2
    fi
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
    installed=$(installed_build)
    for made in "$ready" .venv/.ready-dev; do
        if stamp | cmp -s - "$made" && ! other_build_wanted; then exit; fi
    done
else
    make_venv
    installed=
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
