"""Measure the events per second that the front end sends: the real server with the mock engine and one HTTP worker.

    python bench/frontend.py [--streams 256] [--tokens 200] [--route chat|generate] [--model PATH]

The client shares the machine's cores with server and engine, so it only counts events and does not parse them.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import time

from serving import served

_CHAT = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "ignore_eos": True}
BODIES = {
    "chat": ("/v1/chat/completions", lambda n: _CHAT | {"max_tokens": n}),
    "generate": (
        "/generate_stream",
        lambda n: {"inputs": "hi", "parameters": {"max_new_tokens": n, "ignore_eos": True}},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--route", choices=sorted(BODIES), default="chat")
    parser.add_argument("--model", default="", help="folder or .gguf with the tokenizer; default: the embedded model")
    parser.add_argument("--step-ms", type=float, default=0.0, help="time of a step of the mock engine")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    told = f"--mock --mock-step-ms {args.step_ms} --max-concurrent-requests {args.streams} --log-level warn".split()
    told += ["--max-batch-size", str(args.streams), "--max-batch-prefill-tokens", "16384"]
    told += ["--model-id", args.model] if args.model else []
    with served(*told) as base:
        port = int(base.rpartition(":")[2])
        for _ in range(args.repeat):
            events, seconds, first = run(port, args.route, args.streams, args.tokens)
            rate = events / seconds
            print(f"{args.route}: {args.streams} streams, {events} events in {seconds:.2f} s after {first:.2f} s: "
                  f"{rate:,.0f} events/s")  # fmt: skip


def run(port: int, route: str, streams: int, tokens: int) -> tuple[int, float, float]:
    """Return the number of events, the seconds from the first event to the last, and the seconds to the first."""
    path, body_of = BODIES[route]
    body = json.dumps(body_of(tokens)).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    selector = selectors.DefaultSelector()
    for _ in range(streams):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setblocking(False)
        selector.register(sock, selectors.EVENT_READ)
    begin = time.perf_counter()
    for key in list(selector.get_map().values()):
        key.fileobj.send(head.encode() + body)  # type: ignore[union-attr]
    events, first, open_streams = 0, 0.0, streams
    while open_streams:
        for key, _ in selector.select():
            data = key.fileobj.recv(1 << 18)  # type: ignore[union-attr]
            count = data.count(b"data: {")
            if count and not first:
                first = time.perf_counter()
            events += count
            if data.endswith(b"0\r\n\r\n") or not data:
                selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
                open_streams -= 1
    return events, time.perf_counter() - first, first - begin


if __name__ == "__main__":
    main()
