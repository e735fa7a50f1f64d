"""Saved models: manifest, files and card, and how they reach the Hub."""

from hf_xmc.hub.repository import find, push

__all__ = ["find", "push"]
