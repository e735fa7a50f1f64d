"""Check the Triton kernels on the first use of a device, a precision and a dimension."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_xmc.losses.streaming import score_blocks
from hf_xmc.losses.streaming.score_blocks import ScoreBlock, ScoreBuffers

if TYPE_CHECKING:
    from hf_xmc.losses.streaming.triton_blocks import Case

logger = logging.getLogger(__name__)

ROWS, EXTRA_COLUMNS = 131, 965  # of the problem, which has one whole chunk of labels and these
SCALE, SPLITS = 1.4427, 3
VALUE_ERROR, GRADIENT_ERROR = 1e-4, 1e-3


@cache
def kernels_work(device: torch.device, dtypes: tuple[torch.dtype, torch.dtype], dim: int) -> bool:
    """Return whether the kernels compile and give the results of plain torch. If they do not, a warning says why.

    Each tile is compiled, and computes the log-sum-exp of a small problem with masked positives and its gradients. The
    reference is plain torch in float64. Tiles that need more memory than the device has are left out.

    Args:
        device: Where to check.
        dtypes: Precision of queries and labels. Queries are float32 unless both are of the same half precision.
        dim: Dimension of the embeddings.

    Example:
        >>> import os  # a CPU has no device for them, but perhaps Triton's interpreter
        >>> works = kernels_work(torch.device("cpu"), (torch.float32, torch.float32), 8)
        >>> works == (os.environ.get("TRITON_INTERPRET") == "1")
        True
    """
    try:
        from hf_xmc.losses.streaming.triton_blocks import Case

        wrong = _largest_error(Case(device, dtypes, dim))
    except Exception as error:  # of a compiler, a driver or a missing one, which have no common type
        first_line = (str(error).strip() or "no message").splitlines()[0]
        _warn(f"The Triton kernels do not run on {device} ({type(error).__name__}: {first_line})")
        return False
    if wrong is not None:
        _warn(f"The Triton kernels give other results than plain torch on {device} ({wrong})")
    return wrong is None


@cache
def _warn(reason: str) -> None:
    logger.warning("%s, so losses run in plain torch, which is exact and slower.", reason)


def _largest_error(case: Case) -> str | None:
    """Return a description of the first tile whose results are wrong, or ``None``."""
    from hf_xmc.losses.streaming.triton_blocks import OutOfResources, TritonBlock, refused

    generator = torch.Generator().manual_seed(0)
    num_columns = score_blocks.CHUNK + EXTRA_COLUMNS
    given = 3 * torch.randn(ROWS, case.dim, generator=generator) / case.dim**0.5
    given, labels = given.to(case.device, case.dtypes[0]), torch.randn(num_columns, case.dim, generator=generator)
    labels = labels.to(case.device, case.dtypes[1])
    queries = SCALE * given.float()
    # The best label of each query, and the labels next to the ends of tiles.
    rows = torch.arange(ROWS, device=case.device).repeat(2)
    columns = torch.cat([(queries @ labels.float().T).argmax(1), rows[:ROWS] * (num_columns - 1) // (ROWS - 1)])

    exact = ScoreBlock(queries.double(), labels, None, ScoreBuffers(ROWS, queries.double(), labels, None))
    exact.mask_(rows, columns)
    expected = _results(exact)
    buffers, tried = ScoreBuffers(ROWS, queries, labels, None), 0
    for tile in case.tiles:
        block = TritonBlock(queries, labels, None, buffers, tile, SPLITS)
        block.unscaled = (given, SCALE) if case.is_half else None
        block.mask_(rows, columns)
        try:
            got = _results(block)
        except OutOfResources:
            refused.add((case, tile))
            continue
        tried += 1
        for name, one, other in zip(("value", "gradient of queries", "gradient of labels"), got, expected, strict=True):
            error = float((one - other).norm() / other.norm())
            if not error <= (VALUE_ERROR if name == "value" else GRADIENT_ERROR):
                return f"{name}: relative error {error:.0e} with {tile}"
    if not tried:
        raise RuntimeError("no tile fits into the shared memory of the device")
    return None


def _results(block: ScoreBlock) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-sum-exp of each query in float64, to the base of 2, and the gradients of their sum."""
    top, total = block.max_and_sum()
    parts = [(derivative * factor).double() for _, derivative, factor in block.exponentials(top)]
    share = torch.cat(parts, dim=1) / total.double()
    value = top.double() + total.double().log2()
    return value, share @ block.labels.double(), share.T @ block.queries.double()
