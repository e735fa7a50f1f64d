"""Other backends of an encoder, ONNX Runtime and OpenVINO, which sentence-transformers loads through Optimum."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sentence_transformers import SentenceTransformer
from torch import nn

TORCH = "torch"
BACKENDS = (TORCH, "onnx", "openvino")
# The names leave no room for a file that torch or transformers would load, such as pytorch_model.bin.
NAMES = {
    "onnx": re.compile(r"(.*/)?onnx/[^/]+\.onnx([._]data)?"),
    "openvino": re.compile(r"(.*/)?openvino/openvino[^/]*\.(xml|bin)"),
}
MAIN = {"onnx": ".onnx", "openvino": ".xml"}  # suffix of the file that `file_name` names
CLASSES = {
    "onnx": ("optimum.onnxruntime", "ORTModelForFeatureExtraction"),
    "openvino": ("optimum.intel.openvino", "OVModelForFeatureExtraction"),
}
# What was tried on 2026-11-29.
WORKING = {
    "onnx": "No release of optimum-onnx imports with transformers 5, which hf_xmc needs; the newest was 0.1.0. Its "
    "main branch imports with transformers 5.10.0, 5.16.1 and 5.23.0 at commit 1939f27: `pip install onnx "
    "onnxruntime==1.32.0 optimum==2.1.0`, then `pip install --no-deps "
    "git+https://github.com/huggingface/optimum-onnx@1939f27`.",
    "openvino": "optimum-intel 2.2.0 imports with transformers 5.10 to 5.16.1, but not with 5.17.0, 5.18.0, 5.20.2 and "
    "5.23.0: `pip install openvino==2026.4.1 nncf==3.4.0 optimum==2.3.0 transformers==5.16.1 huggingface_hub==1.31.0`, "
    "then `pip install --no-deps optimum-intel==2.2.0`, because its metadata excludes transformers 5.6 and newer.",
}


class Loading(NamedTuple):
    """How sentence-transformers loads an encoder.

    Args:
        device: Device of the encoder; by default the best one available.
        backend: ``"torch"``, ``"onnx"`` or ``"openvino"``.
        model_kwargs: Further arguments for the loader of the weights, such as ``{"file_name": ...}``.
    """

    device: str | None = None
    backend: str = TORCH
    model_kwargs: Mapping[str, Any] | None = None

    def check(self) -> None:
        """Raise if the arguments are wrong, or the packages of the backend do not import.

        Raises:
            TypeError: if ``model_kwargs`` is no mapping.
            ValueError: if the backend is unknown, or does not run on the device.
            ModuleNotFoundError: if the packages of the backend are missing, or do not import together.
        """
        if self.backend not in BACKENDS:
            raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {self.backend!r}.")
        if self.model_kwargs is not None and not isinstance(self.model_kwargs, Mapping):
            raise TypeError(f"`model_kwargs` must be a dictionary, got {self.model_kwargs!r}.")
        if self.backend == "openvino" and self.device not in (None, "cpu"):
            raise ValueError(
                f"`device` must be None or 'cpu' with `backend='openvino'`, got {self.device!r}. For a GPU of Intel, "
                "pass model_kwargs={'device': 'GPU'}."
            )
        if self.backend == TORCH:
            return
        module, name = CLASSES[self.backend]
        try:
            getattr(import_module(module), name)
        except Exception as error:  # Optimum's lazy imports raise RuntimeError too
            raise ModuleNotFoundError(
                f"`backend={self.backend!r}` needs {module}, which does not import here ({str(error).strip()}). "
                f"transformers is {version('transformers')}, huggingface_hub {version('huggingface_hub')}. "
                f"{WORKING[self.backend]}"
            ) from error

    def check_fits(self, place: str | Path, folder: Path, files: Collection[str]) -> None:
        """Raise if the encoder in a folder cannot be loaded like this.

        Args:
            place: The name of the model, for error messages.
            folder: Folder with the ``modules.json`` of the encoder, if it has one.
            files: All files of the encoder.

        Raises:
            ValueError: if no module of the encoder has a backend, or the file that ``model_kwargs`` names is missing.
        """
        if self.backend == TORCH and not self.model_kwargs:
            return
        kinds = [kind.rsplit(".", 1)[-1] for kind in _modules_of(folder)]
        if kinds and not any(kind.endswith("Transformer") for kind in kinds):
            given = f"model_kwargs={dict(self.model_kwargs or {})}" if self.backend == TORCH else f"{self.backend!r}"
            name = "model_kwargs" if self.backend == TORCH else "backend"
            raise ValueError(
                f"`{name}` must be left out for {place}, got {given}: its encoder consists of {', '.join(kinds)}, and "
                "only a Transformer has a backend and such arguments."
            )
        arguments = self.model_kwargs or {}
        wanted = arguments.get("file_name")
        if self.backend == TORCH or wanted is None or arguments.get("export"):
            return
        root = PurePosixPath(arguments.get("subfolder") or "")
        if not {(root / wanted).as_posix(), (root / self.backend / wanted).as_posix()} & set(files):
            there = [name for name in files if PurePosixPath(name).suffix == MAIN[self.backend]]
            raise ValueError(f"`file_name` is {wanted!r}, which {place} does not have; it has {_listed(there)}.")

    def load(self, name: str, **settings: Any) -> SentenceTransformer:
        """Load an encoder with sentence-transformers.

        Raises:
            ValueError: if no module of the encoder uses the backend.
            Exception: if the loaders of sentence-transformers raise it.
        """
        arguments = None if self.model_kwargs is None else dict(self.model_kwargs)
        if self.backend == "onnx" and self.device is not None:  # it takes the device from its provider alone
            provider = "CPUExecutionProvider" if self.device == "cpu" else "CUDAExecutionProvider"
            arguments = {"provider": provider, **(arguments or {})}
        settings |= {"device": self.device, "backend": self.backend, "model_kwargs": arguments}
        encoder = SentenceTransformer(name, **settings)
        used = {getattr(module, "backend", None) for module in encoder.children() for module in module.modules()}
        if self.backend != TORCH and self.backend not in used:
            raise ValueError(f"no module uses `backend={self.backend!r}`")
        return encoder


def backend_of(name: str) -> str | None:
    """Return the backend, other than torch, that a file of an encoder belongs to.

    >>> backend_of("onnx/model_qint8_avx512.onnx")
    'onnx'
    >>> backend_of("openvino/openvino_model.bin")
    'openvino'
    >>> backend_of("model.safetensors"), backend_of("openvino/pytorch_model.bin")
    (None, None)
    """
    return next((backend for backend, names in NAMES.items() if names.fullmatch(name)), None)


def read_by(backend: str, files: Iterable[str]) -> list[str]:
    """Return the files without those of other backends.

    >>> read_by("torch", ["model.safetensors", "onnx/model.onnx"])
    ['model.safetensors']
    """
    return [name for name in files if backend_of(name) in (None, backend)]


def check_trainable(encoder: nn.Module | None) -> None:
    """Raise ``ValueError`` if an encoder has no weights that torch could train."""
    if (backend := getattr(encoder, "backend", TORCH)) != TORCH:
        raise ValueError(
            f"the encoder was loaded with `backend={backend!r}`, which only predicts: there are no weights to train. "
            "Load it with `backend='torch'`."
        )


def _modules_of(folder: Path) -> Iterator[str]:
    """Yield the classes of the modules of an encoder, and of those in a router."""
    if not (folder / "modules.json").is_file():
        return
    for module in json.loads((folder / "modules.json").read_text(encoding="utf-8")):
        yield module["type"]
        router = folder / module["path"] / "router_config.json"
        if router.is_file():
            yield from json.loads(router.read_text(encoding="utf-8"))["types"].values()


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "none"
