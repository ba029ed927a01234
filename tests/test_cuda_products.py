"""Matrices in a format of their own: lowering, batch-one fusion and memory know them by their interface only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from support_cuda import CudaDriver, torch, write_random

from tokenmill.backends.cuda.pack import DeviceWeights
from tokenmill.backends.cuda.products.base import Needs, Operands
from tokenmill.backends.cuda.products.dense import Dense
from tokenmill.program.ops import Part, Weight
from tokenmill.quant import int8
from tokenmill.quant.base import Coded


class EightBit:
    """A matrix kept as int8 codes and scales. Its products are torch's, of the dequantized matrix."""

    def __init__(self, coded: Coded) -> None:
        self.codes, self.scale = torch.from_numpy(coded.codes.copy()), torch.from_numpy(coded.scale.copy())
        self.products = 0

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes + self.scale.nbytes)

    def needs(self, rows: int) -> Needs:
        return Needs()

    def product(self, operands: Operands, scratch: Any, batch_invariant: bool) -> Any:
        self.products += 1
        return EightBitProduct(self, operands)


class EightBitProduct:
    """Neither applies an activation nor fuses anything."""

    fuses_one = False

    def __init__(self, matrix: EightBit, operands: Operands) -> None:
        self.matrix, self.operands = matrix, operands

    def applies_act(self, rows: int) -> bool:
        return False

    def run(self, rows: int, early: bool = False) -> None:
        x, out, bias = self.operands[:3]
        matrix = (self.matrix.codes.float() * self.matrix.scale.float()[..., None]).flatten(1).to(x.device)
        out[:rows] = (x[:rows].float() @ matrix.T + (0 if bias is None else bias.float())).to(out.dtype)


def test_a_model_of_another_format_has_the_logits_of_its_dequantized_matrices(tmp_path: Path) -> None:
    write_random(tmp_path, "llama_tied_with_biases", num_hidden_layers=2, tie_word_embeddings=False)
    dense, coded = CudaDriver(tmp_path), CudaDriver(tmp_path)
    for weight, packed in coded._weights.matrices.items():
        assert isinstance(packed, Dense)
        matrix = packed._matrix.float().cpu().numpy()
        quantized = int8.blocks(matrix.reshape(len(matrix), -1, 32))
        coded._weights.matrices[weight] = EightBit(quantized)
        dense._weights.matrices[weight]._matrix.copy_(torch.from_numpy(quantized.floats()))
    coded.allocate(64)  # lowers the program again, with the changed weights
    assert all(matrix.products for matrix in coded._weights.matrices.values())
    for rows in ([(0, [1, 2, 3, 4, 5]), (1, [7])], [(0, [6])], [(1, [8]), (0, [9])]):
        want = dense.feed(rows)
        np.testing.assert_allclose(coded.feed(rows), want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


def test_a_table_that_is_the_output_matrix_too_counts_once() -> None:
    shared, alone = torch.zeros(4, 8), torch.zeros(2, 8)
    table, matrix, norm = (Weight((Part(name, 4),), columns) for name, columns in (("t", 8), ("m", 8), ("n", 0)))
    weights = DeviceWeights({table: shared, norm: torch.zeros(8)}, {table: Dense(shared), matrix: Dense(alone)})
    assert weights.nbytes == shared.nbytes + alone.nbytes + 32


def test_a_tied_table_is_in_memory_once_and_each_weight_has_its_place(tmp_path: Path) -> None:
    write_random(tmp_path, "llama_tied_with_biases", num_hidden_layers=1)
    weights = CudaDriver(tmp_path)._weights
    (both,) = weights.tensors.keys() & weights.matrices.keys()
    assert both.name == "model.embed_tokens.weight"
    packed = weights.matrices[both]
    assert isinstance(packed, Dense)
    assert packed._matrix.data_ptr() == weights.tensors[both].data_ptr()
    assert all(weight.columns for weight in weights.matrices)
    assert all(weight is both or not weight.columns for weight in weights.tensors)
