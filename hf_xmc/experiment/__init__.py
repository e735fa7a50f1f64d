"""End-to-end training: from a data set to a saved model with its metrics, report and card."""
