"""Texts that exceed the encoder's limit: count the tokens that are cut off, or split texts into chunks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_xmc.encoders import phrases
from hf_xmc.encoders.encode import compares_by_cosine
from hf_xmc.encoders.roles import normalises, preprocess, query_modules
from hf_xmc.encoders.templates import MAX_WORDS
from hf_xmc.topk import TopK, distinct

LONG_TEXT = ("truncate", "mean", "max")


class Truncation(NamedTuple):
    """The numbers of texts that are too long and of tokens that are cut off."""

    num_texts: int
    num_cut: int
    tokens_cut: int  # in all texts
    max_tokens: int | None  # maximum per text; None if texts of any length are read

    def __str__(self) -> str:
        if self.max_tokens is None:
            return f"{self.num_texts} texts, of any length."
        each = self.tokens_cut / max(1, self.num_cut)
        return (
            f"{self.num_cut} of {self.num_texts} texts are longer than {self.max_tokens} tokens and are cut, by "
            f"{each:.0f} tokens each on average"
        )


class Chunks(NamedTuple):
    """Parts of texts that are short enough for the encoder."""

    texts: list[str]  # C chunks
    text_of: np.ndarray  # (C,), the text of each chunk
    tokens: np.ndarray  # (C,), the length of each chunk


def max_tokens(encoder: SentenceTransformer) -> int | None:
    """Return the maximum number of tokens of a query, without its prompt and special tokens.

    The result is ``None`` if there is no limit, or if the encoder has no tokenizer that tells it.
    """
    reader = query_modules(encoder)[0]
    tokenizer = getattr(reader, "tokenizer", None)
    if phrases.is_phrase_encoder(encoder):
        return MAX_WORDS
    given = getattr(reader, "processing_kwargs", None) or {}
    limits = given.get("text", {}).get("max_length"), getattr(reader, "query_length", None)
    limit = next((limit for limit in limits if limit is not None), getattr(reader, "max_seq_length", None))
    if tokenizer is None or limit is None or not np.isfinite(limit):
        return None
    taken = preprocess(encoder, [""], "query")
    read = taken["attention_mask"].sum() if "attention_mask" in taken else taken["input_ids"].numel()
    return max(1, int(limit) - int(read))


def truncation(encoder: SentenceTransformer, texts: Sequence[str]) -> Truncation:
    """Count the queries that are cut, and the tokens that are lost."""
    limit = max_tokens(encoder)
    if limit is None:
        return Truncation(len(texts), 0, 0, None)
    # An ASCII text has no more tokens than characters, apart from a start token. Other characters may be split into
    # bytes or decomposed into several tokens.
    unsure = [text for text in texts if len(text) >= limit or not text.isascii()]
    over = [size - limit for size in _sizes(encoder, unsure)]
    return Truncation(len(texts), sum(n > 0 for n in over), sum(n for n in over if n > 0), limit)


def chunks_of(encoder: SentenceTransformer, texts: Sequence[str]) -> Chunks:
    """Split texts between words into chunks of maximum length; a short text is one chunk."""
    limit = max_tokens(encoder)
    if limit is None:
        return Chunks(list(texts), np.arange(len(texts)), np.ones(len(texts), np.int64))
    parts: list[tuple[str, int, int]] = []
    for number, (text, tokens) in enumerate(zip(texts, _tokens(encoder, texts), strict=True)):
        start = 0
        while len(tokens) - start > limit:
            stop = start + limit
            while stop > start and tokens[stop].word == tokens[stop - 1].word:
                stop -= 1
            stop = start + limit if stop == start else stop  # a word longer than a chunk is split
            parts.append((text[tokens[start].start : tokens[stop - 1].stop], number, stop - start))
            start = stop
        parts.append((text[tokens[start].start :] if start else text, number, max(1, len(tokens) - start)))
    contents, text_of, sizes = zip(*parts, strict=True) if parts else ((), (), ())
    return Chunks(list(contents), np.array(text_of, np.int64), np.array(sizes, np.int64))


def mean_of_chunks(encoder: SentenceTransformer, embeddings: Tensor, chunks: Chunks, num_texts: int) -> Tensor:
    """Return the ``(N, D)`` mean of the chunks ``(C, D)`` of each text, weighted by their numbers of tokens.

    The mean has unit norm if the encoder's embeddings do. Chunks that embed to zero do not count.
    """
    tokens = chunks.tokens * embeddings.any(1).cpu().numpy()
    share = tokens / np.maximum(1, np.bincount(chunks.text_of, weights=tokens, minlength=num_texts)[chunks.text_of])
    weighted = embeddings * torch.from_numpy(share).to(embeddings)[:, None]
    pooled = embeddings.new_zeros(num_texts, embeddings.shape[1])
    pooled.index_add_(0, torch.from_numpy(chunks.text_of), weighted)
    alone = torch.from_numpy(share == 1)
    if normalises(encoder) or compares_by_cosine(encoder):
        pooled = torch.nn.functional.normalize(pooled)
    pooled[torch.from_numpy(chunks.text_of)[alone]] = embeddings[alone]
    return pooled


def pairs_of_chunks(pairs: np.ndarray, chunks: Chunks) -> np.ndarray:
    """Return the pairs (chunk, label) of pairs (text, label)."""
    each = [(chunk, label) for text, label in pairs for chunk in np.flatnonzero(chunks.text_of == text)]
    return np.array(each, dtype=np.int64).reshape(-1, 2)


def max_of_chunks(found: TopK, chunks: Chunks, num_texts: int) -> TopK:
    """Return the ``k`` best labels of each text, given those of each chunk. A label gets the score of its best chunk.

    The result is exact: a label among the ``k`` best of a text is among the ``k`` best of its best chunk.
    """
    k = found.label_ids.shape[1]
    place = np.arange(len(chunks.text_of)) - np.searchsorted(chunks.text_of, chunks.text_of)
    width = int(place.max(initial=0)) + 1
    table = TopK(np.full((num_texts, width, k), -1), np.full((num_texts, width, k), -np.inf, np.float32))
    for into, values in zip(table, found, strict=True):
        into[chunks.text_of, place] = values
    label_ids, scores = (part.reshape(num_texts, width * k) for part in table)
    order = np.lexsort((label_ids, -scores), axis=1)
    return distinct(TopK(np.take_along_axis(label_ids, order, 1), np.take_along_axis(scores, order, 1)), k)


class _Token(NamedTuple):
    start: int
    stop: int
    word: int | None


def _sizes(encoder: SentenceTransformer, texts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each text."""
    tokenizer = query_modules(encoder)[0].tokenizer
    if (rewriting := phrases.rewriting_of(encoder)) is not None:
        return [len(rewriting.spans(text)) for text in texts]
    if texts and isinstance(tokenizer, PreTrainedTokenizerBase):
        read = tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)
        return list(map(len, read["input_ids"]))
    return [_size(tokenizer, text) for text in texts]


def _size(tokenizer: Any, text: str) -> int:
    if isinstance(tokenizer, Tokenizer):
        return len(tokenizer.encode(text, add_special_tokens=False))
    return len(tokenizer.tokenize(text))


def _tokens(encoder: SentenceTransformer, texts: Sequence[str]) -> list[list[_Token]]:
    """Return the position and the word number of each token of each text."""
    if not texts:
        return []
    tokenizer = query_modules(encoder)[0].tokenizer
    if (rewriting := phrases.rewriting_of(encoder)) is not None:
        return [[_Token(*span, number) for number, span in enumerate(rewriting.spans(text))] for text in texts]
    if not getattr(tokenizer, "is_fast", False):
        return [_spread(tokenizer, text) for text in texts]
    read = tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
    )
    return [
        [_Token(start, stop, word) for (start, stop), word in zip(spans, read.word_ids(number), strict=True)]
        for number, spans in enumerate(read["offset_mapping"])
    ]


def _spread(tokenizer: Any, text: str) -> list[_Token]:
    """Return evenly spaced tokens in each word, for a tokenizer that does not report positions."""
    tokens = []
    for number, word in enumerate(re.finditer(r"\S+", text)):
        size, length = _size(tokenizer, word.group()), len(word.group())
        edges = [word.start() + length * place // size for place in range(size + 1)] if size else []
        tokens += [_Token(start, stop, number) for start, stop in pairwise(edges)]
    return tokens
