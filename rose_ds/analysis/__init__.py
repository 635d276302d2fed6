"""Looking at trained models: loss landscapes, interpolation, probing, dropout disagreement."""
