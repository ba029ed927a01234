"""Load generator for HTTP servers, and reports of its measurements."""
