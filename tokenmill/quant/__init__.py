"""Quantizations, one file each: what it reads of a checkpoint as a Matrix. No torch."""
