"""Create a separate Python environment for each peer, on first use, in the user's cache folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tokenmill.config import default_cache_dir

REQUIREMENTS = {
    "llamacpp": ("xllamacpp==2026.10.11549",),
    "openvino": ("openvino-genai==2026.4.1.0", "openvino==2026.4.1", "numpy==2.4.6"),
}
"""Packages of each peer, with pinned versions, so that figures are reproducible"""

_CONVERT = """
import sys, openvino_genai
openvino_genai.LLMPipeline(sys.argv[1], "CPU", enable_save_ov_model=True)
"""


def folder() -> Path:
    """Return the folder of the environments."""
    return Path(default_cache_dir()) / "peers"


def interpreter(peer: str) -> Path:
    """Return the peer's Python, creating its environment if necessary."""
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
    """Return the folder of a GGUF file in OpenVINO's format, which its converter writes next to a link to the file."""
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
