"""`tokenmill quantize`: write a GPTQ checkpoint of 4 bits of a model, calibrated on a text.

It takes the arguments of TGI's `text-generation-server quantize`. The layers' products are quantized; embedding, output
matrix, norms and biases stay as they are. The perplexity of a text apart from the calibration's is printed before and
after, the latter of the files as they were written.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill import fetch, logs, progress
from tokenmill.backends.base import StepLimits
from tokenmill.backends.kind import BackendOptions, Job, Placement
from tokenmill.config import Settings
from tokenmill.errors import ArgumentError, ModelError, StartError, Unsupported
from tokenmill.extras import has_torch
from tokenmill.models.base import language_part
from tokenmill.options import Parser
from tokenmill.parallel.group import Group
from tokenmill.program import ops
from tokenmill.program.encoded import encodes
from tokenmill.program.ops import Part, Weight
from tokenmill.program.value import Program
from tokenmill.quant._method import method_of
from tokenmill.quant._packed import packed
from tokenmill.quant.base import Piece, check, reader_of
from tokenmill.runtime.programs import programs_for
from tokenmill.text.load import load_tokenizer
from tokenmill.weights.checkpoint import QUANTIZATION_FILES, Checkpoint, open_checkpoint
from tokenmill.weights.source import ModelSource, local_source, unreadable
from tokenmill.weights.written import Written, write

if TYPE_CHECKING:
    from tokenmill.backends.torch.calibration import Calibration
    from tokenmill.backends.torch.gptq import Rounded

_BITS = 4
_HELD_OUT = 8  # one of so many topics is for the perplexity, not for the calibration
_EVALUATED = 8  # texts of the perplexity


class Matrix(NamedTuple):
    """Rows of a module's matrix that were quantized so far, as codes: scale[group] · (code − 8)."""

    codes: NDArray[np.uint8]  # (outputs, inputs)
    scale: NDArray[np.float16]  # (outputs, groups)
    group_of: NDArray[np.int64]  # (inputs,)
    done: NDArray[np.bool_]  # (outputs,)


def main(words: Sequence[str]) -> int:
    """Run the command and return the exit code. Raises StartError with the remedy."""
    given = _parser().parse_args(list(words))
    _check(given)
    logs.set_up(given.logger_level, json=given.json_output)
    screen = progress.display(json=given.json_output)
    try:
        named = {"revision": given.revision} if given.revision else {}
        settings = Settings.from_env(model_id=given.model_id, trust_remote_code=given.trust_remote_code, **named)
        source = fetch.fetch(settings, screen.progress)
        _quantize(source, given, screen)
    finally:
        screen.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Write a GPTQ checkpoint of 4 bits of a model to a folder. It is calibrated on a text."
    parser = Parser(prog="tokenmill quantize", description=about)
    parser.add_argument("model_id", metavar="MODEL_ID", help="a Hub id, a folder or a .gguf file")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="folder to write; it must not hold a model")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--trust-remote-code", action=argparse.BooleanOptionalAction, default=False,
                        help="allow models that Python code in their repository defines")  # fmt: skip
    parser.add_argument("--upload-to-model-id", metavar="ID", help="TGI: upload the result; refused")
    parser.add_argument("--percdamp", type=float, default=0.01, metavar="SHARE",
                        help="damping of the hessian; default 0.01")  # fmt: skip
    parser.add_argument("--act-order", action=argparse.BooleanOptionalAction, default=False,
                        help="round inputs with large activations first: more exact, and slower to serve")  # fmt: skip
    parser.add_argument("--groupsize", type=int, default=128, metavar="N", help="inputs that share a scale; -1: all")
    parser.add_argument("--calibration", metavar="FILE", help="a text; default: the documentation inside Python")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="pieces of the text; default 32")
    parser.add_argument("--length", type=int, default=512, metavar="TOKENS", help="of a piece; default 512")
    parser.add_argument("--logger-level", default="info", metavar="LEVEL")
    parser.add_argument("--json-output", action=argparse.BooleanOptionalAction, default=False, help="logs as JSON")
    return parser


def _check(given: argparse.Namespace) -> None:
    """Raise ArgumentError for values that cannot be used, and StartError without torch."""
    if given.upload_to_model_id:
        raise ArgumentError(
            "`upload-to-model-id` is not supported. Leave it out, and run `hf upload` on the folder afterwards."
        )
    if given.groupsize != -1 and (given.groupsize < 8 or given.groupsize % 8):
        raise ArgumentError(f"`groupsize` is {given.groupsize}; it must be -1 or a multiple of 8, such as 128.")
    if not 0 < given.percdamp < 1:
        raise ArgumentError(f"`percdamp` is {given.percdamp}; it must be between 0 and 1, such as 0.01.")
    for name, least in (("samples", 1), ("length", 16)):
        if getattr(given, name) < least:
            raise ArgumentError(f"`{name}` is {getattr(given, name)}; it must be at least {least}.")
    folder = Path(given.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.gguf"))):
        raise ArgumentError(f"{folder} is no empty folder: it holds a model. Give another OUTPUT_DIR.")
    if not has_torch():
        raise StartError("Quantizing needs torch. Install it: `pip install tokenmill[torch]`.")


def _quantize(source: ModelSource, given: argparse.Namespace, screen: Any) -> None:
    began = time.monotonic()
    checkpoint = open_checkpoint(source)
    program = programs_for(checkpoint, BackendOptions(trust_remote_code=given.trust_remote_code)).decoder
    _refuse(checkpoint, program)
    rounds = products(program)
    _check_group(rounds, given.groupsize)
    texts, held_out = _texts(source, given)
    _check_ids([*texts, *held_out], program)
    backend = _backend(program, checkpoint, texts, rounds)
    screen.line(f"{len(texts)} texts of {given.length} tokens; perplexity of {len(held_out)} others:")
    before = backend.perplexity(held_out)
    screen.line(f"{before:.4f} before")
    folder, from_folder = Path(given.output_dir), Path(source.path) if Path(source.path).is_dir() else None
    with _spilling(folder) as spilled:
        made = _round(backend, checkpoint, texts, rounds, given, screen, Path(spilled))
        backend.close()
        files = write(folder, config_of(checkpoint, given), _tensors(checkpoint, made), from_folder)
    written = open_checkpoint(local_source(folder))
    again = _backend(program, written, held_out, set())
    after = again.perplexity(held_out)
    again.close()
    size = sum(path.stat().st_size for path in files)
    screen.line(f"{after:.4f} after ({100 * (after / before - 1):+.2f} %)")
    if from_folder is None:
        screen.line(f"A GGUF file has no tokenizer files. Copy the model's tokenizer.json to {folder}.")
    screen.line(f"{folder}: {len(made)} matrices of 4 bits, {size / 1e6:.1f} MB, in {time.monotonic() - began:.0f} s.")


def _refuse(checkpoint: Checkpoint, program: Program) -> None:
    """Raise for a model that cannot be quantized."""
    method = method_of(checkpoint)
    if method not in ("none", "gguf"):
        raise ModelError(f"The checkpoint is quantized already, as {method!r}. Give the model that it was made from.")
    kind = checkpoint.config.get("model_type")
    why = "has experts" if any(isinstance(op, ops.Experts) for op in program.ops) else ""
    why = "has an encoder" if encodes(program) else why
    why = "is multimodal" if language_part(checkpoint.config) is not checkpoint.config else why
    if why or not products(program):
        why = why or "is computed by transformers"
        cure = f"This model {why}; only dense language models that docs/models.md lists are quantized."
        raise Unsupported("model type", str(kind), (), cure)


def products(program: Program) -> set[Weight]:
    """Return the weights to quantize: those of products of all tokens, but for exact ones and tables."""
    found = (op.weight for op in program.ops if isinstance(op, ops.Linear) and op.out.spec.rows == "tokens")
    return {w for w in found if not w.exact and not w.table and all(_stands_alone(part) for part in w.parts)}


def _stands_alone(part: Part) -> bool:
    return part.name.endswith(".weight") and part.index is None and not part.below


def _check_group(weights: set[Weight], group: int) -> None:
    """Raise ArgumentError if a matrix has no whole groups of inputs."""
    for weight in sorted(weights, key=lambda w: w.name) if group > 0 else ():
        if weight.columns % group:
            fits = [n for n in (128, 64, 32, 16) if all(w.columns % n == 0 for w in weights)]
            raise ArgumentError(
                f"`groupsize` is {group}, but {weight.name!r} has {weight.columns} inputs, no multiple of it. Give "
                f"{', '.join(map(str, [*fits, -1]))}."
            )


def _texts(source: ModelSource, given: argparse.Namespace) -> tuple[list[list[int]], list[list[int]]]:
    """Return the token ids of the calibration's texts, and of those for the perplexity."""
    tokenizer = load_tokenizer(source)
    topics = _topics()
    held_out = "\n\n".join(topics[::_HELD_OUT])
    rest = "\n\n".join(topic for n, topic in enumerate(topics) if n % _HELD_OUT)
    if given.calibration:
        try:
            rest = Path(given.calibration).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(f"`calibration` {given.calibration} cannot be read as UTF-8 text: {error}.") from None
    made = []
    for text, count in ((rest, given.samples), (held_out, _EVALUATED)):
        ids = tokenizer.encode(text)
        pieces = [ids[i : i + given.length] for i in range(0, len(ids) - given.length + 1, given.length)]
        if not pieces:
            raise ArgumentError(
                f"The text has {len(ids)} tokens, not the {given.length} of --length. Give a longer one."
            )
        made.append(pieces[:: max(1, len(pieces) // count)][:count])
    return made[0], made[1]


def _check_ids(texts: list[list[int]], program: Program) -> None:
    last, size = max(map(max, texts)), program.logits.width
    if last >= size:
        raise ModelError(
            f"The tokenizer makes ids up to {last}, but the model has {size} tokens. Give the model's own tokenizer."
        )


def _topics() -> list[str]:
    """Return the topics of Python's manual. Every installation of CPython has them, or the package python3-doc."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise StartError(
            "This Python has no pydoc_data, the text for the perplexity. Use Python of python.org."
        ) from None
    return [topics[name] for name in sorted(topics)]


def _backend(
    program: Program, checkpoint: Checkpoint, texts: Sequence[Sequence[int]], rounds: set[Weight]
) -> Calibration:
    """Return a backend for these texts and as many for the perplexity, on a GPU if there is one."""
    from tokenmill.backends.cuda.kind import KIND
    from tokenmill.backends.torch.calibration import Calibration

    check([w for op in program.ops for ws in op.weights().values() for w in ws], checkpoint)
    count, length = max(len(texts), _EVALUATED), len(texts[0])
    limits = StepLimits(count * length, count, length + 1)
    placement = Placement("cpu" if KIND.missing() else KIND.devices[0], limits.block_size, 1)
    reader = reader_of(checkpoint)
    job = Job(
        program, checkpoint, reader, limits, Group(), BackendOptions(), placement, "float32", lambda progress: None
    )
    return Calibration(job, rounds.__contains__)


def _round(
    backend: Calibration, checkpoint: Checkpoint, texts: list[list[int]], rounds: set[Weight],
    given: argparse.Namespace, screen: Any, spilled: Path,
) -> dict[str, list[Written]]:  # fmt: skip
    """Quantize the matrices and return their tensors by module. One of which only some rows were made is left out.

    `spilled`: folder that holds them meanwhile.
    """
    from tokenmill.backends.torch.gptq import Recipe

    begun, made = dict[str, Matrix](), dict[str, list[Written]]()
    count = 0

    def take(weight: Weight, rounded: Rounded) -> None:
        nonlocal count
        count += 1
        _take(weight, rounded, checkpoint, begun)
        for module in [module for module, matrix in begun.items() if matrix.done.all()]:
            made[module] = [_spill(tensor, spilled) for tensor in _packed(module, begun.pop(module))]
        screen.line(f"{count} of {len(rounds)}: {weight.name}")

    backend.round(texts, Recipe(max(given.groupsize, 0), given.act_order, given.percdamp), take)
    return made


def _spilling(folder: Path) -> TemporaryDirectory[str]:
    """Return a folder for tensors until all are there, which holds no more than the checkpoint itself."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return TemporaryDirectory(prefix=".quantizing-", dir=folder)
    except OSError as error:
        raise unreadable(folder, error) from None


def _spill(tensor: Written, folder: Path) -> Written:
    """Write a tensor to a file of its own, from which it is read when it is written to its place."""
    path = folder / f"{tensor.name}.npy"
    np.save(path, tensor.rows())
    return tensor._replace(rows=partial(np.load, path, mmap_mode="r"))


def _take(weight: Weight, rounded: Rounded, checkpoint: Checkpoint, made: dict[str, Matrix]) -> None:
    """Add the parts of a rounded matrix to those of their modules."""
    codes, scale, group_of = (t.cpu().numpy() for t in (rounded.codes, rounded.scale, rounded.group_of))
    first = 0
    for part in weight.parts:
        module = part.name.removesuffix(".weight")
        if module not in made:
            outputs = prod(checkpoint.shape(part.name) or ()) // weight.columns
            made[module] = Matrix(
                np.zeros((outputs, weight.columns), np.uint8), np.zeros((outputs, scale.shape[1]), np.float16),
                group_of, np.zeros(outputs, np.bool_),
            )  # fmt: skip
        matrix = made[module]
        for rows in part.slices(0, part.rows):
            count = len(range(*rows.indices(len(matrix.codes))))
            if np.array_equal(matrix.group_of, group_of):
                matrix.codes[rows], matrix.scale[rows] = codes[first : first + count], scale[first : first + count]
                matrix.done[rows] = True
            first += count


def config_of(checkpoint: Checkpoint, given: argparse.Namespace) -> dict[str, Any]:
    """Return config.json of the quantized checkpoint."""
    kept = {name: value for name, value in checkpoint.config.items() if name not in QUANTIZATION_FILES}
    return kept | {
        "quantization_config": {
            "quant_method": "gptq", "bits": _BITS, "group_size": given.groupsize, "desc_act": given.act_order,
            "sym": True, "damp_percent": given.percdamp, "true_sequential": True, "checkpoint_format": "gptq",
            "lm_head": False,
        }
    }  # fmt: skip


def _tensors(checkpoint: Checkpoint, made: dict[str, list[Written]]) -> list[Written]:
    """Return the tensors to write: those of quantized matrices, and all others as they are, or in float16."""
    found = []
    for name in checkpoint.names():
        module = name.removesuffix(".weight")
        if module in made:
            found += made[module]
            continue
        shape = checkpoint.shape(name) or ()
        if checkpoint.format == "gguf":
            found.append(Written(name, "F16", shape, 2 * prod(shape), partial(_half, checkpoint, name, shape)))
        else:
            kind, nbytes = checkpoint[name].kind, checkpoint.nbytes(name)
            found.append(Written(name, kind, shape, nbytes, partial(_stored, checkpoint, name)))
    return found


def _stored(checkpoint: Checkpoint, name: str) -> NDArray[Any]:
    return checkpoint[name].data


def _half(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> NDArray[np.float16]:
    """Return a tensor of a GGUF file in float16."""
    columns = shape[-1] if len(shape) > 1 else 0
    weight = Weight((Part(name, shape[0]),), columns)
    piece = Piece(name, slice(0, shape[0]), slice(None), weight)
    return reader_of(checkpoint)(checkpoint, piece).floats().astype(np.float16)


def _packed(module: str, matrix: Matrix) -> list[Written]:
    """Return the tensors of a quantized matrix. The first GPTQ format stores zeros less one."""
    zeros = np.full((matrix.scale.shape[1], matrix.scale.shape[0]), 7, np.uint8)
    arrays: dict[str, NDArray[Any]] = {
        "qweight": np.ascontiguousarray(packed(matrix.codes, _BITS).T),
        "qzeros": packed(zeros, _BITS),
        "scales": np.ascontiguousarray(matrix.scale.T),
        "g_idx": matrix.group_of.astype(np.int32),
    }
    return [
        Written(
            f"{module}.{name}", "F16" if name == "scales" else "I32", array.shape, array.nbytes, partial(_itself, array)
        )
        for name, array in arrays.items()
    ]


def _itself(array: NDArray[Any]) -> NDArray[Any]:
    return array


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
