"""Products with matrices, one file for each format that a matrix has on the device."""
