"""Losses of a dual encoder: on a score matrix (:mod:`~hf_xmc.losses.functional`) or streamed from embeddings."""

from hf_xmc.losses.modules import BCELoss, DecoupledSoftmaxLoss, SoftmaxLoss, SoftTopKLoss

__all__ = ["BCELoss", "DecoupledSoftmaxLoss", "SoftTopKLoss", "SoftmaxLoss"]
