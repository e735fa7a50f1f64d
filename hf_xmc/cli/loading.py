"""Options of the commands that load a model: how its encoder is loaded."""

from __future__ import annotations

import argparse
import json
from typing import Any, Protocol


class Parser(Protocol):
    """A parser, or a group of its options."""

    def add_argument(self, *names: str, **settings: Any) -> Any:
        """Add an option."""
        ...


def add_options(parser: Parser) -> None:
    """Add ``--device``, ``--backend`` and ``--model_kwargs`` to a parser, or to a group of its options."""
    parser.add_argument("--device", help="device of the encoder, such as cpu or cuda (default: the best available)")
    parser.add_argument(
        "--backend", choices=["torch", "onnx", "openvino"], default="torch", help="library that runs the encoder"
    )
    parser.add_argument(
        "--model_kwargs",
        help="arguments for the loader of the encoder's weights, as JSON, such as "
        """'{"file_name": "model_qint8_avx512.onnx"}'""",
    )


def loading_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options as arguments of ``XMCModel.from_pretrained``.

    Raises:
        ValueError: if ``--model_kwargs`` is not a JSON object.

    >>> loading_of(argparse.Namespace(device="cpu", backend="onnx", model_kwargs='{"file_name": "a.onnx"}'))
    {'device': 'cpu', 'backend': 'onnx', 'model_kwargs': {'file_name': 'a.onnx'}}
    """
    given = arguments.model_kwargs
    try:
        model_kwargs = None if given is None else json.loads(given)
    except ValueError:
        model_kwargs = given
    if given is not None and not isinstance(model_kwargs, dict):
        raise ValueError(f'--model_kwargs must be a JSON object such as \'{{"file_name": "NAME"}}\', got {given}.')
    return {"device": arguments.device, "backend": arguments.backend, "model_kwargs": model_kwargs}
