r"""The losses of :mod:`hf_xmc.losses.functional` from embeddings, without storing the ``B x L`` score matrix.

Each function takes ``queries`` ``(B, D)`` and ``labels`` ``(L, D)``. The score is their dot product, so divide the
queries by the temperature first. Value and gradient are exact. Scores are computed for a block of queries and a chunk
of labels at a time, within ``memory_budget`` bytes:

* By default a block of queries keeps the scores of all its labels, or their exponentials, until the gradient. This
  takes three matrix products in total.
* If the budget is too small for that, each chunk of scores is computed twice, for the sums and for the gradient. This
  takes four products and a few MB, whatever the number of labels. Soft top-k takes one more product for each pass that
  its threshold needs. BCE always takes one pass and three products.

Gradients are computed in the forward pass and returned by ``backward``, which can therefore run only once.

Precision: scores are float32 (float64 for float64), also under autocast. Labels in bfloat16 or float16 are converted
one chunk at a time. ``gradient_dtype=torch.bfloat16`` uses bfloat16 factors in the two matrix products of the
gradients. That halves the memory, with a relative error of about 2e-3 in the gradients and none in the value.
``score_dtype=torch.bfloat16`` rounds the embeddings and the result of the product of the scores, with a relative error
of about 4e-3 in a score; scores of positives stay exact. Both save time if the hardware multiplies bfloat16 fast (a
GPU, or a CPU with AMX or AVX512-BF16), and cost time on other hardware. Triton computes exact scores only.

Engine: with labels on a GPU, softmax and decoupled softmax run in Triton
(:mod:`~hf_xmc.losses.streaming.triton_blocks`), which computes the scores twice and keeps none. If queries and labels
are both bfloat16 or both float16, they are multiplied as they are and added up in float32. BCE, soft top-k, float64 and
everything on a CPU run in plain torch. The first use on a device checks the kernels against plain torch. If Triton is
not installed, if the kernels do not compile or if they give other results, a warning says so once and plain torch is
used. ``engine="torch"`` or ``engine="triton"`` overrides the choice without a check; the latter raises if Triton is not
installed.

Several texts per label: with ``text_counts``, a label has that many consecutive rows in ``labels``. Its score is
the largest of their scores, :math:`s_l = \max_{t \in T_l} \langle q, y_t \rangle`. Everything else counts labels: ids,
weights, shards and ``k``. Only the best text receives a gradient; among equal texts, the first. Such labels run in
plain torch.

Several processes: each holds all queries, all positives, and its own :class:`LabelShard` of the labels. Sums over
labels are sums over processes, and the loss is the same number on each. The gradient of ``queries`` is only the part
from the process's own labels; :func:`hf_xmc.distributed.gather_queries` sums it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hf_xmc.losses.streaming.block_losses import BCE, DecoupledSoftmax, Softmax
from hf_xmc.losses.streaming.block_soft_top_k import SoftTopK
from hf_xmc.losses.streaming.driver import Task, stream
from hf_xmc.losses.streaming.options import MEMORY_BUDGET, StreamingOptions

__all__ = [
    "MEMORY_BUDGET",
    "StreamingOptions",
    "bce_loss",
    "decoupled_softmax_loss",
    "soft_top_k_loss",
    "softmax_loss",
]

DEFAULTS = StreamingOptions()


def decoupled_softmax_loss(
    queries: Tensor,
    labels: Tensor,
    positives: Tensor,
    weights: Tensor | None = None,
    *,
    options: StreamingOptions = DEFAULTS,
) -> Tensor:
    """Return :func:`hf_xmc.losses.functional.decoupled_softmax_loss` of ``queries @ labels.T``.

    Args:
        queries: ``(B, D)``, all queries of the step, already divided by the temperature.
        labels: ``(L, D)`` labels, or the shard of this process.
        positives: ``(B, P)`` label ids, counted over all labels and padded with ``IGNORE_INDEX``.
        weights: ``(B, P)`` weight of each positive, 0 for one that is not sampled.
        options: Shard, texts per label, memory and precision.

    Raises:
        ValueError: if shapes disagree, a label id is out of range, or a weight is negative.

    >>> queries, labels = torch.zeros(1, 3), torch.zeros(4, 3)
    >>> decoupled_softmax_loss(queries, labels, torch.tensor([[0, 1]])).exp()   # 1 positive against 2 negatives
    tensor(3.)
    """
    return stream(queries, labels, Task(DecoupledSoftmax, positives, weights, options))


def softmax_loss(
    queries: Tensor,
    labels: Tensor,
    positives: Tensor,
    weights: Tensor | None = None,
    *,
    options: StreamingOptions = DEFAULTS,
) -> Tensor:
    """Return :func:`hf_xmc.losses.functional.softmax_loss` of ``queries @ labels.T``.

    Arguments and errors are those of :func:`decoupled_softmax_loss`.

    >>> softmax_loss(torch.zeros(1, 3), torch.zeros(4, 3), torch.tensor([[0, 1]])).exp()   # 1 label against all 4
    tensor(4.)
    """
    return stream(queries, labels, Task(Softmax, positives, weights, options))


def bce_loss(
    queries: Tensor,
    labels: Tensor,
    positives: Tensor,
    weights: Tensor | None = None,
    bias: Tensor | float = 0.0,
    scale: Tensor | float = 1.0,
    *,
    options: StreamingOptions = DEFAULTS,
) -> Tensor:
    """Return :func:`hf_xmc.losses.functional.bce_loss` of ``queries @ labels.T``.

    Other arguments and errors are those of :func:`decoupled_softmax_loss`.

    Args:
        bias: Number or scalar tensor that is added to each score.
        scale: Number or scalar tensor that multiplies each score before the bias is added.

    >>> bce_loss(torch.zeros(1, 3), torch.zeros(4, 3), torch.tensor([[0, 1]])).exp()
    tensor(2.)
    """
    offset = torch.as_tensor(bias, dtype=queries.dtype, device=queries.device).expand(len(queries), 1)
    return stream(scale * queries, labels, Task(BCE, positives, weights, options), offset)


def soft_top_k_loss(
    queries: Tensor,
    labels: Tensor,
    positives: Tensor,
    k: float,
    alpha: float = 1.0,
    weights: Tensor | None = None,
    *,
    options: StreamingOptions = DEFAULTS,
) -> Tensor:
    """Return :func:`hf_xmc.losses.functional.soft_top_k_loss` of ``queries @ labels.T``.

    Other arguments and errors are those of :func:`decoupled_softmax_loss`.

    Args:
        k: The prediction budget.
        alpha: Sharpness.

    >>> loss = soft_top_k_loss(torch.zeros(1, 3), torch.zeros(4, 3), torch.tensor([[0, 1]]), k=2)
    >>> loss.exp()   # each of 4 labels is selected with probability 1/2
    tensor(2.)
    """
    if not (k > 0 and alpha > 0):
        raise ValueError(f"`k` and `alpha` must be positive, got k={k} and alpha={alpha}.")
    return stream(queries, labels, Task(partial(SoftTopK, k=k, alpha=alpha), positives, weights, options))
