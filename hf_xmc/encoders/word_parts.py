"""Split a text into words, and the embedding of a static encoder into one vector per word."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from tokenizers import Tokenizer
from torch import Tensor

from hf_xmc.encoders import long_text, phrases
from hf_xmc.encoders.characters import Span
from hf_xmc.encoders.rewriting import WORDS, Rewriting
from hf_xmc.encoders.roles import prompt_of, query_modules


class Parts(NamedTuple):
    """The parts of an embedding before it is scaled, in the order of the text; their sum is the embedding."""

    spans: list[Span]  # of words, and of pairs of neighbouring words; (0, 0) is the prompt
    vectors: Tensor  # (P, D) float64


class _Lookup(NamedTuple):
    """The embedding table of a static encoder, and the tokenizer whose tokens are its rows."""

    tokenizer: Tokenizer
    vectors: Tensor  # (V, D)
    positions: Tensor | None  # (tokens, D), added to the vectors of the tokens
    max_tokens: int | None
    prompt: str
    rewriting: Rewriting | None


def word_spans(text: str) -> list[Span]:
    """Return the span of each word; a punctuation mark is a word, and so is a character of a script without spaces.

    >>> word_spans("a sloop, at sea")
    [(0, 1), (2, 7), (7, 8), (9, 11), (12, 15)]
    """
    return WORDS.spans(text)


def is_static(encoder: SentenceTransformer) -> bool:
    """Return whether :func:`parts_of` can split an embedding of the encoder."""
    return _lookup_of(encoder) is not None


def parts_of(encoder: SentenceTransformer, text: str, mode: str = "truncate") -> Parts | None:
    """Return the parts of the embedding of a query, or ``None`` unless the encoder is static.

    An encoder is static if the embedding of a text is the mean of one vector per token, possibly scaled to unit norm:
    a ``StaticEmbedding``, or an encoder from :func:`hf_xmc.standalone_encoder`.

    Args:
        encoder: The encoder.
        text: The query.
        mode: How to read a text that exceeds the encoder's limit: ``"truncate"``, or any other value for chunks.
    """
    lookup = _lookup_of(encoder)
    if lookup is None:
        return None
    if mode == "truncate":
        return _grouped([_parts(lookup, text, 0)])
    chunks = long_text.chunks_of(encoder, [text])
    starts, end = [], 0
    for chunk in chunks.texts:
        starts.append(text.index(chunk, end))
        end = starts[-1] + len(chunk)
    parts = [_parts(lookup, chunk, start) for chunk, start in zip(chunks.texts, starts, strict=True)]
    tokens = chunks.tokens * np.array([bool(part.vectors.sum(0).any()) for part in parts])
    shares = tokens / max(1, tokens.sum())
    return _grouped([Parts(part.spans, share * part.vectors) for part, share in zip(parts, shares, strict=True)])


def _lookup_of(encoder: SentenceTransformer) -> _Lookup | None:
    if type(encoder) is not SentenceTransformer:  # a subclass may embed differently
        return None
    prompt, modules = prompt_of(encoder, "query") or "", query_modules(encoder)
    if phrases.averages_phrases(encoder):
        model, tokenizer = modules[0].auto_model, modules[0].tokenizer
        rewriting = phrases.rewriting_of(encoder)
        prompt = prompt if rewriting is not None and rewriting.prompted else ""
        table, positions = model.tokens_embed.weight, model.positions_embed.weight
        parts: Any = table, positions, encoder.max_seq_length, prompt, rewriting
        return _Lookup(tokenizer.backend_tokenizer, *parts)
    first, *others = modules
    if not isinstance(first, StaticEmbedding) or not all(isinstance(module, Normalize) for module in others):
        return None
    return _Lookup(first.tokenizer, first.embedding.weight, None, None, prompt, None)


def _parts(lookup: _Lookup, text: str, offset: int) -> Parts:
    """Return a vector per token of a text that starts at ``offset`` in a longer one; they sum to the mean."""
    read = text if lookup.rewriting is None else lookup.rewriting.rewrite(text)
    encoding = lookup.tokenizer.encode(lookup.prompt + read, add_special_tokens=False)
    ids = encoding.ids[: lookup.max_tokens]
    rows = torch.tensor(ids, dtype=torch.long, device=lookup.vectors.device)
    vectors = lookup.vectors.detach()[rows].double().cpu()
    if lookup.positions is not None:
        vectors += lookup.positions.detach()[: len(ids)].double().cpu()
    places = [(start - len(lookup.prompt), stop - len(lookup.prompt)) for start, stop in encoding.offsets[: len(ids)]]
    if lookup.rewriting is None:
        spans = _spans_of_words(text, places)
    else:
        spans = _spans_of_phrases(lookup.rewriting.pieces(text), read, places)
    moved = [(start + offset, stop + offset) if stop else (0, 0) for start, stop in spans]
    return Parts(moved, vectors / max(1, len(ids)))


def _spans_of_words(text: str, places: Sequence[Span]) -> list[Span]:
    """Return the span of the word of each token, or of several words if the tokenizer does not split at words."""
    words = word_spans(text)
    starts = [start for start, _ in words]
    spans = []
    for start, stop in places:
        inside = text[max(start, 0) : max(stop, 0)]
        first = max(start, 0) + len(inside) - len(inside.lstrip())
        last = max(start, 0) + len(inside.rstrip()) - 1
        if start < 0:
            spans.append((0, 0))
        elif not inside.strip():
            spans.append((start, stop))
        else:
            spans.append((words[bisect_right(starts, first) - 1][0], words[bisect_right(starts, last) - 1][1]))
    return spans


def _spans_of_phrases(pieces: Sequence[Span], rewritten: str, places: Sequence[Span]) -> list[Span]:
    """Return the span of the piece to which each token of a rewritten text belongs, such as a pair of words."""
    starts = [0]
    for piece in rewritten.split(" ")[:-1]:
        starts.append(starts[-1] + len(piece) + 1)
    return [(0, 0) if start < 0 or not pieces else pieces[bisect_right(starts, start) - 1] for start, _ in places]


def _grouped(chunks: Sequence[Parts]) -> Parts:
    """Sum the vectors of each span."""
    vectors = torch.cat([part.vectors for part in chunks])
    spans, place = np.unique(
        np.array([span for part in chunks for span in part.spans], np.int64).reshape(-1, 2), axis=0, return_inverse=True
    )
    summed = vectors.new_zeros(len(spans), vectors.shape[1]).index_add_(0, torch.from_numpy(place.ravel()), vectors)
    return Parts([(start, stop) for start, stop in spans.tolist()], summed)
