"""Words that texts share: cosines of tf-idf vectors, with the rarity of words from a collection of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese and Chinese. Their words are characters.
SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
ANALYSIS: dict[str, Any] = {"token_pattern": rf"(?u)[{SPACELESS}]|[^\W{SPACELESS}]{{2,}}"}


@dataclass(frozen=True, eq=False)
class WordCounts:
    """The number of texts of a collection that have each word.

    Attributes:
        words: The words, each once.
        counts: ``(V,)``, the number of texts with each word.
        num_texts: The number of texts.

    Raises:
        ValueError: if there is not one count of 1 to ``num_texts`` for each word, or a word occurs twice.

    >>> known = WordCounts.of(["red boat", "red car"])
    >>> known.words, known.counts.tolist()
    (('boat', 'car', 'red'), [1, 1, 2])
    """

    words: tuple[str, ...]
    counts: np.ndarray
    num_texts: int

    def __post_init__(self) -> None:
        counts = self.counts
        if counts.shape != (len(self.words),) or len(set(self.words)) < len(self.words):
            raise ValueError(
                f"`counts` must have a number for each of {len(self.words)} different words, got shape {counts.shape}."
            )
        if len(counts) and not 1 <= counts.min() <= counts.max() <= self.num_texts:
            raise ValueError(f"`counts` must be from 1 to {self.num_texts}, the number of texts.")

    @classmethod
    def of(cls, texts: Sequence[str]) -> WordCounts:
        """Count the words of texts, of which some may have none."""
        vectorizer = CountVectorizer(binary=True, dtype=np.int64, **ANALYSIS)
        try:
            table = vectorizer.fit_transform(texts)
        except ValueError:  # no text has a word
            return cls((), np.empty(0, np.int64), len(texts))
        return cls(tuple(vectorizer.get_feature_names_out().tolist()), np.asarray(table.sum(0)).ravel(), len(texts))


class SharedWords:
    r"""Cosines of the tf-idf vectors of texts with those of fixed texts.

    A word that occurs :math:`n` times in a text, and in :math:`d` of :math:`N` known texts, weighs

    .. math:: (1 + \log n) \Big(1 + \log\frac{1 + N}{1 + d}\Big)

    Words that neither the known nor the fixed texts have are ignored.

    Args:
        texts: The ``T`` fixed texts.
        known: Words of the known texts.

    >>> index = SharedWords(["sailing boat", "car"], WordCounts.of(["a red car", "a red boat"]))
    >>> index.cosines(["car", "boat"]).toarray().round(2).tolist()
    [[0.0, 1.0], [0.56, 0.0]]
    """

    def __init__(self, texts: Sequence[str], known: WordCounts) -> None:
        own = WordCounts.of(texts).words
        counts = dict(zip(known.words, known.counts.tolist(), strict=True))
        counts |= {word: 0 for word in own if word not in counts}
        idf = 1 + np.log((1 + known.num_texts) / (1 + np.array(list(counts.values()))))
        self._vectorizer = None
        if counts:
            self._vectorizer = TfidfVectorizer(vocabulary=list(counts), sublinear_tf=True, **ANALYSIS)
            self._vectorizer.idf_ = idf
            self._texts = sp.csr_array(self._vectorizer.transform(texts)).T.tocsr()
        self._num_texts = len(texts)

    def cosines(self, texts: Sequence[str]) -> sp.csr_array:
        """Return the sparse ``(N, T)`` cosines of ``N`` texts with the fixed texts."""
        if self._vectorizer is None:
            return sp.csr_array((len(texts), self._num_texts))
        return sp.csr_array(self._vectorizer.transform(texts)) @ self._texts
