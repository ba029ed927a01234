#!/bin/sh
# Make a virtual environment and install into it: scripts/install.sh WHAT…   (what pip shall install, as `-e .`)
#
#   VENV    the environment's folder   (.venv)
#   PYTHON  the interpreter            (the newest of python3.13, python3.12, python3.11, python3 that is at least 3.11)
#   TORCH   what to install as torch   (torch==2.13.0, where torch is wanted)
#   LOCKED  which versions             (yes: those of locks/*.txt; no: the newest within pyproject.toml's ranges)
#
# torch is installed where TORCH is given, where WHAT names the extra `torch`, and where there is an NVIDIA GPU: a CPU is
# served without it. On Linux without an NVIDIA GPU it is a CPU build: gigabytes of CUDA help nobody there.
# A version with a suffix, as 2.13.0+cpu, serves as well; so torch is in no lock.
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
    # What builds the package is locked, too: older versions of pip look at the first variable, newer ones at the second.
    case "$lock" in
        *[[:space:]]*) ;;  # pip would take such a path for several
        *) export PIP_CONSTRAINT="${PIP_CONSTRAINT:+$PIP_CONSTRAINT }$lock"
           export PIP_BUILD_CONSTRAINT="${PIP_BUILD_CONSTRAINT:+$PIP_BUILD_CONSTRAINT }$lock" ;;
    esac
fi
# --no-compile: modules are compiled when they are first imported, which most never are.
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
        # Which build would the configured index give? One that needs NVIDIA's packages is not wanted here.
        if pip install --quiet --dry-run --no-deps --report - "$torch" 2>/dev/null | "$venv/bin/python" -P -c '
import json, sys
requires = json.load(sys.stdin)["install"][0]["metadata"].get("requires_dist", [])
sys.exit(not any(name.startswith(("nvidia-", "cuda-")) for name in requires))' 2>/dev/null; then
            index="--index-url https://download.pytorch.org/whl/cpu"
        fi
    fi
    echo "Installing $torch${index:+ (CPU build)}"
    # What torch needs comes from the index that is configured: that of the CPU builds has few versions of it.
    # shellcheck disable=SC2086  # the option and its value are two words
    if [ -n "$index" ]; then install $index --no-deps "$torch"; fi
    install "$torch"
fi
echo "Installing tokenmill"
install "$@"
# Compile what a server imports, so that the second start is a fast one even where Python may not write bytecode.
modules="tokenmill.backends.cpu.backend, tokenmill.launcher, tokenmill.llm, tokenmill.server.worker"
if has torch; then modules="$modules, tokenmill.backends.torch.backend"; fi
env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -P -c "import $modules" || {
    echo "The installed package cannot be imported; see above. Remove $venv and try again." >&2
    exit 1
}
