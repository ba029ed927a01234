"""Layers that models are composed of. They record operations and do not import torch."""
