"""Answer a batch of texts with the labels that a request asked for."""

from __future__ import annotations

from typing import Any, NamedTuple

from hf_xmc.model.model import XMCModel
from hf_xmc.model.predictions import Prediction


class BadRequest(ValueError):
    """A request that the client must change."""


class Options(NamedTuple):
    """Labels that a request asked for; ``None`` as in :meth:`hf_xmc.XMCModel.predict`."""

    top_k: int | None = None
    threshold: float | None = None
    allow: tuple[str, ...] | None = None
    deny: tuple[str, ...] | None = None
    explain: bool = False


def answer(model: XMCModel, texts: list[str], options: Options) -> list[list[dict[str, Any]]]:
    """Return the labels of each text as rows with ``uid``, ``text`` and ``score``, best first.

    With ``explain``, a row also has the fields ``words``, ``words_add_up`` and ``nearest`` of
    :class:`hf_xmc.model.explanation.Explanation`.

    Raises:
        BadRequest: if a uid is unknown, or there is a threshold and the model is not calibrated.
    """
    wanted: dict[str, Any] = {name: getattr(options, name) for name in ("top_k", "threshold", "allow", "deny")}
    try:
        model.predict_stream([], **wanted)  # checks the arguments; a later ValueError is not the client's fault
    except ValueError as error:
        raise BadRequest(str(error)) from None
    predictions = model.predict(texts, **wanted)
    return [
        [_row(model, text, label, options.explain) for label in labels]
        for text, labels in zip(texts, predictions, strict=True)
    ]


def _row(model: XMCModel, text: str, label: Prediction, explain: bool) -> dict[str, Any]:
    row: dict[str, Any] = label._asdict()
    if explain:
        explanation = model.explain(text, label.uid)
        row["words_add_up"] = explanation.words_add_up
        for name in ("words", "nearest"):
            row[name] = [part._asdict() for part in getattr(explanation, name)]
    return row
