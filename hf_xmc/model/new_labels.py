"""The new labels of a model, and the probability that one is right, learnt from labels that are treated as new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import scipy.sparse as sp
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from hf_xmc.data.labels import LabelTexts
from hf_xmc.encoders.encode import encode_labels
from hf_xmc.metrics.calibration import Calibration, scores_and_hits
from hf_xmc.model.embeddings import BATCH_SIZE
from hf_xmc.model.queries import Found, Queries
from hf_xmc.search.contract import LabelSearch
from hf_xmc.search.lexical import WordCounts
from hf_xmc.search.memory import TrainingMemory
from hf_xmc.search.new_labels import NewLabelScores, NewLabelSearch
from hf_xmc.search.places import with_new_labels
from hf_xmc.topk import TopK

SHARE, FEWEST, MOST = 0.1, 500, 5000  # of the seen labels that are treated as new
LABELS_OF_A_TEXT = 10  # from which probabilities are learnt
FEWEST_HITS = 10  # among these, to learn a probability


def new_label_ids(labels: LabelTexts, memory: TrainingMemory | None) -> np.ndarray:
    """Return the ids of the labels that neither the training nor the memory has a query with, in ascending order.

    A label is only taken to be new if the column ``seen`` says so.
    """
    if "seen" not in labels.labels.column_names:
        return np.empty(0, np.int64)
    seen = labels.labels.with_format("arrow")[:]["seen"]
    new = pc.fill_null(pc.invert(seen), False).to_numpy()
    if memory is not None and new.any():
        new = new & (np.asarray(memory.relevance.sum(0)).ravel() == 0)
    return np.flatnonzero(new)


class NewLabels:
    """The new labels of a model and their probabilities.

    Attributes:
        scores: What the model knows about new labels; ``None`` if they compete by their scores like other labels.
    """

    def __init__(self, scores: NewLabelScores | None = None) -> None:
        self.scores = scores
        self._source: tuple[Any, ...] = ()
        self._search: NewLabelSearch | None = None

    def search_in(self, labels: LabelTexts, embeddings: Tensor, memory: TrainingMemory | None) -> NewLabelSearch | None:
        """Return a search among the new labels; ``None`` without new labels, or without their probabilities.

        It is made again if labels, embeddings, or votes have changed.
        """
        if self.scores is None:
            return None
        source = self.scores, labels, embeddings, None if memory is None else memory.relevance
        if len(self._source) != len(source) or any(a is not b for a, b in zip(self._source, source, strict=True)):
            new = new_label_ids(labels, memory)
            self._search = search_among(labels, new, embeddings, self.scores.words) if len(new) else None
            self._source = source
        return self._search

    def are_all_added(self, before: LabelTexts, labels: LabelTexts, memory: TrainingMemory | None) -> bool:
        """Return whether labels are those of ``before`` and, after them, new labels with probabilities of their own."""
        if self.scores is None or len(labels) < len(before):
            return False
        added = np.arange(len(before), len(labels))
        columns = ["uid", "text"]
        rows, same = (part.texts.select_columns(columns).with_format("arrow") for part in (labels, before))
        return bool(
            rows[: len(same)].equals(same[:])
            and np.isin(added, new_label_ids(labels, memory), assume_unique=True).all()
        )

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """Return the probabilities of new labels with these scores."""
        assert self.scores is not None
        return self.scores.calibration(scores)

    def find(
        self,
        queries: Queries,
        means: Tensor,
        new: NewLabelSearch,
        calibration: Calibration,
        index: LabelSearch,
        memory: TrainingMemory | None,
        needed: np.ndarray,
        own: np.ndarray | None = None,
        exclude: np.ndarray | None = None,
        allow: np.ndarray | None = None,
    ) -> Found:
        """Return the best labels of each text with their probabilities, new labels in their places.

        Args:
            queries: ``N`` texts.
            means: ``(N, D)``, their embeddings; those of chunks are averaged.
            new: The search among new labels.
            calibration: Probabilities of the other labels.
            index, memory, own, exclude: As in :meth:`hf_xmc.model.queries.Queries.find`.
            needed: ``(k,)``, as :func:`hf_xmc.search.places.handicaps` returns it.
            allow: Label ids to choose from; ``None`` for all.
        """
        k = len(needed)
        others = np.setdiff1d(np.arange(index.num_labels) if allow is None else allow, new.label_ids)
        found = queries.find(index, memory, k, own, exclude, allow=others)
        seen = TopK(found.labels.label_ids, calibration(found.labels.scores))
        best = new.search(queries.texts, means, k, exclude=exclude, allow=allow)
        best = TopK(best.label_ids, self.probabilities(best.scores))
        return found._replace(labels=with_new_labels(seen, best, needed))


def search_among(labels: LabelTexts, label_ids: np.ndarray, embeddings: Tensor, words: WordCounts) -> NewLabelSearch:
    """Return a search among some labels.

    Args:
        labels: The labels of a model.
        label_ids: ``(N,)``, the ids of the labels to search, in ascending order.
        embeddings: ``(T, D)``, the embeddings of all ``T`` texts of the model, or of those of these labels alone.
        words: Words of the known texts.
    """
    rows = np.flatnonzero(np.isin(labels.label_of, label_ids))
    label_of = np.searchsorted(label_ids, labels.label_of[rows])
    mine = embeddings if len(embeddings) == len(rows) else embeddings[torch.from_numpy(rows)]
    return NewLabelSearch(label_ids, label_of, mine, texts_for_words(labels, rows), words)


def texts_for_words(labels: LabelTexts, rows: np.ndarray) -> list[str]:
    """Return the texts in some rows, each followed by those of its label's parents, to compare their words."""
    chosen = labels.texts.select(rows)
    texts: list[str] = chosen["text"][:]
    if "parent_texts" not in chosen.column_names:
        return texts
    return [f"{text}\n{above}" if above else text for text, above in zip(texts, chosen["parent_texts"], strict=True)]


def learn_scores(
    encoder: SentenceTransformer,
    labels: LabelTexts,
    memory: TrainingMemory | None,
    texts: Sequence[str],
    queries: Tensor,
    relevance: sp.csr_array,
    exclude: np.ndarray | None = None,
) -> NewLabelScores | None:
    """Learn the probabilities of new labels from queries with known labels.

    A sample of the seen labels is treated as new: without vectors and votes, by their texts alone. Isotonic regression
    maps their scores to the fraction that are right.

    Args:
        encoder: The encoder.
        labels: The labels of the model.
        memory: The memory of the model, whose texts tell which words are rare.
        texts: ``N`` texts that the encoder was not trained on.
        queries: ``(N, D)``, their embeddings.
        relevance: Sparse ``(N, L)`` matrix of positives.
        exclude: ``(M, 2)`` filter pairs (row of the text, label id).

    Returns:
        What was learnt; ``None`` if too few of the labels are right for any text.
    """
    known = np.setdiff1d(np.arange(len(labels)), new_label_ids(labels, memory))
    size = min(len(known), max(FEWEST, min(MOST, round(SHARE * len(known)))))
    sample = np.sort(np.random.default_rng(0).choice(known, size, replace=False))
    rows = np.flatnonzero(np.isin(labels.label_of, sample))
    embeddings = encode_labels(encoder, labels.texts.select(rows)["text"][:], BATCH_SIZE).detach().cpu()
    words = WordCounts.of([*(memory.texts or [] if memory is not None else []), *labels.texts["text"]])
    found = search_among(labels, sample, embeddings, words).search(
        texts, queries, min(LABELS_OF_A_TEXT, size), exclude=exclude
    )
    if scores_and_hits(found, relevance)[1].sum() < FEWEST_HITS:
        return None
    return NewLabelScores(Calibration.fit(found, relevance), words)


def check_reservable(calibration: Calibration | None, scores: NewLabelScores | None) -> None:
    """Check that places can be reserved for new labels.

    Raises:
        ValueError: if it is not known how probable labels are.
    """
    if calibration is None or scores is None:
        raise ValueError(
            "`new` needs to know how probable new labels are, which is "
            f"{'not calibrated yet' if calibration is None else 'unknown, as too few labels were right for any text'}: "
            "call `calibrate` with validation queries."
        )
