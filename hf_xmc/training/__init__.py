"""Training with all labels as negatives: trainer, arguments, label sampling, checkpoints."""
