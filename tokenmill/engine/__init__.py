"""Scheduling: the scheduler, its block pool, the engine's loop, and the links to HTTP workers and other ranks."""
