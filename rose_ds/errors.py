"""What is refused, and why: one exception for every setting under which a step would silently be wrong."""

from __future__ import annotations


class RefusedConfiguration(ValueError):
    """A setting under which a step would silently be wrong. The message names it and the way out."""
