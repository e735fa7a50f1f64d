"""Data sets of queries and labels: loading, checks, and rows for in-batch training."""

from hf_xmc.data.dataset import XMCData
from hf_xmc.data.prepared import SPLITS

__all__ = ["SPLITS", "XMCData"]
