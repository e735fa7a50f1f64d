"""Atomic folders on disk and atomic commits on the Hub."""
