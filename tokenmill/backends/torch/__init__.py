"""The reference backend: every kind of operation in a few lines of torch."""
