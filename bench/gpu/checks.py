"""Run the CUDA backend's tests on this machine's card as a figure: `python -m bench.gpu.checks tests/test_cuda.py`."""

from __future__ import annotations

import re
import subprocess
import sys

from bench.gpu.tell import figure


def main() -> None:
    command = [sys.executable, "-m", "pytest", "--no-header", "-p", "no:cacheprovider", *sys.argv[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(done.stdout)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)}
    figure("", "GPU tests passed", counts.get("passed", 0), "", **counts)
    if done.returncode:
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        sys.exit(f"Error: tests failed: {'; '.join(failed)[:250] or done.stdout[-250:]}")


if __name__ == "__main__":
    main()
