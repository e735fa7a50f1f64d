"""A model as a callable, in the manner of ``transformers.pipeline``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_xmc.model.model import XMCModel
from hf_xmc.model.predictions import Prediction


class Pipeline:
    """A model as a callable, as :func:`pipeline` makes it."""

    def __init__(self, model: XMCModel) -> None:
        self.model = model

    def __call__(
        self, texts: str | Sequence[str], top_k: int | None = None, *, threshold: float | None = None
    ) -> list[Any]:
        """Return the best labels of one text, or of each text; arguments as in :meth:`XMCModel.predict`."""
        if isinstance(texts, str):
            return _as_dicts(self.model.predict(texts, top_k, threshold=threshold))
        return [_as_dicts(labels) for labels in self.model.predict(texts, top_k, threshold=threshold)]


def pipeline(model: str | Path | XMCModel, **settings: Any) -> Pipeline:
    """Return a function from texts to labels, ``pipe(texts, top_k=None, threshold=None)``.

    Args:
        model: a folder, ``org/name`` of a model of the Hub, or a model.
        settings: of :meth:`XMCModel.from_pretrained`.

    Raises:
        ValueError: if settings are given for a model that is already loaded, or
            :meth:`XMCModel.from_pretrained` raises it.

    Returns a function that gives, for one text, a list of ``{"label", "score", "label_id"}``, best first, and for
    several a list of such lists. ``top_k`` and ``threshold`` are those of :meth:`XMCModel.predict`.

    It is no task of ``transformers.pipeline``, which takes a repository's ``config.json`` for one of its own models: it
    would load neither the encoder, with its pooling, nor the labels.

    >>> pipe = pipeline("runs/demo/model")  # doctest: +SKIP
    >>> pipe("a small boat with a sail", top_k=1)  # doctest: +SKIP
    [{'label': 'boat', 'score': 12.3, 'label_id': 'n02858304'}]
    """
    if settings and isinstance(model, XMCModel):
        raise ValueError(
            f"{', '.join(settings)}: settings of XMCModel.from_pretrained, got with a model that is loaded already; "
            "give them where it is loaded, or a folder or org/name here."
        )
    return Pipeline(model if isinstance(model, XMCModel) else XMCModel.from_pretrained(model, **settings))


def _as_dicts(labels: Sequence[Prediction]) -> list[dict[str, Any]]:
    return [{"label": label.text, "score": label.score, "label_id": label.label_id} for label in labels]
