"""Atomic folders on disk, atomic commits on the Hub, and reading from the Hub or its cache."""
