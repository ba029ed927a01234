#!/bin/sh
# Make a virtual environment and install into it: scripts/install.sh WHAT…   (arguments of pip, such as `-e .`)
#
#   VENV    the environment's folder   (.venv)
#   PYTHON  the interpreter            (the newest of python3.13, python3.12, python3.11, python3 that is at least 3.11)
#   TORCH   requirement of torch       (torch==2.13.0, if torch is installed)
#   LOCKED  versions to install        (yes: those of locks/*.txt; no: the newest within pyproject.toml's ranges)
#
# torch is installed if TORCH is given, if WHAT names the extra `torch`, or if there is an NVIDIA GPU: the CPU backend
# does not need it. On Linux without an NVIDIA GPU it is a CPU build, which saves gigabytes of CUDA libraries.
# No lock file contains torch, because a version with a suffix, such as 2.13.0+cpu, is accepted too.
set -eu
locks=$(dirname "$0")/../locks
venv=${VENV:-.venv}
torch=${TORCH:-}
gpu=
if [ -e /dev/nvidiactl ] || command -v nvidia-smi >/dev/null; then gpu=yes; fi
case "$*" in *[[,]torch[],]*) torch=${torch:-torch==2.13.0} ;; esac
if [ -n "$gpu" ]; then torch=${torch:-torch==2.13.0}; fi

python=
for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "Python 3.11 or newer is needed (found: $(python3 --version 2>&1 || echo none)). Install it, or name it: make PYTHON=/path/to/python3" >&2
    exit 1
fi

if ! [ -x "$venv/bin/python" ]; then
    echo "Making $venv with $("$python" --version)"
    "$python" -m venv "$venv" || {
        rm -rf "$venv"
        echo "The virtual environment could not be made. On Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    }
fi
pip() { "$venv/bin/python" -m pip "$@" --disable-pip-version-check --no-input; }
has() { "$venv/bin/python" -P -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

lock=
if [ "${LOCKED:-yes}" = yes ]; then
    lock=$locks/without-torch.txt
    if [ -n "$torch" ] || has torch; then lock=$locks/torch.txt; fi
    # Lock the build requirements too: older versions of pip read the first variable, newer ones the second.
    case "$lock" in
        *[[:space:]]*) ;;  # pip would split a path with white space
        *) export PIP_CONSTRAINT="${PIP_CONSTRAINT:+$PIP_CONSTRAINT }$lock"
           export PIP_BUILD_CONSTRAINT="${PIP_BUILD_CONSTRAINT:+$PIP_BUILD_CONSTRAINT }$lock" ;;
    esac
fi
# --no-compile: most modules are never imported, and the others are compiled at their first import.
install() {
    pip install --quiet --quiet --no-compile ${lock:+--constraint "$lock"} "$@" || {
        echo "pip could not install $*; see above." >&2
        if [ -n "$lock" ]; then
            echo "Its versions are those of $lock: if an index lacks one of them, LOCKED=no takes the newest that it has." >&2
        fi
        exit 1
    }
}

if [ -n "$torch" ] && ! has torch; then
    index=
    if [ "$(uname -s)" = Linux ] && [ -z "$gpu" ]; then
        # Use the index of CPU builds if the configured index has a build that requires NVIDIA's packages.
        if pip install --quiet --dry-run --no-deps --report - "$torch" 2>/dev/null | "$venv/bin/python" -P -c '
import json, sys
requires = json.load(sys.stdin)["install"][0]["metadata"].get("requires_dist", [])
sys.exit(not any(name.startswith(("nvidia-", "cuda-")) for name in requires))' 2>/dev/null; then
            index="--index-url https://download.pytorch.org/whl/cpu"
        fi
    fi
    echo "Installing $torch${index:+ (CPU build)}"
    # Requirements of torch come from the configured index: the index of CPU builds has few versions of them.
    # shellcheck disable=SC2086  # the option and its value are two words
    if [ -n "$index" ]; then install $index --no-deps "$torch"; fi
    install "$torch"
fi
echo "Installing tokenmill"
install "$@"
# Compile the modules of a server now, so that starts are fast even if Python may not write bytecode.
modules="tokenmill.backends.cpu.backend, tokenmill.launcher, tokenmill.llm, tokenmill.server.worker"
if has torch; then modules="$modules, tokenmill.backends.torch.backend"; fi
env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -P -c "import $modules" || {
    echo "The installed package cannot be imported; see above. Remove $venv and try again." >&2
    exit 1
}
