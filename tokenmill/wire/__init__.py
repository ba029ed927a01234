"""What crosses a process border: typed messages and the channels that carry them. No torch, no HTTP."""
