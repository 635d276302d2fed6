"""Runs: one model trained or evaluated on one task, what it measured, and runs side by side."""
