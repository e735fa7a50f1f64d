"""Simple baselines on the same data: frequent labels, similar texts and Omikuji."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from hf_xmc.data.dataset import XMCData
from hf_xmc.metrics.ranking import evaluate_ranking
from hf_xmc.search.equal_rows import best_of_rows

logger = logging.getLogger(__name__)

DEEP = 120  # labels to predict for a text, before filter pairs are removed
NEIGHBORS = 20
CELLS = 2**24  # of a dense block of similarities or votes
MAX_PAIRS = 4e9  # pairs of a text and a training text; with more, similar texts take too long
MOST_FREQUENT, SIMILAR_TEXTS, OMIKUJI = "most frequent labels", "most similar training texts", "Omikuji Parabel"


def measure_baselines(
    data: XMCData, split: str, inverse_propensity: np.ndarray | None = None
) -> dict[str, dict[str, float]]:
    """Return the metrics of each baseline on a split, as fractions; filter pairs are left out.

    ``most frequent labels`` predicts the same labels for every text. ``most similar training texts`` lets the 20
    nearest neighbors vote, in tf-idf of words and pairs of words. ``Omikuji Parabel`` is measured if the package
    ``omikuji`` is installed. The last two are skipped, with a warning, if the data are too large for them.

    Args:
        data: The data; baselines are fitted on ``data.train``.
        split: The split to measure.
        inverse_propensity: ``(L,)``, for PSP@k.
    """
    texts, relevance = data.split(split)["text"][:], data.relevance(split)
    frequent = np.argsort(-data.label_counts(), kind="stable")[:DEEP]
    found = {MOST_FREQUENT: np.tile(frequent, (len(texts), 1))}
    if len(texts) * len(data.train) > MAX_PAIRS:
        logger.warning("The data are too large for the other baselines, so only frequent labels are measured.")
    elif features := tfidf(data.train["text"][:], texts):
        known, asked = features
        found[SIMILAR_TEXTS] = neighbors(known, data.relevance("train"), asked, NEIGHBORS)
        if has_omikuji():
            found[OMIKUJI] = omikuji_trees(known, data, asked, {})
    pairs = data.filter_pairs.get(split)
    return {
        name: evaluate_ranking(_padded(label_ids), relevance, inverse_propensity=inverse_propensity, filter_pairs=pairs)
        for name, label_ids in found.items()
    }


def has_omikuji() -> bool:
    """Return whether Omikuji is installed. If it is but cannot be imported, a warning says why."""
    if find_spec("omikuji") is None:
        return False
    try:
        import omikuji  # noqa: F401
    except ImportError as error:
        logger.warning("Omikuji is installed but not measured, because its import fails: %s", error)
        return False
    return True


def _padded(label_ids: np.ndarray) -> np.ndarray:
    """Return ``(N, 120)`` labels, padded with -1, because a metric needs at least k of them."""
    return np.pad(label_ids, ((0, 0), (0, DEEP - label_ids.shape[1])), constant_values=-1)


def tfidf(train: list[str], texts: list[str]) -> tuple[sp.csr_matrix, sp.csr_matrix] | None:
    """Return tf-idf features of words and pairs of words, or ``None`` if no word occurs in two training texts."""
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2, dtype=np.float32)
    try:
        return vectorizer.fit_transform(train), vectorizer.transform(texts)
    except ValueError as error:  # few or very short texts
        logger.warning("The training texts have no words for tf-idf: %s", error)
        return None


def neighbors(known: sp.csr_matrix, relevance: sp.csr_array, asked: sp.csr_matrix, number: int) -> np.ndarray:
    """Return the labels with the most votes of similar training texts, weighted by squared cosines.

    Returns:
        ``(N, 120)``, padded with -1.
    """
    number = min(number, known.shape[0])
    step = max(1, CELLS // max(known.shape[0], relevance.shape[1]))

    def of_block(start: int) -> np.ndarray:
        similar = (asked[start : start + step] @ known.T).toarray()
        cosines, nearest = (part.numpy() for part in torch.from_numpy(similar).topk(number))
        weights = cosines**2
        offsets = np.arange(len(nearest) + 1) * number
        votes = sp.csr_array((weights.ravel(), nearest.ravel(), offsets), shape=similar.shape) @ relevance
        votes.eliminate_zeros()  # a text without a known word has no neighbor
        cells = votes.tocoo()
        places, label_ids = cells.coords
        return best_of_rows(places, label_ids, cells.data, len(nearest), DEEP)[0]

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # scipy and numpy let them run at the same time
        return np.concatenate([*threads.map(of_block, range(0, asked.shape[0], step))])


def omikuji_trees(known: sp.csr_matrix, data: XMCData, asked: sp.csr_matrix, settings: Mapping[str, Any]) -> np.ndarray:
    """Return the labels ``(N, 120)`` of three trees of Omikuji, searched with a beam of 64.

    Args:
        known: Features of the training texts.
        data: The data, with the labels of the training texts.
        asked: Features of the ``N`` texts to label.
        settings: Hyperparameters of Omikuji that differ from its defaults, which are those of Parabel.
    """
    import omikuji

    parameters = omikuji.Model.default_hyper_param()
    for name, value in settings.items():
        setattr(parameters, name, value)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.txt"
        with path.open("w") as file:
            file.write(f"{known.shape[0]} {known.shape[1]} {data.num_labels}\n")
            for row, label_ids in enumerate(data.train["label_ids"]):
                features = _cells(known, row) or [(0, 1e-6)]  # Omikuji refuses a row without features
                cells = " ".join(f"{index}:{value:.6g}" for index, value in features)
                file.write(f"{','.join(map(str, label_ids))} {cells}\n")
        model: Any = omikuji.Model.train_on_data(str(path), parameters, n_threads=1)
    found = np.full((asked.shape[0], DEEP), -1)
    for row in range(asked.shape[0]):
        labels = [label for label, _ in model.predict(_cells(asked, row), beam_size=64, top_k=DEEP)]
        found[row, : len(labels)] = labels
    return found


def _cells(features: sp.csr_matrix, row: int) -> list[tuple[int, float]]:
    here = slice(features.indptr[row], features.indptr[row + 1])
    return sorted(zip(features.indices[here].tolist(), features.data[here].tolist(), strict=True))
