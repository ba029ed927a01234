"""Constrained output: one file per library that compiles a grammar to masks of allowed tokens."""
