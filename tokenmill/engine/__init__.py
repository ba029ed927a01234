"""Scheduling: scheduler, block pool, the engine's loop, and its links. Works on token ids only, without tensors."""
