"""Strings to token ids and back. No torch, no HTTP."""
