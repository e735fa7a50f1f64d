"""One table of the losses: module, formula on a score matrix, and the same from embeddings."""

from typing import Any, NamedTuple

from hf_xmc import losses
from hf_xmc.losses import functional, streaming


class Case(NamedTuple):
    """A loss in its three forms; ``settings`` are arguments of the two functions."""

    module: type
    dense: Any
    streamed: Any
    settings: dict[str, float]


LOSSES = {
    "decoupled": Case(
        losses.DecoupledSoftmaxLoss, functional.decoupled_softmax_loss, streaming.decoupled_softmax_loss, {}
    ),
    "softmax": Case(losses.SoftmaxLoss, functional.softmax_loss, streaming.softmax_loss, {}),
    "soft top-k": Case(losses.SoftTopKLoss, functional.soft_top_k_loss, streaming.soft_top_k_loss, {"k": 3}),
    "bce": Case(losses.BCELoss, functional.bce_loss, streaming.bce_loss, {}),
}
# A module as it is trained, and its formula of scores, positives and weights.
TRAINED = {
    "decoupled": (losses.DecoupledSoftmaxLoss(0.7), lambda s, p, w: functional.decoupled_softmax_loss(s / 0.7, p, w)),
    "softmax": (losses.SoftmaxLoss(), functional.softmax_loss),
    "soft top-k": (losses.SoftTopKLoss(k=3), lambda s, p, w: functional.soft_top_k_loss(s, p, 3, weights=w)),
    "bce": (losses.BCELoss(-3.0), lambda s, p, w: functional.bce_loss(s, p, w, bias=-3.0)),
}
