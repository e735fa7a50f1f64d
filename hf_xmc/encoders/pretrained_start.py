"""Start the vectors of a static encoder from the meanings of its words, as a pretrained encoder knows them."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import Tensor

BATCH = 256


def start_from(encoder: SentenceTransformer, pretrained: SentenceTransformer, std: float) -> None:
    r"""Replace the initial vectors of a static encoder by those of a pretrained encoder, in place.

    .. math:: v_w = s \, P\, (e_w - \bar e), \qquad v_{ab} = (v_a + v_b) / 2

    :math:`e_w` is the pretrained embedding of word :math:`w`, of norm 1, and :math:`\bar e` the mean over the words.
    :math:`P` turns them to their principal axes and keeps the first ones, as many as the encoder has dimensions. If
    the encoder has more, the others keep their random values. The scale :math:`s` gives the kept numbers a root mean
    square of ``std``. A pair or run of characters gets the mean of its parts. Vectors at zero stay there: those of
    leading words, of pairs and runs that occur once, and of tokens that occur in no text. Only the initial values
    change, so the trained encoder consists of the same modules.

    Starting a static encoder from a transformer follows Model2Vec and ``StaticEmbedding.from_distillation`` of
    sentence-transformers. Here the tokens are those of the data, and training goes on.

    Args:
        encoder: An untrained encoder of :func:`hf_xmc.static_encoder` or :func:`hf_xmc.phrase_encoder`.
        pretrained: Any text encoder. Prompts are not used.
        std: The root mean square of the new numbers.

    Raises:
        ValueError: if ``encoder`` has no token vectors of its own.
    """
    if len(encoder) != 1 or not isinstance(encoder[0], StaticEmbedding):
        modules = ", ".join(type(module).__name__ for module in encoder)
        raise ValueError(f"`encoder` must be a single StaticEmbedding, got {modules}.")
    table, vocab = encoder[0].embedding.weight, encoder[0].tokenizer.get_vocab()
    used = {token: row for token, row in vocab.items() if table[row].any()}
    words = sorted((token for token in used if "_" not in token), key=lambda word: (len(word), word))
    vectors = _principal(_embed(pretrained, [word.removeprefix("##") for word in words]), table.shape[1])
    known = dict(zip(words, vectors * (std / vectors.square().mean().sqrt()), strict=True))
    for token, row in used.items():
        parts = [known[part] for part in ([token] if token in known else token.split("_")) if part in known]
        if parts:
            with torch.no_grad():
                table[row, : vectors.shape[1]] = torch.stack(parts).mean(0).to(table)


def _embed(pretrained: SentenceTransformer, texts: list[str]) -> Tensor:
    """Return the ``(N, D)`` unit embeddings of short texts, on the CPU."""
    given: dict[str, Any] = {"prompt": "", "batch_size": BATCH, "normalize_embeddings": True}
    return pretrained.encode(texts, convert_to_tensor=True, **given).float().cpu()


def _principal(vectors: Tensor, dim: int) -> Tensor:
    """Return the coordinates of centred vectors along their first ``dim`` principal axes, or along all if fewer."""
    centred = vectors - vectors.mean(0)
    _, axes = torch.linalg.eigh((centred.T @ centred).double())  # ascending
    return centred @ axes.flip(1)[:, :dim].float()
