"""A static encoder made from the texts at hand: a tokenizer trained on them, and one vector for each token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import pad

UNKNOWN = "[UNK]"
TOKENIZE_BATCH = 8192


def train_tokenizer(texts: Iterable[str], vocab_size: int = 50_000) -> Tokenizer:
    """Train byte-pair encoding (Sennrich et al., 2016) of lower-cased words; few texts give fewer tokens.

    A character that occurs in none of the texts gives no token.
    """
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[UNKNOWN], show_progress=False)
    trained.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(trained.model)  # without special tokens: a text that spells "[UNK]" is read like any other
    tokenizer.normalizer, tokenizer.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
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
    """Make an encoder that needs no download: the embedding of a text is the mean of the vectors of its tokens.

    It has stock modules only, so the trained encoder loads in sentence-transformers alone. It does not normalise:
    frequent labels need a norm of their own, and the norm is free to learn it.

    What the texts do not contain adds nothing to an embedding. A character that occurs in none of them gives no token,
    and does not count in the mean. A token that occurs in none of them, such as a piece that only served to build
    longer ones, starts at zero and stays there unless it occurs in training; it counts in the mean. So a text of which
    nothing is known embeds to zero, before and after training and in a saved encoder.

    Args:
        texts: Texts to train the tokenizer on, such as the training queries and the labels.
        embedding_dim: Size of the vectors.
        vocab_size: Maximum number of tokens.
        std: Standard deviation of the normal distribution that the vectors start from.
        seed: Seed of that start.
        device: Device of the encoder; by default the best available one.

    Raises:
        ValueError: if no text has a word.
    """
    texts = list(texts)
    return encoder_of(train_tokenizer(texts, vocab_size), texts, embedding_dim, std, seed, device)


def encoder_of(
    tokenizer: Tokenizer, texts: Sequence[str], embedding_dim: int, std: float, seed: int, device: str | None
) -> SentenceTransformer:
    """Make the untrained encoder of a tokenizer; arguments as in :func:`static_encoder`."""
    if tokenizer.get_vocab_size() <= 1:
        raise ValueError("no word was found in the texts: a tokenizer is trained on the queries and labels at hand.")
    embedding = StaticEmbedding(tokenizer, embedding_dim=embedding_dim)
    with torch.no_grad():
        embedding.embedding.weight.normal_(std=std, generator=torch.Generator().manual_seed(seed))
        embedding.embedding.weight[~_occurring(tokenizer, texts)] = 0
    encoder = SentenceTransformer(modules=[embedding], similarity_fn_name="dot", device=device)
    hold_unknown(encoder)
    return encoder


def _occurring(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Return ``(V,)``, whether each token occurs in the texts; the unknown token never does."""
    occurring = np.zeros(tokenizer.get_vocab_size(), dtype=bool)
    for start in range(0, len(texts), TOKENIZE_BATCH):
        for read in tokenizer.encode_batch_fast(texts[start : start + TOKENIZE_BATCH], add_special_tokens=False):
            occurring[read.ids] = True
    occurring[tokenizer.token_to_id(UNKNOWN)] = False
    return torch.from_numpy(occurring)


def hold_unknown(encoder: SentenceTransformer) -> None:
    """Keep the unknown token of static embeddings at zero through training, if it starts there.

    It gets no gradient, and counts in the mean as it does without this function. The setting survives copies and
    pickles but is not saved: a loaded encoder needs the call again before it is trained, and no call to predict.
    """
    for module in encoder.modules():
        if isinstance(module, StaticEmbedding):
            unknown = getattr(module.tokenizer.model, "unk_token", None)
            row = None if unknown is None else module.tokenizer.token_to_id(unknown)
            bag = module.embedding
            if row is not None and bag.padding_idx is None and not bag.weight[row].any():
                bag.padding_idx = row
                bag.register_forward_hook(_count_padding)


def _count_padding(bag: torch.nn.EmbeddingBag, inputs: tuple[Tensor, Tensor], mean: Tensor) -> Tensor:
    """Turn the mean over the tokens that are not padding into the mean over all, padding being zero."""
    ids, offsets = inputs
    known = pad(torch.ne(ids, bag.padding_idx or 0).cumsum(0), (1, 0))
    ends: Any = torch.cat([offsets[1:], offsets.new_tensor([len(ids)])])
    share = (known[ends] - known[offsets]) / (ends - offsets).clamp(min=1)
    return mean * share.to(mean.dtype)[:, None]
