"""The HTTP server: routes, statuses, headers and event streams. Does not import torch."""
