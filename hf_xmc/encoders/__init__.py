"""Encoders made from the texts at hand, and how texts become embeddings."""
