"""Represent a model as a recorded list of operations, and transform that list. Does not import torch."""
