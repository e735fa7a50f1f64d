"""A model in a few lines."""

from __future__ import annotations

from sentence_transformers import SentenceTransformer

from hf_xmc.data.labels import LabelTexts

SIMILARITIES = {"dot": "dot product"}  # and "cosine"


def describe(
    encoder: SentenceTransformer, labels: LabelTexts, index_type: str, num_remembered: int, is_calibrated: bool
) -> str:
    """Return the ``repr`` of a model: its encoder, its labels and its memory, each on one line."""
    modules = ", ".join(type(module).__name__ for module in encoder)
    similarity = SIMILARITIES.get(encoder.similarity_fn_name or "cosine", "cosine")
    texts = f" with {len(labels.texts)} texts" if labels.several else ""
    return (
        "XMCModel(\n"
        f"  encoder: {modules}, {encoder.get_embedding_dimension()} dimensions, {similarity}\n"
        f"  labels: {len(labels)}{texts}, searched by {index_type}\n"
        f"  memory: {num_remembered} queries, {'calibrated' if is_calibrated else 'not calibrated'}\n"
        ")"
    )
