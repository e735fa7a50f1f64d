"""Atomic folders on disk, and commits on the Hub: written whole, and read from the Hub or its cache."""
