"""Quantization methods, one file each, that read tensors of a checkpoint as `Coded` matrices. No torch is imported."""
