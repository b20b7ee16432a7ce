"""Everything that a GPU must get right, and how fast: one command, `python -m benchmarks.gpu`."""
