"""What a training step of each method costs, on one's own model, data and machine."""
