"""Loss of the methods of `--quantize`: `python -m bench.quantization_loss [--json FILE]`.

The embedded model's weights are dequantized to float32, quantized by each method, and computed by transformers in
float32 on fixed texts. So only the weights' rounding is measured, not that of activations. The weights come from a
GGUF file of 4 bits and blocks of 32, which `int4` reproduces nearly: its loss is not that of other models.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.accuracy import TEXTS, reference
from tokenmill.config import default_cache_dir
from tokenmill.models.base import program_of
from tokenmill.program.cost import weights_of
from tokenmill.quant._method import while_loading
from tokenmill.quant.base import load, reader_of
from tokenmill.text.load import load_tokenizer
from tokenmill.weights import embedded
from tokenmill.weights.checkpoint import Safetensors


@torch.no_grad()
def scores(model: Any, texts: list[list[int]]) -> list[Tensor]:
    """Return the log-probabilities of every next token, (tokens − 1, vocabulary), of each text."""
    return [torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1) for ids in texts]


def quantized(folder: Path, method: str) -> dict[str, Tensor]:
    """Return the numbers that a method makes of a checkpoint's weights, by name."""
    source = Safetensors(folder)
    read, numbers = reader_of(source, method), dict[str, Tensor]()
    for weight in weights_of(program_of(source.config)):
        for part in weight.parts:
            single = replace(weight, parts=(part,))
            numbers[part.name] = torch.from_numpy(load(single, source, read).floats())
    return numbers


def compared(method: str, found: list[Tensor], exact: list[Tensor], texts: list[list[int]]) -> dict[str, Any]:
    """Compare the log-probabilities of all texts with the reference's. `kl`: mean divergence, in nats a token."""
    mine, right = (
        torch.cat([part.gather(-1, torch.tensor(ids[1:])[:, None]) for part, ids in zip(side, texts, strict=True)])
        for side in (found, exact)
    )
    kl = torch.cat([(e.exp() * (e - f)).sum(-1) for f, e in zip(found, exact, strict=True)])
    same = torch.cat([f.argmax(-1) == e.argmax(-1) for f, e in zip(found, exact, strict=True)])
    return {
        "method": method,
        "perplexity": math.exp(-mine.mean()),
        "difference": math.exp(float(right.mean() - mine.mean())) - 1,
        "error": float((mine - right).std() / math.sqrt(len(mine))),
        "kl": float(kl.mean()),
        "same_likeliest": float(same.float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=while_loading())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    source = embedded.resolve(default_cache_dir(), False, lambda _: None)
    model, tokenizer = reference(Path(source.path)), load_tokenizer(source)
    texts = [list(tokenizer.encode(path.read_text(), add_special_tokens=False)) for path in TEXTS]
    exact, rows = scores(model, texts), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state = {key: value.clone() for key, value in model.state_dict().items() if key != "lm_head.weight"}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
        for method in options.methods:
            model.load_state_dict(quantized(folder, method), strict=False)
            rows.append(compared(method, scores(model, texts), exact, texts))
            print(json.dumps(rows[-1]), flush=True)
    if options.json:
        tokens = sum(len(text) - 1 for text in texts)
        record = {"date": time.strftime("%Y-%m-%d"), "model": Path(source.path).name, "tokens": tokens, "methods": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
