"""Measurements on a GPU machine: this engine offline and over HTTP, and vLLM in the same run."""
