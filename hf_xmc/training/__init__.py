"""Training with all labels as negatives: trainer, arguments, negatives, checkpoints."""
