"""Checks of an environment before a long run: what is there, what is not, and what to do about it."""
