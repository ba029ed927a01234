"""An environment of its own for each peer, made on first use in the user's cache folder, never in the checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tokenmill.config import default_cache_dir

REQUIREMENTS = {
    "llamacpp": ("xllamacpp==2026.10.11549",),
    "openvino": ("openvino-genai==2026.4.1.0", "openvino==2026.4.1", "numpy==2.4.6"),
}
"""What is installed for a peer: versions are pinned, so that a figure says what it measured."""

_CONVERT = """
import sys, openvino_genai
openvino_genai.LLMPipeline(sys.argv[1], "CPU", enable_save_ov_model=True)
"""


def folder() -> Path:
    """Where the environments are."""
    return Path(default_cache_dir()) / "peers"


def interpreter(peer: str) -> Path:
    """The peer's Python; its environment is made if it is not there."""
    version = REQUIREMENTS[peer][0].partition("==")[2]
    home = folder() / f"{peer}-{version}"
    python = home / "bin" / "python"
    stamp = home / ".installed"
    if not stamp.exists():
        print(f"installing {', '.join(REQUIREMENTS[peer])} in {home}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS[peer]], check=True)
        stamp.touch()
    return python


def openvino_model(gguf: Path) -> Path:
    """The folder of OpenVINO's own form of a GGUF file, which its converter writes beside a link to the file."""
    version = REQUIREMENTS["openvino"][0].partition("==")[2]
    home = folder() / f"openvino-{version}-{gguf.stem}"
    if not (home / ".converted").exists():
        python = interpreter("openvino")
        home.mkdir(parents=True, exist_ok=True)
        link = home / gguf.name
        if not link.exists():
            link.symlink_to(gguf.resolve())
        subprocess.run([str(python), "-c", _CONVERT, str(link)], check=True, stdout=subprocess.DEVNULL)
        (home / ".converted").touch()
    return home
