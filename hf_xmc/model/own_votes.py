"""Texts that a memory holds already, so that none votes for itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
from torch import Tensor

from hf_xmc.search.memory import TrainingMemory
from hf_xmc.search.overlap import equal_embeddings, equal_texts

logger = logging.getLogger(__name__)

_expected = ContextVar("expected", default=False)


@contextmanager
def overlap_expected() -> Iterator[None]:
    """Do not warn of texts that are in the memory, within the block."""
    token = _expected.set(True)
    try:
        yield
    finally:
        _expected.reset(token)


def own_rows(memory: TrainingMemory | None, texts: Sequence[str], queries: Tensor) -> np.ndarray:
    """Return the ``(M, 2)`` pairs (text, row of the memory) that are equal as texts or as embeddings.

    Args:
        memory: The memory of a model; ``None`` has no rows.
        texts: ``N`` texts.
        queries: ``(N, D)`` embeddings of the texts.
    """
    if memory is None:
        return np.empty((0, 2), np.int64)
    pairs = [equal_texts(memory.texts or [], texts), equal_embeddings(memory.index, queries)]
    own = np.unique(np.concatenate(pairs), axis=0)
    if len(own) and not _expected.get():
        logger.warning(
            "%d of %d texts are in the memory: their own votes are left out. If the encoder was trained on them too, "
            "use other texts.",
            len(np.unique(own[:, 0])),
            len(texts),
        )
    return own
