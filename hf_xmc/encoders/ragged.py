"""Store features of texts without padding, and build padded batches of any of the texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_xmc.encoders.forward import Features

SINGLE = (str, int, float, tuple, type(None))  # a feature of one of these types is the same for all texts


class RaggedFeatures(NamedTuple):
    """Features of texts without their padding: one list of tokens for each text."""

    offsets: np.ndarray  # (L + 1,), start of each text's tokens, and the end
    of_tokens: dict[str, np.ndarray]  # feature name -> one value per token of all texts
    of_texts: dict[str, np.ndarray]  # feature name -> one value per text
    constant: Features  # features that are the same for every text, such as the route
    fill: dict[str, Any]  # feature name -> padding value
    dtypes: dict[str, torch.dtype]
    flat: bool  # whether texts follow each other in one row, as for StaticEmbedding
    left: bool  # whether padding comes first

    @classmethod
    def of(cls, features: Features) -> RaggedFeatures | None:
        """Return the features of a batch without padding, or ``None`` if they have an unknown form."""
        tensors = {name: value for name, value in features.items() if isinstance(value, Tensor)}
        constant = {name: value for name, value in features.items() if name not in tensors}
        if not all(isinstance(value, SINGLE) for value in constant.values()):
            return None
        dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        if tensors.keys() == {"input_ids", "offsets"}:
            offsets = np.append(tensors["offsets"].numpy(), len(tensors["input_ids"]))
            return cls(offsets, {"input_ids": _small(tensors["input_ids"])}, {}, constant, {}, dtypes, True, False)
        mask = tensors.pop("attention_mask", None)
        if mask is None or mask.ndim != 2:
            return None
        real = mask.bool()
        aligned = {name: tensor for name, tensor in tensors.items() if tensor.shape == mask.shape}
        of_texts = {name: tensor for name, tensor in tensors.items() if tensor.shape == mask.shape[:1]}
        if len(aligned) + len(of_texts) < len(tensors) or not aligned:
            return None
        return cls(
            np.append(0, real.sum(1).numpy().cumsum()),
            {name: _small(tensor[real]) for name, tensor in aligned.items()},
            {name: tensor.numpy() for name, tensor in of_texts.items()},
            constant,
            {name: tensor[~real][0].item() for name, tensor in aligned.items() if not real.all()},
            dtypes,
            False,
            bool((real.any(1) & ~real[:, :1].any(1)).any()),
        )

    @classmethod
    def joined(cls, parts: Sequence[RaggedFeatures | None]) -> RaggedFeatures | None:
        """Return the features of several batches as one, or ``None`` if their forms differ."""
        same = [part for part in parts if part is not None]
        first = same[0] if same else None
        if first is None or len(same) < len(parts):
            return None
        if any((part.constant, part.dtypes, part.flat) != (first.constant, first.dtypes, first.flat) for part in same):
            return None
        lengths = np.concatenate([np.diff(part.offsets) for part in same])
        return cls(
            np.append(0, lengths.cumsum()),
            {name: np.concatenate([part.of_tokens[name] for part in same]) for name in first.of_tokens},
            {name: np.concatenate([part.of_texts[name] for part in same]) for name in first.of_texts},
            first.constant,
            {name: value for part in same for name, value in part.fill.items()},
            first.dtypes,
            first.flat,
            any(part.left for part in same),
        )

    def features(self, rows: np.ndarray) -> Features:
        """Return the padded features of some of the texts."""
        begins, lengths = self.offsets[rows], np.diff(self.offsets)[rows]
        ends = lengths.cumsum()
        place = np.arange(lengths.sum()) - np.repeat(ends - lengths - begins, lengths)
        tokens = {
            name: torch.from_numpy(values[place].astype(np.float64 if values.dtype.kind == "f" else np.int64))
            for name, values in self.of_tokens.items()
        }
        if self.flat:
            padded = {**tokens, "offsets": torch.from_numpy(ends - lengths)}
        else:
            real = torch.arange(max(1, int(lengths.max(initial=0)))) < torch.from_numpy(lengths)[:, None]
            real = real.flip(1) if self.left else real
            padded = {"attention_mask": real}
            for name, values in tokens.items():
                padded[name] = torch.full(real.shape, self.fill.get(name, 0), dtype=values.dtype)
                padded[name].masked_scatter_(real, values)
            padded |= {name: torch.from_numpy(values[rows]) for name, values in self.of_texts.items()}
        return {**self.constant, **{name: padded[name].to(dtype) for name, dtype in self.dtypes.items()}}


def _small(tensor: Tensor) -> np.ndarray:
    """Return the values in the smallest integer type that can hold them."""
    values: np.ndarray = tensor.numpy()
    if values.dtype.kind != "i" or not values.size or values.min() < 0:
        return values
    return values.astype(np.min_scalar_type(values.max()))


def equal(these: Features, others: Features) -> bool:
    """Return whether two batches have the same features, bit for bit."""
    return these.keys() == others.keys() and all(
        isinstance(others[name], Tensor) and value.dtype == others[name].dtype and torch.equal(value, others[name])
        if isinstance(value, Tensor)
        else isinstance(value, SINGLE) and isinstance(others[name], SINGLE) and value == others[name]
        for name, value in these.items()
    )


def token_counts(features: Features, num_texts: int) -> np.ndarray:
    """Return the number of tokens of each text, counting padding that all texts have; 1 if there are no tokens."""
    mask = features.get("attention_mask")
    if "offsets" in features:
        return np.diff(features["offsets"].numpy(), append=len(features["input_ids"]))
    if mask is None or mask.ndim != 2:
        return np.ones(num_texts, np.int64)
    lengths: np.ndarray = mask.bool().sum(1).numpy()
    return lengths + mask.shape[1] - lengths.max()


def token_ids(features: Features) -> np.ndarray:
    """Return the token ids of all texts, one after another, without padding; empty if the features have no tokens."""
    ids, mask = features.get("input_ids"), features.get("attention_mask")
    if ids is None:
        return np.empty(0, np.uint8)
    return _small(ids if mask is None or mask.shape != ids.shape else ids[mask.bool()])
