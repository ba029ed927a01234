"""Results of transformers for the embedded model, for tests in environments without torch.

`python reference.py FOLDER` writes the tokenizer into FOLDER. Then, for each line of standard input, a JSON list
[context ids, continuation ids], it prints a line [log-likelihood, greedy] of the continuation. greedy: true if each of
its tokens is the likeliest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from support_embedded import reference_model
from transformers import AutoTokenizer

from tokenmill.config import default_cache_dir
from tokenmill.weights import embedded


@torch.inference_mode()
def main() -> None:
    path = Path(embedded.resolve(default_cache_dir(), False, lambda progress: None).path)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(sys.argv[1])
    written = Path(sys.argv[1]) / "tokenizer_config.json"
    fields = json.loads(written.read_text())
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"  # the one that transformers 5 writes is unknown to 4
    written.write_text(json.dumps(fields))
    print("tokenizer", flush=True)
    model = None
    for line in sys.stdin:
        context, continuation = json.loads(line)
        model = model or reference_model(path)
        logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        chosen = logits[range(len(continuation)), continuation]
        greedy = bool((logits.argmax(-1) == torch.tensor(continuation)).all())
        print(json.dumps([chosen.double().sum().item(), greedy]), flush=True)


if __name__ == "__main__":
    main()
