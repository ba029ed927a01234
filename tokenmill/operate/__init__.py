"""Commands for operators: diagnosis, runtime environment, and generated reference pages."""
