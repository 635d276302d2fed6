"""The paper, on plain local tensors. Nothing here knows that there are ranks, engines or models."""
