"""Curvature of the mean cross-entropy: squared gradients, diagonals, products, quadratic forms."""
