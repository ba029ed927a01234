"""Constrained output: schemas, regular expressions, choices, Lark and EBNF compiled to masks of allowed tokens."""
