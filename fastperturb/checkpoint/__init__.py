"""Checkpoint folders: their format, writing them and reading them."""
