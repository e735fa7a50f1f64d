"""An encoder, its labels and its memory, searching: texts go in, rows of labels and scores come out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch import Tensor

from hf_xmc.data.labels import LabelTexts
from hf_xmc.encoders import long_text
from hf_xmc.encoders.encode import comparable, compares_by_cosine, encode_labels, encode_queries
from hf_xmc.search.exact import LabelIndex, of_recognised
from hf_xmc.search.grouped import label_index
from hf_xmc.search.memory import TrainingMemory
from hf_xmc.search.overlap import equal_embeddings, equal_texts
from hf_xmc.topk import TopK

logger = logging.getLogger(__name__)

BATCH = 1024  # texts that are embedded, or answered, at a time
HOW_TO_INDEX = (
    "XMCModel.from_pretrained(name, labels=[...]) embeds labels and indexes them, and so does "
    "`hf-xmc index name --labels FILE --output_dir FOLDER`"
)


class Found(NamedTuple):
    """The labels found for texts, and which texts hold something that the encoder knows."""

    labels: TopK
    recognised: np.ndarray  # (N,)


class Searcher:
    """The part of :class:`hf_xmc.XMCModel` that searches; its arguments and attributes are described there."""

    def __init__(
        self,
        encoder: SentenceTransformer,
        labels: Sequence[str] | Dataset | None = None,
        embeddings: np.ndarray | Tensor | None = None,
    ) -> None:
        if labels is not None and not len(labels):
            raise ValueError("there is no label: a model predicts one of its labels.")
        self.encoder = encoder
        self.memory: TrainingMemory | None = None
        self.long_text = "truncate"
        self._told_of_cuts = False
        self.table, order = LabelTexts.of(Dataset.from_dict({"text": []}) if labels is None else labels)
        if embeddings is None:
            given = self._embed_labels(self.table.texts["text"])
        else:
            given = comparable(torch.as_tensor(embeddings).detach().cpu(), compares_by_cosine(encoder))
        expected = len(order), encoder.get_embedding_dimension() or 0
        if tuple(given.shape) != expected:
            raise ValueError(
                f"embeddings have shape {tuple(given.shape)}; expected {expected}: a row for each label, made by this "
                "encoder."
            )
        in_order = embeddings is None or bool((order == np.arange(len(order))).all())
        self.index = LabelIndex(given if in_order else given[torch.from_numpy(order)])

    @property
    def labels(self) -> Dataset:
        """A row for each label: ``label_id``, its preferred ``text``, and, where it is known of any, ``seen``: whether
        the label was in the training."""
        return self.table.labels

    def search(
        self,
        texts: Sequence[str],
        top_k: int,
        *,
        exclude: np.ndarray | None = None,
        allow: Iterable[int] | None = None,
        deny: Iterable[int] | None = None,
        leave_one_out: bool = False,
    ) -> TopK:
        """Return the best labels of each text as row numbers and scores; arguments as in :meth:`LabelIndex.search`.

        A text that embeds to zero, because the encoder knows none of its tokens, has no label. This is said with a
        count. Encoders with layers on top of their tokens never embed to zero; a text of unknown tokens alone is then
        what the encoder makes of it.

        Args:
            leave_one_out: Whether texts that the memory holds get no vote of their own, to measure or to fit on them.
                They still count in the discount of frequent labels.
        """
        found = self._found(texts, top_k, leave_one_out, exclude, allow=allow, deny=deny)
        self._tell_of_unknown(int((~found.recognised).sum()), len(texts))
        return found.labels

    def _found(
        self, texts: Sequence[str], top_k: int, leave_one_out: bool, exclude: np.ndarray | None, **choice: Any
    ) -> Found:
        if self.long_text != "max":
            queries = self.embed(texts)
            own = self._own_rows(texts, queries) if leave_one_out else None
            found = self._search(queries, top_k, own, exclude=exclude, **choice)
            return Found(found, queries.any(1).numpy())
        chunks = long_text.chunks_of(self.encoder, texts)
        queries, own = self._embed(chunks.texts), None
        exclude = None if exclude is None else long_text.pairs_of_chunks(exclude, chunks)
        if leave_one_out:  # the memory holds whole texts
            whole = long_text.mean_of_chunks(self.encoder, queries, chunks, len(texts))
            own = long_text.pairs_of_chunks(self._own_rows(texts, whole), chunks)
        found = self._search(queries, top_k, own, exclude=exclude, **choice)
        known = np.bincount(chunks.text_of, weights=queries.any(1).numpy(), minlength=len(texts)) > 0
        return Found(long_text.max_of_chunks(found, chunks, len(texts)), known)

    def _search(self, queries: Tensor, top_k: int, own: np.ndarray | None, **choice: Any) -> TopK:
        if self.memory is None:
            found = self.label_index.search(queries, top_k, **choice)
        else:
            found = self.memory.search(queries, top_k, self.label_index, silent=own, **choice)
        return of_recognised(found, queries)

    def _own_rows(self, texts: Sequence[str], queries: Tensor) -> np.ndarray:
        """Return the pairs (text, row of the memory) that are equal, as texts or as the encoder reads them."""
        if self.memory is None:
            return np.empty((0, 2), np.int64)
        pairs = [equal_texts(self.memory.texts or [], texts), equal_embeddings(self.memory.index, queries)]
        own = np.unique(np.concatenate(pairs), axis=0)
        if len(own):
            logger.warning(
                "%d of %d texts are in the memory: their own votes are left out. If the encoder was trained on them "
                "too, use other texts.",
                len(np.unique(own[:, 0])),
                len(texts),
            )
        return own

    @staticmethod
    def _tell_of_unknown(number: int, total: int) -> None:
        if number:
            logger.warning("%d of %d texts hold no token that the encoder knows: they get no label.", number, total)

    @property
    def label_index(self) -> LabelIndex:
        """:attr:`index`, which is of texts, as one of labels; the same where each label has one text."""
        return label_index(self.index, self.table)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """``(N, D)`` embeddings of queries; of long ones the mean of their chunks, unless they are cut."""
        if self.long_text not in long_text.LONG_TEXT:
            raise ValueError(f"long_text is one of {', '.join(long_text.LONG_TEXT)}, got {self.long_text!r}.")
        if self.long_text == "truncate":
            if not self._told_of_cuts and (report := self.truncation(texts)).num_cut:
                logger.warning("%s: `model.long_text = 'mean'`, or 'max', reads them in chunks.", report)
                self._told_of_cuts = True
            return self._embed(texts)
        chunks = long_text.chunks_of(self.encoder, texts)
        return long_text.mean_of_chunks(self.encoder, self._embed(chunks.texts), chunks, len(texts))

    def _embed(self, texts: Sequence[str]) -> Tensor:
        if not len(self.labels):
            raise ValueError(f"the model has no label to predict: {HOW_TO_INDEX}.")
        queries = encode_queries(self.encoder, texts, BATCH)
        return queries.float().cpu().reshape(len(texts), self.index.embedding_dim)  # of no text, `encode` makes (0,)

    def truncation(self, texts: Sequence[str]) -> long_text.Truncation:
        """Count the texts that are longer than the encoder reads, and the tokens that are lost."""
        return long_text.truncation(self.encoder, texts)

    def _embed_labels(self, texts: Sequence[str]) -> Tensor:
        if not len(texts):
            return torch.empty(0, self.encoder.get_embedding_dimension() or 0)
        embeddings = encode_labels(self.encoder, texts, BATCH).detach().cpu()
        if unknown := int((~embeddings.any(1)).sum()):
            logger.warning(
                "%d of %d label texts hold no token that the encoder knows: they score 0 for every text, whatever it "
                "is about.",
                unknown,
                len(embeddings),
            )
        return embeddings
