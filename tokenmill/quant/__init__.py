"""Quantization methods, one file each, that read tensors of a checkpoint as a Matrix. They do not import torch."""
