"""Placement of requests on replicas: longest cached prefix, power of two choices on outstanding tokens.

`prompt.py` makes the keys of a prompt's prefixes, `prefixes.py` is the index of prefixes that replicas probably cache,
`placement.py` chooses. Pure: no input or output, no clock, no tensors. The HTTP workers place on the engines of one
server with it, `tokenmill.deploy` on replicas of a cluster, and `bench/cluster_sim.py` on simulated ones.
"""
