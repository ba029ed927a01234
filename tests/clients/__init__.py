"""Package of the clients' tests, so that its server ends with its last test."""
