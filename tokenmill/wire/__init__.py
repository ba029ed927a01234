"""Inter-process communication: typed messages and the channels that carry them. Imports neither torch nor HTTP."""
