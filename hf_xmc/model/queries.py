"""Texts as embedded queries, whole or in chunks, and the labels found for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from sentence_transformers import SentenceTransformer
from torch import Tensor

from hf_xmc.encoders.long_text import Chunks, chunks_of, max_of_chunks, mean_of_chunks, pairs_of_chunks
from hf_xmc.model.own_votes import own_rows
from hf_xmc.search.contract import LabelSearch
from hf_xmc.search.exact import of_recognised
from hf_xmc.search.memory import TrainingMemory
from hf_xmc.topk import TopK


class Found(NamedTuple):
    """The labels found for texts, and which texts hold something that the encoder knows."""

    labels: TopK
    recognised: np.ndarray  # (N,) bool


class Queries(NamedTuple):
    """Texts and their embeddings."""

    texts: Sequence[str]
    embeddings: Tensor  # (N, D), or (C, D) with chunks
    chunks: Chunks | None = None  # if a label gets the score of the chunk in which it scores highest

    @classmethod
    def in_chunks(
        cls, encoder: SentenceTransformer, texts: Sequence[str], embed: Callable[[Sequence[str]], Tensor]
    ) -> Queries:
        """Split texts into chunks that the encoder reads in full, and embed each chunk."""
        chunks = chunks_of(encoder, texts)
        return cls(texts, embed(chunks.texts), chunks)

    def means(self, encoder: SentenceTransformer) -> Tensor:
        """Return the ``(N, D)`` embeddings of the texts; those of chunks are averaged."""
        if self.chunks is None:
            return self.embeddings
        return mean_of_chunks(encoder, self.embeddings, self.chunks, len(self.texts))

    def own_rows(self, encoder: SentenceTransformer, memory: TrainingMemory | None) -> np.ndarray:
        """Return the pairs (query, row of the memory) of queries that the memory holds, as whole texts."""
        own = own_rows(memory, self.texts, self.means(encoder))
        return own if self.chunks is None else pairs_of_chunks(own, self.chunks)

    def find(
        self,
        index: LabelSearch,
        memory: TrainingMemory | None,
        top_k: int,
        own: np.ndarray | None = None,
        exclude: np.ndarray | None = None,
        **choice: Any,
    ) -> Found:
        """Return the best labels of each text.

        Args:
            index: The index of the labels.
            memory: Memory of queries that vote, if any.
            top_k: Number of labels of a text.
            own: Votes to leave out, as :meth:`own_rows` returns them.
            exclude: ``(M, 2)`` filter pairs (row of the text, label id).
            choice: ``allow`` and ``deny``, as in :meth:`hf_xmc.LabelIndex.search`.
        """
        if self.chunks is not None and exclude is not None:
            exclude = pairs_of_chunks(exclude, self.chunks)
        if memory is None:
            found = index.search(self.embeddings, top_k, exclude=exclude, **choice)
        else:
            found = memory.search(self.embeddings, top_k, index, silent=own, exclude=exclude, **choice)
        found, known = of_recognised(found, self.embeddings), self.embeddings.any(1).numpy()
        if self.chunks is None:
            return Found(found, known)
        known = np.bincount(self.chunks.text_of, weights=known, minlength=len(self.texts)) > 0
        return Found(max_of_chunks(found, self.chunks, len(self.texts)), known)
