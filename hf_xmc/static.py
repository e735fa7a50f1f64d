"""A static encoder made from the texts at hand: a tokenizer trained on them, and one vector a token."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

UNKNOWN = "[UNK]"


def train_tokenizer(texts: Iterable[str], vocab_size: int = 50_000) -> Tokenizer:
    """Byte-pair encoding (Sennrich et al., 2016) of lower-cased words; of few texts it learns fewer tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[UNKNOWN], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def static_encoder(
    texts: Iterable[str],
    *,
    embedding_dim: int = 512,
    vocab_size: int = 50_000,
    std: float = 0.5,
    seed: int = 0,
    device: str | None = None,
) -> SentenceTransformer:
    """An encoder that needs no download: the embedding of a text is the mean of its tokens' vectors.

    It has stock modules only, so what is trained from it loads in sentence-transformers alone. It does not normalise:
    frequent labels need a norm of their own, and the norm is free to learn it.

    Args:
        texts: what the tokenizer is trained on, such as the training queries and the labels.
        embedding_dim, vocab_size: size of the vectors, and how many there are at most.
        std: of the normal distribution that the vectors start from.
        seed: of that start.
        device: where the encoder goes; by default the best there is.

    Raises:
        ValueError: no text has a word.
    """
    return encoder_of(train_tokenizer(texts, vocab_size), embedding_dim, std, seed, device)


def encoder_of(
    tokenizer: Tokenizer, embedding_dim: int, std: float, seed: int, device: str | None
) -> SentenceTransformer:
    """The untrained encoder of a tokenizer; arguments as in :func:`static_encoder`."""
    if tokenizer.get_vocab_size() <= 1:
        raise ValueError("no word was found in the texts: a tokenizer is trained on the queries and labels at hand.")
    embedding = StaticEmbedding(tokenizer, embedding_dim=embedding_dim)
    with torch.no_grad():
        embedding.embedding.weight.normal_(std=std, generator=torch.Generator().manual_seed(seed))
    return SentenceTransformer(modules=[embedding], similarity_fn_name="dot", device=device)
