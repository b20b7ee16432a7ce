"""Encoders: their weights, where they come from, and the modules made of them."""
