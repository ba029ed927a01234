"""Triton kernels. Their torch references are in `tokenmill.backends.torch` and in the tests beside them.

Values are float32 between a load and a store. The tokens of a step are passed as `pairs`: slot and position of each.
"""
