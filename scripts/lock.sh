#!/bin/sh
# Write locks/*.txt: one version of every package that make installs, for each supported Python, on Linux and macOS.
#
#   scripts/lock.sh                              the newest of everything within the ranges of pyproject.toml
#   scripts/lock.sh --upgrade-package NAME…      the newest of that package; others change only if necessary
#
# torch and the requirements of its CUDA builds are left out: scripts/install.sh chooses the build. The files contain no
# address of an index, so mirrors work too.
set -eu
cd "$(dirname "$0")/.."
venv=${VENV:-.venv-lock}
uv=$venv/bin/uv
if ! "$uv" --version 2>/dev/null | grep -q '^uv 0\.13\.9\b'; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input uv==0.13.9
fi
[ $# -gt 0 ] || set -- --upgrade
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM
echo 'torch==2.13.0' > "$scratch/torch.in"
echo 'setuptools>=77' > "$scratch/build.in"  # as pyproject.toml's build-system

# compile NAME ARGUMENT…: write locks/NAME.txt from the arguments of `uv pip compile`
compile() {
    name=$1
    shift
    echo "locks/$name.txt"
    if [ -f "locks/$name.txt" ]; then cp "locks/$name.txt" "$scratch/$name.txt"; fi
    "$uv" pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
        --output-file "$scratch/$name.txt" "$@" > /dev/null
    {
        echo "# Made by \`make lock\`; see docs/contributing.md."
        grep -vE '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==' "$scratch/$name.txt"
    } > "$scratch/locked"
    mv "$scratch/locked" "locks/$name.txt"
}

mkdir -p locks
# triton: the version for tests is pinned in pyproject.toml, and differs from that of torch.
echo 'triton; sys_platform == "never"' > "$scratch/without-triton.in"
compile torch pyproject.toml "$scratch/torch.in" "$scratch/build.in" \
    --extra torch --extra test --extra dev --override "$scratch/without-triton.in" "$@"
compile without-torch pyproject.toml "$scratch/build.in" --extra test --constraint locks/torch.txt "$@"
compile clients tests/clients/requirements.txt "$@"
