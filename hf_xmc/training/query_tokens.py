"""The tokens and positives of all training queries of a static encoder, read once and not in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from hf_xmc.data.columns import Positives, ragged
from hf_xmc.encoders.forward import Features
from hf_xmc.encoders.ragged import RaggedFeatures
from hf_xmc.training.batching import XMCCollator, batch_of, ranges, read_in_batches


@dataclass
class TokenizedCollator(XMCCollator):
    """A collator that looks up the tokens and positives of a query by its column ``row``, and reads no other column.

    Args:
        tokens: The features of all queries of the data set, in its order.
        positives: The positives of all queries, in the same order.
    """

    tokens: RaggedFeatures | None = None
    positives: Positives | None = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        assert self.positives is not None
        offsets, label_ids, scores = self.positives
        rows, lengths = np.array([row["row"] for row in features]), np.diff(offsets)
        places = ranges(offsets[:-1], lengths, rows)
        starts = np.append(0, lengths[rows].cumsum())
        chosen = Positives(starts, label_ids[places], None if scores is None else scores[places])
        return batch_of(self.features_of([], features), chosen, rows)

    def features_of(self, texts: Sequence[str], rows: Sequence[dict[str, Any]]) -> Features:
        assert self.tokens is not None
        return self.tokens.features(np.array([row["row"] for row in rows]))


def tokenize_once(collator: Any, encoder: SentenceTransformer, queries: Dataset) -> Any:
    """Return a collator of these queries with their tokens, if that saves time, and ``collator`` otherwise.

    A step of a static encoder costs little more than the tokens of its queries. Other encoders are slower by far, and
    start at once: their queries are tokenized in each step. A subclass of the collator may change the texts, so it
    tokenizes in each step too. The tokens of a query take 4 bytes each, and 2 if the vocabulary has less than 65,536.
    """
    if type(collator) is not XMCCollator or not isinstance(encoder[0], StaticEmbedding):
        return collator
    texts = queries["text"][:]

    def read(rows: np.ndarray) -> Features:
        return collator.features_of([texts[row] for row in rows.tolist()], [])

    tokens = RaggedFeatures.joined([part for _, _, part in read_in_batches(read, len(texts))])
    if tokens is None:
        return collator
    made = TokenizedCollator(collator.preprocess_fn, prompts=collator.prompts, tokens=tokens, positives=ragged(queries))
    return replace(made, valid_label_columns=collator.valid_label_columns)
