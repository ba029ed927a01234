"""Collective operations of the ranks that share a model, each with a GPU of its own or several with one."""
