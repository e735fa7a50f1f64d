"""Answer an Inference Endpoint, which loads this file, as the text-classification pipeline of transformers does."""

from typing import Any

from hf_xmc import XMCModel

PARAMETERS = ("top_k", "threshold", "allow", "deny")


class EndpointHandler:
    """A model in the folder of its repository.

    Args:
        path: Folder of the model.
    """

    def __init__(self, path: str = "") -> None:
        self.model = XMCModel.from_pretrained(path or ".")

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """Return the labels of one text, best first, or a list of such lists for a list of texts.

        Args:
            data: ``inputs``, a text or a list of texts, and optionally ``parameters``: ``top_k``, ``threshold``,
                ``allow`` and ``deny``, as in ``XMCModel.predict``.

        Each label is a dictionary with ``label``, its text, ``score`` and ``uid``.

        Raises:
            ValueError: if the request has another form. The endpoint answers with status 400 and the message.
        """
        texts, parameters = data.get("inputs"), data.get("parameters") or {}
        one = isinstance(texts, str)
        if not one and not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            raise ValueError(f"`inputs` must be a text or a list of texts, got {type(texts).__name__}.")
        if not isinstance(parameters, dict) or not parameters.keys() <= set(PARAMETERS):
            raise ValueError(f"`parameters` must be a dictionary with {', '.join(PARAMETERS)}, got {parameters!r}.")
        answers = [
            [{"label": label.text, "score": label.score, "uid": label.uid} for label in labels]
            for labels in self.model.predict([texts] if one else texts, **parameters)
        ]
        return answers[0] if one else answers
