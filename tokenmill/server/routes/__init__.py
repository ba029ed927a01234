"""Handlers, one file an API. Each is a function that reads like what happens: decode, render, prepare, answer."""
