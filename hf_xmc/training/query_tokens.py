"""The tokens of all training queries of a static encoder, made once and not in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from hf_xmc.encoders.forward import Features
from hf_xmc.encoders.ragged import RaggedFeatures
from hf_xmc.training.batching import XMCCollator, read_in_batches


@dataclass
class TokenizedCollator(XMCCollator):
    """A collator that looks up the tokens of a query by its column ``row``.

    Args:
        tokens: The features of all queries of the data set, in its order.
    """

    tokens: RaggedFeatures | None = None

    def features_of(self, texts: Sequence[str], rows: Sequence[dict[str, Any]]) -> Features:
        assert self.tokens is not None
        return self.tokens.features(np.array([row["row"] for row in rows]))


def tokenize_once(collator: Any, encoder: SentenceTransformer, texts: Sequence[str]) -> Any:
    """Return a collator of these queries with their tokens, if that saves time, and ``collator`` otherwise.

    A step of a static encoder costs little more than the tokens of its queries. Other encoders are slower by far, and
    start at once: their queries are tokenized in each step. A subclass of the collator may change the texts, so it
    tokenizes in each step too. The tokens of a query take 4 bytes each, and 2 if the vocabulary has less than 65,536.
    """
    if type(collator) is not XMCCollator or not isinstance(encoder[0], StaticEmbedding):
        return collator

    def read(rows: np.ndarray) -> Features:
        return collator.features_of([texts[row] for row in rows.tolist()], [])

    tokens = RaggedFeatures.joined([part for _, _, part in read_in_batches(read, len(texts))])
    if tokens is None:
        return collator
    made = TokenizedCollator(collator.preprocess_fn, prompts=collator.prompts, tokens=tokens)
    return replace(made, valid_label_columns=collator.valid_label_columns)
