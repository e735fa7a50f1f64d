"""The least time that a loss can take on a device, from its arithmetic and its memory traffic."""

from __future__ import annotations

from typing import NamedTuple


class Peak(NamedTuple):
    """Peaks of a device: dense products in TFLOP/s by precision of their factors, and memory in GB/s."""

    float32: float  # a third of the peak of TF32, since a product as exact as float32 takes three
    bfloat16: float
    gigabytes: float


PEAKS = {  # from the data sheets, without sparsity; the first name that is part of that of the device
    "A100-SXM4-80GB": Peak(52, 312, 2039),
    "A100 80GB": Peak(52, 312, 1935),
    "A100": Peak(52, 312, 1555),
    "H100 PCIe": Peak(126, 756, 2000),
    "H100": Peak(165, 989, 3350),
    "H200": Peak(165, 989, 4800),
}


def peak_of(name: str) -> Peak | None:
    """Return the peaks of the device with this name, or ``None`` if they are not listed."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def least_seconds(batch_size: int, num_labels: int, dim: int, is_half: bool, peak: Peak) -> float:
    """Return the least time of a loss and its gradients, of float32 embeddings.

    Three products take ``6 * B * L * D`` operations. Queries and labels are read once, and their gradients are written
    once. ``is_half`` says that the products of the gradients, two of the three, have bfloat16 factors.
    """
    product = 2e-12 * batch_size * num_labels * dim  # in TFLOP
    arithmetic = product / peak.float32 + 2 * product / (peak.bfloat16 if is_half else peak.float32)
    traffic = 2 * 4e-9 * (batch_size + num_labels) * dim / peak.gigabytes
    return max(arithmetic, traffic)
