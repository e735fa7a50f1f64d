"""Saved models: manifest, files, card, and the Hub."""

from hf_xmc.hub.repository import find, push

__all__ = ["find", "push"]
