"""What models are written with. No torch."""
