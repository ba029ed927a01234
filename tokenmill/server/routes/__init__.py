"""Handlers, one file for each API. Each is a function that reads like its steps: decode, plan, prepare, answer."""
