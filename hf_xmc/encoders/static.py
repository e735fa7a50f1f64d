"""A static encoder built from given texts: a tokenizer trained on them, and one vector per token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import pad

from hf_xmc.encoders.characters import IGNORED
from hf_xmc.encoders.rewriting import UNSEEN_WORDS, unseen_share
from hf_xmc.encoders.templates import UNKNOWN

RARE = 5  # occurrences below which a sequence of letters has no token, if many words of new texts will be unseen
MIN_WORDS = 1000  # fewer words do not tell how many of them will be unseen
TOKENIZE_BATCH = 8192


def lower() -> normalizers.Sequence:
    """Return a normaliser to NFKC and lower case, without invisible characters and without the dot of a Turkish i.

    Accents, vowel signs and tone marks stay.
    """
    invisible = normalizers.Replace(Regex(f"[{IGNORED}]"), "")
    return normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("i\u0307", "i"), invisible]
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int = 50_000) -> Tokenizer:
    """Train a byte-pair encoding (Sennrich et al., 2016) of lower-cased words; few texts give fewer tokens.

    Texts of 1,000 words tell how many words of new texts will be unseen. If that is more than 3 %, as in inflected
    languages and in scripts without spaces, only sequences that occur at least five times become tokens. So new words
    consist of trained tokens.
    Characters that do not occur in the texts produce no token.
    """
    texts = list(texts)
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = lower(), pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=RARE if _many_unseen(trained, texts) else 0,
        special_tokens=[UNKNOWN],
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(trained.model)  # without special tokens: a text that spells "[UNK]" is read like any other
    tokenizer.normalizer, tokenizer.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    return tokenizer


def _many_unseen(tokenizer: Tokenizer, texts: Sequence[str]) -> bool:
    """Return whether many words of new texts will be unseen, judged by the words that occur once."""
    assert tokenizer.normalizer is not None
    assert tokenizer.pre_tokenizer is not None
    counts: Counter[str] = Counter()
    for text in texts:
        words = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        counts.update(word for word, _ in words)
    return counts.total() >= MIN_WORDS and unseen_share(counts) > UNSEEN_WORDS


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

    It has standard modules only, so the trained encoder loads in sentence-transformers alone. It does not normalise,
    so that the norm of a label's embedding can follow the label's frequency.

    Anything that does not occur in the texts adds nothing to an embedding. Such a character produces no token, and does
    not count in the mean. Such a token, for example a piece that only served to build longer ones, starts at zero and
    stays there unless it occurs in training; it does count in the mean. So a text with only unknown words embeds to
    zero, before and after training and in a saved encoder.

    Args:
        texts: Texts to train the tokenizer on, such as the training queries and the labels.
        embedding_dim: Size of the vectors.
        vocab_size: Maximum number of tokens.
        std: Standard deviation of the normal distribution of the initial vectors.
        seed: Seed of the initial vectors.
        device: Device of the encoder; by default the best available one.

    Raises:
        ValueError: if no text has a word.
    """
    texts = list(texts)
    return encoder_of(train_tokenizer(texts, vocab_size), texts, embedding_dim, std, seed, device)


def encoder_of(
    tokenizer: Tokenizer, texts: Sequence[str], embedding_dim: int, std: float, seed: int, device: str | None
) -> SentenceTransformer:
    """Make an untrained encoder for a tokenizer; arguments as in :func:`static_encoder`."""
    if tokenizer.get_vocab_size() <= 1:
        raise ValueError("`texts` must contain at least one word, got none. Pass the training queries and the labels.")
    embedding = StaticEmbedding(tokenizer, embedding_dim=embedding_dim)
    with torch.no_grad():
        embedding.embedding.weight.normal_(std=std, generator=torch.Generator().manual_seed(seed))
        embedding.embedding.weight[~_occurring(tokenizer, texts)] = 0
    encoder = SentenceTransformer(modules=[embedding], similarity_fn_name="dot", device=device)
    hold_unknown(encoder)
    return encoder


def _occurring(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Return a mask ``(V,)`` of the tokens that occur in the texts; the unknown token never counts."""
    occurring = np.zeros(tokenizer.get_vocab_size(), dtype=bool)
    for start in range(0, len(texts), TOKENIZE_BATCH):
        for read in tokenizer.encode_batch_fast(texts[start : start + TOKENIZE_BATCH], add_special_tokens=False):
            occurring[read.ids] = True
    occurring[tokenizer.token_to_id(UNKNOWN)] = False
    return torch.from_numpy(occurring)


def hold_unknown(encoder: SentenceTransformer) -> None:
    """Keep the unknown token of static embeddings at zero through training, if it starts there.

    It gets no gradient, and still counts in the mean. The setting survives copies and pickles but is not saved: call
    this function again before training a loaded encoder. Prediction does not need it, and is faster without:
    :func:`release_unknown` ends it. :class:`hf_xmc.XMCTrainer` calls both for each training.
    """
    for module in encoder.modules():
        if isinstance(module, StaticEmbedding):
            unknown = getattr(module.tokenizer.model, "unk_token", None)
            row = None if unknown is None else module.tokenizer.token_to_id(unknown)
            bag = module.embedding
            if row is not None and bag.padding_idx is None and not bag.weight[row].any():
                hold(bag, row)


def release_unknown(encoder: SentenceTransformer) -> None:
    """Undo :func:`hold_unknown`."""
    for module in encoder.modules():
        if isinstance(module, StaticEmbedding):
            release(module.embedding)


def hold(bag: torch.nn.EmbeddingBag, row: int) -> None:
    """Keep a row of zeros at zero, and count it in the mean."""
    bag.padding_idx = row
    bag.register_forward_hook(_count_padding)


def release(bag: torch.nn.EmbeddingBag) -> int | None:
    """Undo :func:`hold`, and return the row; ``None`` if no row was held."""
    hooks = [key for key, hook in bag._forward_hooks.items() if hook is _count_padding]
    for key in hooks:
        del bag._forward_hooks[key]
    row, bag.padding_idx = bag.padding_idx, None if hooks else bag.padding_idx
    return row if hooks else None


def _count_padding(bag: torch.nn.EmbeddingBag, inputs: tuple[Tensor, Tensor], mean: Tensor) -> Tensor:
    """Turn the mean over the tokens other than padding into the mean over all tokens, with padding as zero."""
    ids, offsets = inputs
    known = pad(torch.ne(ids, bag.padding_idx or 0).cumsum(0), (1, 0))
    ends: Any = torch.cat([offsets[1:], offsets.new_tensor([len(ids)])])
    share = (known[ends] - known[offsets]) / (ends - offsets).clamp(min=1)
    return mean * share.to(mean.dtype)[:, None]
