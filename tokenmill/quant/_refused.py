"""Methods that are known and not read: why, and what to serve instead."""

from __future__ import annotations

_FOUR = "a GPTQ, AWQ or compressed-tensors (W4A16) checkpoint of the model, or its GGUF file"
_EIGHT = "an FP8 checkpoint of the model, or the plain one with --quantize fp8 or eetq"
_PICKLED = "its weights are objects of a Python library"
_KERNELS = "only its own CUDA kernels multiply its codes"

METHODS: dict[str, tuple[str, str]] = {
    "exl2": (
        "ExLlamaV2 alone reads its matrices of several widths",
        "a GPTQ or AWQ checkpoint of the model of 4 bits, or a GGUF file of about as many bits a weight (2.5: Q2_K, "
        "3.5: Q3_K_M, 4.5: Q4_K_M, 6: Q6_K)",
    ),
    "exl3": ("ExLlamaV3 alone reads its codes", _FOUR),
    "torchao": (f"{_PICKLED}, whose layout changes with its versions", f"{_FOUR}; or {_EIGHT}"),
    "hqq": ("its layout is that of the library's own kernels", f"{_FOUR}; or the plain one with --quantize int4"),
    "quanto": (f"{_PICKLED}", f"{_EIGHT}; or the plain one with --quantize int4"),
    "aqlm": (f"it stores indexes of learned vectors, and {_KERNELS}", "its GGUF file of 2 or 3 bits (IQ2, Q3_K)"),
    "vptq": (f"it stores indexes of learned vectors, and {_KERNELS}", "its GGUF file of 2 or 3 bits (IQ2, Q3_K)"),
    "higgs": (f"it stores indexes of a grid, rotated, and {_KERNELS}", _FOUR),
    "spqr": (f"it stores outliers beside codes of 3 bits, and {_KERNELS}", "its GGUF file of 3 bits (Q3_K, IQ3)"),
    "bitnet": ("its weights are ternary and packed for its own kernels", "its GGUF file (TQ1_0, TQ2_0)"),
    "fp_quant": (f"it rotates activations, and {_KERNELS}", "an NVFP4 or MXFP4 checkpoint of compressed-tensors"),
    "quark": ("AMD's export has layouts of its own", f"{_EIGHT}; or an MXFP4 checkpoint of compressed-tensors"),
    "sinq": ("it scales rows and columns, in a layout of its own", _FOUR),
    "four_over_six": (f"{_KERNELS}", "an NVFP4 checkpoint of compressed-tensors or ModelOpt"),
    "metal": ("it is for Apple's devices", _FOUR),
    "eetq": ("its codes are arranged for its own kernels", "the plain checkpoint with --quantize eetq"),
    "marlin_24": ("2:4 sparsity is not supported", _FOUR),
    "qqq": ("its weights have two scales for products in int8", _FOUR),
    "squeezellm": ("it stores outliers beside codes of a table", _FOUR),
    "quip": (f"it rotates activations, and {_KERNELS}", "its GGUF file of 2 or 3 bits (IQ2, Q3_K)"),
    "gguf": ("transformers' form of it is not written to files", "the .gguf file itself"),
}
"""Method, as `quant_method` names it, with underscores -> reason, and what to serve in its place"""


def reason(method: str) -> str:
    """Return why a method is not read and what to serve in its place, as sentences; "" for one that is not known."""
    found = METHODS.get(method.lower().replace("-", "_"))
    if found is None:
        return ""
    why, instead = found
    return f"{why[0].upper()}{why[1:]}. Serve {instead}."
