"""Execution of planned steps on a backend. No text, no HTTP, no kernels."""
