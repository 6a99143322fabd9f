"""Data sets: one module each, on top of readers of file formats."""
