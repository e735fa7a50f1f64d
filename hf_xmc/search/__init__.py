"""Indexes of label embeddings, exact and approximate, and the memory of training queries."""
