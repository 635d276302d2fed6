"""Everything that runs steps: the stepper, the Trainer, its callbacks, checkpoints and resumed runs."""
