"""What makes two passes of a model differ."""

from __future__ import annotations

from torch import nn


def find_dropout(model: nn.Module) -> dict[str, float]:
    """Probabilities of dropout, stochastic depth and the like that are above 0, by the kind of layer (the largest).

    Attention layers keep theirs as a number, and so do the layers of stochastic depth.
    """
    found: dict[str, float] = {}
    for module in model.modules():
        numbers = [float(module.p)] if isinstance(module, nn.modules.dropout._DropoutNd) else []
        numbers += [
            float(value)
            for name, value in vars(module).items()
            if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool)
        ]
        if max(numbers, default=0.0) > 0:
            kind = type(module).__name__
            found[kind] = max(found.get(kind, 0.0), *numbers)
    return found


def drops_layers(model: nn.Module) -> bool:
    """Whether it has stochastic depth, under which two passes of few rows may be equal by chance."""
    return any(word in type(module).__name__ for module in model.modules() for word in ("DropPath", "StochasticDepth"))
