"""An encoder, its labels and its memory, searching: texts go in, rows of labels and scores come out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch import Tensor

from hf_xmc import long_text
from hf_xmc.grouped_index import label_index
from hf_xmc.index import LabelIndex, TopK
from hf_xmc.inference import comparable, compares_by_cosine, encode_labels, encode_queries
from hf_xmc.label_texts import LabelTexts
from hf_xmc.memory import TrainingMemory

logger = logging.getLogger(__name__)

BATCH = 1024  # texts that are embedded, or answered, at a time
HOW_TO_INDEX = (
    "XMCModel.from_pretrained(name, labels=[...]) embeds labels and indexes them, and so does "
    "`hf-xmc index name --labels FILE --output_dir FOLDER`"
)


class Searcher:
    """What :class:`hf_xmc.XMCModel` searches with; its arguments and attributes are described there."""

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
            given = self._embed_labels(self.table)
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
    ) -> TopK:
        """The best labels of each text as row numbers and scores; arguments as in :meth:`LabelIndex.search`."""
        choice: dict[str, Any] = {"allow": allow, "deny": deny}
        if self.long_text != "max":
            return self._search(self.embed(texts), top_k, exclude=exclude, **choice)
        chunks = long_text.chunks_of(self.encoder, texts)
        exclude = None if exclude is None else long_text.pairs_of_chunks(exclude, chunks)
        found = self._search(self._embed(chunks.texts), top_k, exclude=exclude, **choice)
        return long_text.max_of_chunks(found, chunks, len(texts))

    def _search(self, queries: Tensor, top_k: int, **choice: Any) -> TopK:
        if self.memory is None:
            return self.label_index.search(queries, top_k, **choice)
        return self.memory.search(queries, top_k, self.label_index, **choice)

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
        """How many of these texts are longer than the encoder reads, and by how much."""
        return long_text.truncation(self.encoder, texts)

    def _embed_labels(self, table: LabelTexts) -> Tensor:
        if not len(table):
            return torch.empty(0, self.encoder.get_embedding_dimension() or 0)
        return encode_labels(self.encoder, table.texts["text"], BATCH).detach().cpu()
