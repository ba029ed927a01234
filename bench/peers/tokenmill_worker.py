"""Run this engine in process on token ids, without HTTP, tokenizer or detokenizer, as a baseline of the HTTP path.

`python tokenmill_worker.py [options of tokenmill serve]`: prints READY, then answers each JSON line
{"prompts": [ids…], "new_tokens": n} with {"wall_s": s, "tokens": n}.
"""

import json
import sys
import time

from tokenmill.config import Settings
from tokenmill.parallel.group import Group
from tokenmill.runtime.assembly import assemble
from tokenmill.runtime.offline import OfflineEngine
from tokenmill.runtime.worker import engine_options
from tokenmill.weights import embedded
from tokenmill.wire.messages import SamplingParams, StoppingParams


def main() -> None:
    settings = Settings.from_args(sys.argv[1:])
    source = embedded.resolve(settings.cache_dir, True, lambda _: None)
    with OfflineEngine(assemble(source, engine_options(settings), Group(), lambda _: None)) as engine:
        print("READY", flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            stopping = StoppingParams(asked["new_tokens"])
            start = time.perf_counter()
            tokens = engine.generate(asked["prompts"], SamplingParams(), stopping)
            wall = time.perf_counter() - start
            print(json.dumps({"wall_s": wall, "tokens": sum(map(len, tokens))}), flush=True)


if __name__ == "__main__":
    main()
