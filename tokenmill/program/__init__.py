"""A model as data: a recorded list of operations, and what can be done with it. No torch."""
