"""What is minimised. Plain functions of logits; nothing here knows how the model is sharded."""
