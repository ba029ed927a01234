"""Triton kernels. Their torch references are in `tokenmill.backends.torch` and in the tests beside them.

Numbers are kept in float32 between a load and a store. What a step is made of comes as `pairs`: (slot, position) of
each of its tokens.
"""
