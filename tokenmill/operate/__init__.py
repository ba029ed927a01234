"""What an operator asks: what is installed, what will fit, what differs."""
