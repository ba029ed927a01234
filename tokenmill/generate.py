"""`tokenmill generate`: answer one prompt in this process, without a server, and print the text while it arrives."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tokenmill.errors import RequestError, StartError
from tokenmill.llm import LLM
from tokenmill.options import Parser

_PARAMS = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")


def main(words: list[str]) -> int:
    """Run the command and return the exit code. Raises StartError if the model cannot be run."""
    given = _parser().parse_args(words)
    prompt = _prompt(given.prompt)
    params: dict[str, Any] = {name: getattr(given, name) for name in _PARAMS if getattr(given, name) is not None}
    if given.stop:
        params["stop"] = tuple(given.stop)
    with LLM(given.model_id or None) as llm:
        try:
            if given.raw:
                pieces = llm.stream(prompt, **params)
            else:
                pieces = llm.stream_chat([{"role": "user", "content": prompt}], **params)
            for piece in pieces:
                print(piece, end="", flush=True)
        except RequestError as error:
            raise StartError(str(error)) from None
    print()
    return 0


def _prompt(given: str) -> str:
    """Return the prompt, read from stdin for `-`. Raises StartError if it is not text."""
    try:
        prompt = sys.stdin.read() if given == "-" else given
        prompt.encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise StartError(f"The prompt is not UTF-8 ({error.reason} at {error.start}).") from None
    return prompt


def _parser() -> argparse.ArgumentParser:
    about = "Answer PROMPT in this process, without a server. The text is printed as it comes."
    parser = Parser(prog="tokenmill generate", description=about)
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt; - reads it from stdin")
    parser.add_argument("--model-id", default="", help="a Hub id, a folder or a .gguf file")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: greedy, the default")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; repeatable")
    parser.add_argument("--raw", action="store_true", help="continue PROMPT as it is, without the chat template")
    return parser
