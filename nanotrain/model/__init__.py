"""The model and what reads from it."""
