"""A sentence-transformers evaluator that searches for the labels of queries and computes ranking metrics."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from datasets import Dataset
from numpy.typing import ArrayLike
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import Tensor

from hf_xmc.data.columns import strings_of
from hf_xmc.data.dataset import XMCData, relevance_of
from hf_xmc.data.labels import LabelTexts
from hf_xmc.data.named import NamedRows, Vocabulary, named_queries
from hf_xmc.data.numbering import check_filter_pairs
from hf_xmc.encoders.encode import encode_labels, encode_queries
from hf_xmc.metrics.cells import binarize
from hf_xmc.metrics.frequency import PROPENSITY_PRESETS, inverse_propensity
from hf_xmc.metrics.ranking import check_k, evaluate_ranking
from hf_xmc.search.exact import LabelIndex, of_recognised
from hf_xmc.search.grouped import label_index
from hf_xmc.topk import TopK

logger = logging.getLogger(__name__)


class ExtremeMultilabelClassificationEvaluator(BaseEvaluator):
    """Evaluator of P@k, nDCG@k and R@k on queries with known labels, by exact search. Its short name is XMCEvaluator.

    Use it as ``evaluator=`` of any sentence-transformers trainer. The metrics appear in the model card under the task
    "Extreme Multilabel Classification".

    Args:
        texts: ``N`` queries.
        relevance: Sparse ``(N, L)`` matrix of positives, or a list of label names or uids for each query.
        labels: ``L`` label texts, or a data set with a column ``text`` and optionally ``uid``. Rows with the same
            ``uid`` are texts of one label, which gets the score of its best text.
        filter_pairs: ``(M, 2)`` pairs (row, label id) to leave out of the predictions.
        inverse_propensity: ``(L,)`` inverse propensities, which add PSP@k, PSnDCG@k and PSR@k.
        name: Prefix of the names of the metrics.
        primary_metric: Metric by which a trainer compares checkpoints; by default P@5, or the first metric if there is
            no P@5.
        p_at, ndcg_at, recall_at: Values of k for each metric.
        batch_size: Number of texts to encode at a time.
        label_vectors: ``(L, D)``, added to the embeddings of labels: ``trainer.label_vectors()``. A trainer with the
            argument ``label_vectors`` adds them by itself.
        write_csv: Whether to append the metrics of each call to ``csv_file`` in ``output_path``.

    Attributes:
        metric_names: Names of the metrics, without the prefix.

    Raises:
        ValueError: if the shapes of the arguments do not match, no query has a positive, a k is not a whole number of
            at least 1, or ``primary_metric`` is not one of the metrics.
    """

    def __init__(
        self,
        texts: Sequence[str],
        relevance: sp.csr_array | Sequence[Sequence[str]],
        labels: Sequence[str] | Dataset,
        *,
        filter_pairs: np.ndarray | None = None,
        inverse_propensity: ArrayLike | None = None,
        name: str = "",
        primary_metric: str | None = None,
        p_at: Sequence[int] = (1, 3, 5),
        ndcg_at: Sequence[int] = (5,),
        recall_at: Sequence[int] = (10, 100),
        batch_size: int = 1024,
        label_vectors: Tensor | None = None,
        write_csv: bool = True,
    ) -> None:
        super().__init__()
        texts = strings_of(texts, "a list of query texts", "query")
        self.table, _ = LabelTexts.of(labels)
        cells: sp.csr_array = relevance
        if not sp.issparse(relevance):
            named = NamedRows(texts, relevance, "queries, row {}".format)
            cells = relevance_of(named_queries(named, Vocabulary.of(labels)), len(self.table))
        if cells.shape != (len(texts), len(self.table)):
            raise ValueError(
                f"`relevance` must have shape ({len(texts)}, {len(self.table)}), with a row per query and a column per "
                f"label, got {cells.shape}."
            )
        if filter_pairs is not None:
            check_filter_pairs(np.asarray(filter_pairs), len(texts), len(self.table), "filter_pairs")
        self.texts, self.relevance, self.labels = texts, cells, labels
        self.filter_pairs, self.inverse_propensity = filter_pairs, inverse_propensity
        self.name, self.batch_size, self.label_vectors = name, batch_size, label_vectors
        self.p_at, self.ndcg_at, self.recall_at = p_at, ndcg_at, recall_at
        for k in [*p_at, *ndcg_at, *recall_at]:
            check_k(k)
        self.max_k = max([*p_at, *ndcg_at, *recall_at])
        self.metric_names = self._check_metrics()
        self.primary_metric = primary_metric or ("P@5" if "P@5" in self.metric_names else self.metric_names[0])
        if self.primary_metric not in self.metric_names:
            raise ValueError(f"`primary_metric` must be one of {', '.join(self.metric_names)}, got {primary_metric!r}.")
        self.write_csv = write_csv
        suffix = re.sub(r"[/\\]", "_", name and f"_{name}")  # a name may be a repository, org/data
        self.csv_file = f"Extreme-Multilabel-Classification_evaluation{suffix}_results.csv"

    def _check_metrics(self) -> list[str]:
        """Return the names of all metrics, after computing them for one query without predictions."""
        positives = binarize(self.relevance)
        row = np.flatnonzero(np.diff(positives.indptr))[:1]
        if not len(row):
            raise ValueError("`relevance` must have a positive for at least one query, got none.")
        return [name for name in self._score(np.full((1, self.max_k), -1), positives[row]) if "@" in name]

    @classmethod
    def from_data(
        cls, data: XMCData, split: str, *, propensity: str = "default", **kwargs: Any
    ) -> ExtremeMultilabelClassificationEvaluator:
        """Make an evaluator for a split, with its filter pairs and with propensities from the training queries.

        Args:
            data: Data set.
            split: Name of the split to evaluate on.
            propensity: Preset of A and B, see :data:`hf_xmc.metrics.frequency.PROPENSITY_PRESETS`.
            kwargs: Further arguments of the class.

        Raises:
            ValueError: if the split or preset does not exist, or if the class refuses an argument.
        """
        if propensity not in PROPENSITY_PRESETS:
            raise ValueError(f"`propensity` must be one of {', '.join(PROPENSITY_PRESETS)}, got {propensity!r}.")
        a, b = PROPENSITY_PRESETS[propensity]
        return cls(
            data.split(split)["text"][:],
            data.relevance(split),
            data.labels,
            filter_pairs=data.filter_pairs.get(split),
            inverse_propensity=inverse_propensity(data.label_counts(), len(data.train), a, b),
            **kwargs,
        )

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        metrics = self.score(self.predict(model))
        if output_path is not None and self.write_csv:
            self._append_to_csv(Path(output_path), {"epoch": epoch, "steps": steps, **metrics})
        metrics = self.prefix_name_to_metrics(metrics, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)  # type: ignore[arg-type]
        return metrics

    def _append_to_csv(self, folder: Path, row: dict[str, float]) -> None:
        """Append a row to the first file whose header has the same columns, or start a new file."""
        folder.mkdir(parents=True, exist_ok=True)
        header = ",".join(row)
        for number in count(1):
            path = folder / (self.csv_file if number == 1 else f"{Path(self.csv_file).stem}-{number}.csv")
            new = not path.exists()
            if new or path.read_text(encoding="utf-8").partition("\n")[0] == header:
                break
            logger.info("%s and %s have different columns, so the metrics are written to another file.", path, header)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{header}\n" * new + ",".join(map(str, row.values())) + "\n")

    def predict(self, model: SentenceTransformer) -> TopK:
        """Return the best labels of every query, without filter pairs; a query that embeds to zero has no label."""
        vectors = None if self.label_vectors is None else self.label_vectors[torch.from_numpy(self.table.label_of)]
        labels = encode_labels(model, self.table.texts["text"], self.batch_size, vectors).float().cpu()
        queries = encode_queries(model, self.texts, self.batch_size).float().cpu()
        found = label_index(LabelIndex(labels), self.table).search(queries, self.max_k, exclude=self.filter_pairs)
        return of_recognised(found, queries)

    def score(self, predictions: TopK) -> dict[str, float]:
        return self._score(predictions.label_ids, self.relevance)

    def _score(self, label_ids: np.ndarray, relevance: sp.csr_array) -> dict[str, float]:
        return evaluate_ranking(
            label_ids,
            relevance,
            inverse_propensity=self.inverse_propensity,
            p_at=self.p_at,
            ndcg_at=self.ndcg_at,
            recall_at=self.recall_at,
        )

    def get_config_dict(self) -> dict[str, Any]:
        return {"num_queries": len(self.texts), "num_labels": len(self.table)}


# sentence-transformers takes the task name in the card from the class name, hence the long name.
XMCEvaluator = ExtremeMultilabelClassificationEvaluator
