"""Ranks: what they say to each other, and who holds what."""
