"""What is done to the weights that a mask leaves."""
