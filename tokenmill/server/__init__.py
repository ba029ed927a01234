"""HTTP: the only place that knows statuses, headers and event streams. No torch."""
