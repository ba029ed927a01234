"""Bytes of weights on a GPU before any is loaded, against those that are taken."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_cuda import DEVICE, torch, write_random

from tokenmill.backends.cuda.device import Device
from tokenmill.backends.cuda.explain import KernelOptions, kernels_of
from tokenmill.backends.cuda.held import held, weight_bytes
from tokenmill.backends.cuda.pack import pack
from tokenmill.backends.cuda.prepare import fused
from tokenmill.models.base import program_of
from tokenmill.parallel.group import Group
from tokenmill.quant.base import reader_of
from tokenmill.weights.checkpoint import open_checkpoint
from tokenmill.weights.source import local_source


@pytest.mark.parametrize("quantize", ["", "int4", "int8", "fp8", "bitsandbytes-nf4", "eetq"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_weights_take_the_bytes_that_were_counted(family: str, quantize: str, tmp_path: Path) -> None:
    write_random(tmp_path, family, num_hidden_layers=1)
    source = open_checkpoint(local_source(tmp_path))
    program = program_of(source.config)
    read = reader_of(source, quantize)
    taken = pack(fused(program), source, read, Group(), torch.float16, Device(DEVICE), quantize=quantize)
    assert weight_bytes(program, source, "float16", quantize) == taken.nbytes
    dense = weight_bytes(program, source, "float16")
    assert dense == 2 * weight_bytes(program, source, "float32") // 4
    assert (taken.nbytes < dense) is (quantize != "")


def test_reports_name_the_kernels_and_the_form_of_quantized_matrices(tmp_path: Path) -> None:
    write_random(tmp_path, "llama", num_hidden_layers=1)
    source = open_checkpoint(local_source(tmp_path))
    program = program_of(source.config)
    for quantize, deterministic, named in (
        ("int8", False, "few_coded up to 192 rows, unpack and cuBLAS above (int8, groups of 32)"),
        ("int8", True, "few_coded at any number of rows (int8, groups of 32)"),
        ("fp8", True, "FP8: codes_by_codes at any number of rows"),
    ):
        matrices = held(fused(program), source, "float16", quantize)
        kernels = kernels_of(program, KernelOptions(dtype="float16", deterministic=deterministic, held=matrices))
        assert named in kernels["Linear"]


def test_nothing_stays_quantized_in_float32(tmp_path: Path) -> None:
    write_random(tmp_path, "llama", num_hidden_layers=1)
    source = open_checkpoint(local_source(tmp_path))
    assert not held(fused(program_of(source.config)), source, "float32", "int8")
    assert held(fused(program_of(source.config)), source, "bfloat16", "int8")


def test_the_kernels_of_experts_are_named_with_their_form(tmp_path: Path) -> None:
    write_random(tmp_path, "mixtral", num_hidden_layers=1)
    source = open_checkpoint(local_source(tmp_path))
    program = program_of(source.config)
    for quantize, want in (
        ("", "one_row_up, one_row_down, grouped above"),
        ("int8", "coded_row_up, coded_row_down, grouped above (int8, groups of 32)"),
    ):
        matrices = held(fused(program), source, "float16", quantize)
        assert list(kernels_of(program, KernelOptions(dtype="float16", held=matrices))["Experts"]) == [want]
