"""The index that a setting names."""

from __future__ import annotations

import logging

from torch import Tensor

from hf_xmc.search.exact import LabelIndex

logger = logging.getLogger(__name__)

FEW = 20_000  # labels: a product with all of them takes a millisecond or two


def index_named(name: str, embeddings: Tensor) -> LabelIndex:
    """Return an index of embeddings ``(L, D)``.

    Args:
        name: ``"exact"``; a factory string of :class:`hf_xmc.FaissIndex`; or ``"auto"``, which is ``"exact"`` up to
            20,000 labels, and above that the default of ``FaissIndex``. The choice is logged.
        embeddings: The embeddings.

    Raises:
        ValueError: if ``name`` is something else, or there are too few embeddings for the factory string.

    >>> import torch
    >>> index_named("auto", torch.eye(3))  # doctest: +ELLIPSIS
    <hf_xmc.search.exact.LabelIndex object at ...>
    """
    exact = name == "exact" or (name == "auto" and len(embeddings) <= FEW)
    if name == "auto" and exact:
        logger.info("%d labels are few: every search scores them all.", len(embeddings))
    if exact:
        return LabelIndex(embeddings)
    from hf_xmc.search.faiss_index import FaissIndex

    return FaissIndex(embeddings, None if name == "auto" else name)
