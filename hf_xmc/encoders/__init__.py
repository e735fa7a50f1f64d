"""Encoders built from given texts, and the embedding of texts."""
