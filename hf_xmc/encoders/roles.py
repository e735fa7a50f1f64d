"""Embed queries and labels in training exactly as ``encode_query`` and ``encode_document`` do in prediction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Router
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from hf_xmc.encoders.forward import ROLE, Features, embed

logger = logging.getLogger(__name__)

PROMPT_NAMES = {"query": ("query",), "document": ("document", "passage", "corpus")}
TOLERANCE = 0.05  # relative; FlashAttention in bfloat16 rounds a padded and a packed batch differently


def prompt_of(encoder: SentenceTransformer, role: str) -> str | None:
    """Return the prompt that ``encode_query`` or ``encode_document`` puts before a text, or ``None``.

    The first name that ``encoder.prompts`` has decides, even if its prompt is empty: ``query`` for queries, and
    ``document``, ``passage`` or ``corpus`` for documents. Without any of them, ``default_prompt_name`` decides.

    Args:
        encoder: The encoder. Labels are documents.
        role: ``"query"`` or ``"document"``.

    >>> prompt_of(SentenceTransformer("intfloat/e5-small"), "document")  # doctest: +SKIP
    'passage: '
    """
    name = next((name for name in PROMPT_NAMES[role] if name in encoder.prompts), encoder.default_prompt_name)
    return None if name is None else encoder.prompts.get(name)


def named_prompts(encoder: SentenceTransformer) -> dict[str, str]:
    """Return the encoder's prompts, with those of queries and documents under the names ``query`` and ``document``.

    ``encode_query`` and ``encode_document`` give the same embeddings with them. A saved encoder needs these names:
    sentence-transformers adds both, with an empty prompt, when it loads an encoder that lacks them, and then neither
    ``passage`` nor ``default_prompt_name`` decides any more. It does not load an encoder whose ``default_prompt_name``
    is not among its prompts, though such an encoder embeds texts, without a prompt.
    """
    named = {name: prompt or "" for name, prompt in encoder.prompts.items()}
    if encoder.default_prompt_name is not None:
        named.setdefault(encoder.default_prompt_name, "")
    return named | {role: prompt_of(encoder, role) or "" for role in PROMPT_NAMES}


def preprocess(encoder: SentenceTransformer, texts: Sequence[str], role: str) -> Features:
    """Return the features that ``encode_query`` or ``encode_document`` computes for texts, on the CPU."""
    return {**encoder.preprocess(list(texts), prompt=prompt_of(encoder, role), task=role), ROLE: role}


def query_modules(encoder: SentenceTransformer) -> list[Any]:
    """Return the modules that embed a query, in order; for a router, the modules on the query route."""
    return [passed for module in encoder for passed in _on_route(module)]


def _on_route(module: Any) -> list[Any]:
    if not isinstance(module, Router):
        return [module]
    towers: Any = module.sub_modules
    tower = towers[module._resolve_route(task="query", modality="text")]
    return [passed for part in tower for passed in _on_route(part)]


def normalises(encoder: SentenceTransformer) -> bool:
    """Return whether the encoder itself scales every embedding to unit norm."""
    return isinstance(encoder[-1], Normalize) and encoder.truncate_dim is None


def settings(encoder: SentenceTransformer) -> dict[str, Any]:
    """Return the settings, in addition to modules and weights, that decide how texts are embedded and compared."""
    return {
        "query prompt": prompt_of(encoder, "query"),
        "document prompt": prompt_of(encoder, "document"),
        "include_prompt": [module.include_prompt for module in encoder.modules() if isinstance(module, Pooling)],
        "max_seq_length": encoder.max_seq_length,
        "truncate_dim": encoder.truncate_dim,
        "similarity_fn_name": encoder.similarity_fn_name,
    }


def score_by_product(encoder: SentenceTransformer) -> None:
    """Set the encoder's similarity to the dot product, which the losses use, and log the change."""
    before = encoder.similarity_fn_name
    if before != "dot" and not (before == "cosine" and normalises(encoder)):
        level = logging.INFO if before == "cosine" else logging.WARNING
        logger.log(
            level, "Changed similarity_fn_name from %r to 'dot', because the losses score by the dot product.", before
        )
    encoder.similarity_fn_name = "dot"


def check_unchanged_settings(encoder: SentenceTransformer, before: dict[str, Any]) -> None:
    """Refuse an encoder whose settings have changed.

    Args:
        encoder: The encoder.
        before: Result of :func:`settings` when the labels were preprocessed.

    Raises:
        ValueError: if a setting differs.
    """
    for name, value in settings(encoder).items():
        if value != before[name]:
            raise ValueError(
                f"{name} of the encoder must not change during training: it was {before[name]!r} when the trainer was "
                f"created, and is now {value!r}. Create a new trainer."
            )


def check_embeddings(
    encoder: SentenceTransformer, loss: nn.Module, texts: Sequence[str], queries: Callable[[], Features]
) -> None:
    """Check on a few texts that training embeds them as ``encode_query`` and ``encode_document`` do.

    Args:
        encoder: The encoder, which keeps its mode.
        loss: The module whose parameters are trained.
        texts: A few texts.
        queries: Function that returns the features of the texts as queries, as in training.

    Raises:
        ValueError: if embeddings differ from those of ``encode_query`` or ``encode_document``, if the encoder cannot
            embed the texts, or if it has no weight to train.
    """
    if not any(weight.requires_grad for weight in loss.parameters()):
        raise ValueError(
            "`model` must have a trainable weight, but no weight requires a gradient. Append a Dense module, or set "
            "requires_grad (update_embeddings of WordEmbeddings)."
        )
    training = [module for module in encoder.modules() if module.training]
    for role in PROMPT_NAMES:
        expected = encode(encoder, texts, role, len(texts))
        features = queries() if role == "query" else preprocess(encoder, texts, role)
        with torch.no_grad():
            found = embed(encoder, batch_to_device(features, encoder.device))
        if found.shape != expected.shape or (found - expected).float().norm() > TOLERANCE * expected.float().norm():
            raise ValueError(
                f"`model` must embed texts with its modules alone, but encode_{role} of {type(encoder).__name__} "
                "returns other embeddings, and training would not use it. Move the difference into a module, a prompt "
                "or truncate_dim."
            )
    for module in training:
        module.training = True


def check_usable(encoder: SentenceTransformer) -> None:
    """Raise ``ValueError`` if the encoder cannot embed a text as a query or as a document."""
    for role in PROMPT_NAMES:
        encode(encoder, ["a text"], role, 1)


def encode(encoder: SentenceTransformer, texts: Sequence[str], role: str, batch_size: int) -> Tensor:
    """Return the ``(N, D)`` embeddings that ``encode_query`` or ``encode_document`` returns.

    Raises:
        ValueError: if the encoder cannot embed texts of this role.
    """
    encode_role: Any = encoder.encode_query if role == "query" else encoder.encode_document
    try:
        embeddings: Tensor = encode_role(
            list(texts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
        )
    except (AttributeError, KeyError, TypeError) as error:
        for text in texts:
            text.encode()  # a lone surrogate gives a TypeError in the tokenizer that names no text
        raise ValueError(
            f"the encoder must embed texts with encode_{role}, which failed ({type(error).__name__}: {error}). Check "
            f"that encoder.encode_{role}(['a text']) works."
        ) from error
    return embeddings
