"""A linear classifier of each label, kept in further dimensions of a static encoder."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import Tensor, nn

from hf_xmc.data.dataset import relevance_of
from hf_xmc.encoders.roles import prompt_of

WEIGHT = 10.0  # of the classifiers in the scores
FEATURE_NORM = 2.0  # mean over the queries: the larger, the less the norm of a classifier counts next to its errors
SHARE = 0.01  # of the further dimensions in the norm of a query, so that cosines hardly change
SMALLEST = 1e-12


class Classifiers(NamedTuple):
    """Linear classifiers of ``L`` labels."""

    weights: np.ndarray  # (V, L)
    biases: np.ndarray  # (L,)


def can_hold_classifiers(encoder: SentenceTransformer) -> bool:
    """Return whether :func:`add_classifiers` knows the form of an encoder."""
    return len(encoder) == 1 and isinstance(encoder[0], StaticEmbedding) and encoder.truncate_dim is None


def add_classifiers(
    encoder: SentenceTransformer, queries: Dataset, num_labels: int, vectors: Tensor | None = None
) -> Tensor:
    r"""Fit a linear classifier of each label, and add its scores to those of the encoder.

    With few training queries, both together are better than the encoder alone. The score of label :math:`l` for the
    query :math:`q` with the tokens :math:`t_1 \ldots t_n` becomes

    .. math:: f(q) \cdot y_l + \frac{10}{n} \sum_i \big(1 + b_l + w_{t_i l}\big)

    where :math:`w_l` and :math:`b_l` are those of :func:`fit_classifiers`, and the sum leaves out unknown tokens. Most
    queries without the label gain about 0, like any query for a label that no training query has, or for a new label.

    Embeddings get ``L`` further dimensions, one for each label. They are small in embeddings of texts and large in the
    vectors of labels. So cosines, and the scores of labels without a classifier, hardly change.

    Args:
        encoder: An encoder with :func:`can_hold_classifiers`, whose vectors of tokens are replaced by longer ones.
        queries: The training queries, as the encoder reads them. All positives count equally.
        num_labels: Number of labels, ``L``.
        vectors: ``(L, D)``, the vectors of the labels; ``None`` for none.

    Returns:
        The longer vectors of the labels, ``(L, D + L)``.
    """
    assert can_hold_classifiers(encoder)
    static: Any = encoder[0]
    table = static.embedding.weight.detach().cpu().float()  # (V, D)
    known = table.any(1).numpy()
    prompt = prompt_of(encoder, "query") or ""
    shares = token_shares(static, [prompt + text for text in queries["text"]]) @ sp.diags_array(
        known.astype(np.float64)
    )
    weights, biases = fit_classifiers(shares, relevance_of(queries, num_labels))
    scores = known[:, None] * (1 + biases + weights)  # (V, L)
    scale = SHARE * _mean_norm(shares @ table.numpy()) / max(SMALLEST, _mean_norm(shares @ scores))
    longer = torch.cat([table, torch.from_numpy(scale * scores).float()], dim=1).to(static.embedding.weight)
    static.embedding = nn.EmbeddingBag.from_pretrained(longer, freeze=False)
    static.embedding_dim = longer.shape[1]
    own = torch.zeros(num_labels, table.shape[1]) if vectors is None else vectors
    return torch.cat([own, torch.eye(num_labels).to(own) * (WEIGHT / max(SMALLEST, scale))], dim=1)


def token_shares(static: StaticEmbedding, texts: list[str]) -> sp.csr_array:
    """Return the share of each token in each text, ``(N, V)``."""
    tokens = [read.ids for read in static.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    sizes = np.array([len(ids) for ids in tokens])
    rows = np.repeat(np.arange(len(texts)), sizes)
    columns = np.concatenate(tokens).astype(np.int32)
    shares = sp.coo_array((1 / sizes[rows], (rows.astype(np.int32), columns)), (len(texts), static.num_embeddings))
    return shares.tocsr()


def fit_classifiers(shares: sp.csr_array, relevance: sp.csr_array) -> Classifiers:
    r"""Return a support vector machine for each label, of the texts with the label against all others.

    The features are the shares of tokens in a text, multiplied by

    .. math:: c \, \Big(1 + \ln \frac{1 + N}{1 + n_t}\Big)

    if :math:`n_t` of the :math:`N` texts have token :math:`t`. The factor :math:`c` makes their mean norm 2. A label
    that no text has gets weights of 0 and a bias of -1, and one that all texts have gets a bias of 1. (Squared hinge
    loss as in Fan et al., LIBLINEAR, JMLR 2008; Salton & Buckley, Term-weighting approaches, 1988.)

    Args:
        shares: ``(N, V)``, the share of each token in each text.
        relevance: ``(N, L)``, whose stored entries are the labels of the texts.

    Returns:
        Weights and biases for the shares of tokens.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    num_texts, num_tokens = shares.shape
    counts = np.bincount(shares.indices[shares.data > 0], minlength=num_tokens)
    rarity = 1 + np.log((1 + num_texts) / (1 + counts))
    rarity *= FEATURE_NORM / max(SMALLEST, _mean_norm(shares @ sp.diags_array(rarity)))
    features = sp.csr_matrix(shares @ sp.diags_array(rarity))
    features.indices, features.indptr = features.indices.astype(np.int32), features.indptr.astype(np.int32)
    targets = relevance.tocsc()
    weights = np.zeros((num_tokens, relevance.shape[1]), dtype=np.float32)
    biases = np.full(relevance.shape[1], -1.0)
    for label, (start, end) in enumerate(zip(targets.indptr[:-1], targets.indptr[1:], strict=True)):
        positive = np.zeros(num_texts, dtype=bool)
        positive[targets.indices[start:end]] = True
        if positive.all():
            biases[label] = 1
        elif positive.any():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # more steps change the scores by little
                machine = LinearSVC(dual=True, random_state=0).fit(features, positive)
            weights[:, label], biases[label] = machine.coef_[0] * rarity, machine.intercept_[0]
    return Classifiers(weights, biases)


def _mean_norm(rows: Any) -> float:
    """Return the mean Euclidean norm of the rows of a matrix, which may be sparse."""
    squares = rows.multiply(rows).sum(1) if sp.issparse(rows) else (rows**2).sum(1)
    return float(np.sqrt(squares).mean())
