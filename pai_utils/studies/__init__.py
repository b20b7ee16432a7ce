"""The experiments, one module a notebook: its parameters, its sweep and its tables."""
