"""Measurements on a GPU machine: this engine offline and over HTTP, and vLLM beside it in the same call."""
