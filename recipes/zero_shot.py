"""Add labels by text that training never saw, and measure how well they are found among the others.

python recipes/zero_shot.py --data recipes/data/wordnet-hypernyms --output_dir runs/zero_shot

The new labels are those that no training query has. If they are less than a hundredth of the positives of the test
queries, a tenth of all labels is hidden instead: they are removed from the queries, and training queries without other
labels are dropped. Training sees no text of a new label. `XMCModel.add_labels` adds them afterwards, and they compete
with the seen labels as in `predict`. The model is compared with its plain scores, BM25, the encoder before training,
and pretrained encoders. Writes `zero_shot.json`, and prints it as a table.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import auc
from torch.nn.functional import normalize
from transformers import set_seed

from hf_xmc import Hierarchy, LabelIndex, TopK, XMCData, XMCModel, XMCTrainingArguments, load_xmc, with_phrases
from hf_xmc.cli import HelpFormatter
from hf_xmc.data.prepared import SPLITS
from hf_xmc.experiment.defaults import validation_size
from hf_xmc.experiment.encoders import build_encoder, plain
from hf_xmc.experiment.fit import fit
from hf_xmc.experiment.measure import add_memory, calibrate
from hf_xmc.experiment.options import parse
from hf_xmc.experiment.run import write_json
from hf_xmc.experiment.settings import ExperimentSettings
from hf_xmc.experiment.splits import has_labels, hold_out
from hf_xmc.metrics.calibration import expected_calibration_error, scores_and_hits
from hf_xmc.metrics.ranking import evaluate_ranking
from hf_xmc.model.own_votes import overlap_expected

Search = Callable[..., TopK]
RECIPE = Path(__file__).with_name("static.yaml")
RARE = 50  # maximum number of training queries of a rare label, before it was hidden
HIDDEN = 0.1  # fraction of the labels to hide
FEW = 0.01  # with fewer of the positives of test, labels without training queries do not suffice
PLACES = 10
FIRST = 5  # whose probabilities are measured
RESAMPLES = 1000
OURS, SCORES = "this model", "its scores, without probabilities"
PARENTS, ANCESTORS = "with the words of parents", "with the words of all ancestors"
COLUMNS = {
    "rare new R@10": f"new labels that at most {RARE} training queries had, among all labels, on test queries with one",
    "new R@10": "all new labels, likewise",
    "seen P@1": "seen labels among all labels, on test queries with one",
    "seen P@5": "the same",
    "seen R@10": "the same",
    "harmonic mean": "of seen R@10 and rare new R@10",
    "area": "under the curve of these two, as a bonus for new labels goes from none to all ten places",
    "rare new R@10, alone": "rare new labels ranked among the new ones",
    "ECE@5": "expected calibration error of the probabilities of the first five labels",
    "new per text": "new labels among the ten, a number per test query",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", required=True, help="folder in any layout that load_xmc reads")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="output folder; an existing model in it is not trained again"
    )
    parser.add_argument(
        "--share",
        type=float,
        help="fraction of the labels to hide; 0 hides none, and labels without training queries are the new ones "
        f"(default: 0 if they are at least {FEW:g} of the positives of test, else {HIDDEN})",
    )
    parser.add_argument("--hide_seed", type=int, default=0)
    parser.add_argument(
        "--encoders", nargs="*", default=[], help="pretrained sentence-transformers models to compare with"
    )
    parser.add_argument("--encoder_length", type=int, help="maximum number of tokens that these encoders read")
    parser.add_argument(
        "--hierarchy", type=Path, help="file of broader labels for `Hierarchy.read`, to measure `parents` too"
    )
    parser.add_argument(
        "--reserve", type=int, nargs="*", default=[], help="numbers of the ten places to reserve for new labels"
    )
    parser.add_argument("--num_queries", type=int, help="test queries to measure seen labels on (default: all)")
    parser.add_argument("train_flags", nargs="*", help="after `--`: flags of train.py, such as --num_train_epochs 1")
    options = parser.parse_args()
    where = ["--data", options.data, "--output_dir", str(options.output_dir)]
    settings, args, given = parse([str(RECIPE), *where, *options.train_flags])

    full = load_xmc(options.data)
    if len(full.labels) > full.num_labels:
        raise ValueError(f"{options.data} must have one text per label, but some labels have several.")
    share = share_to_hide(full) if options.share is None else options.share
    new = hidden_labels(full, share, options.hide_seed) if share else np.flatnonzero(full.label_counts() == 0)
    num_seen = full.num_labels - len(new)
    if not 0 < num_seen < full.num_labels:
        raise SystemExit(
            f"--share must leave some of the {full.num_labels} labels and make some new, got {share}, which makes "
            f"{len(new)} new."
        )
    full = with_labels(full, np.concatenate([np.setdiff1d(np.arange(full.num_labels), new), new]))
    known = hold_out(with_labels(full, np.arange(num_seen)), validation_size(settings, full))

    folder = options.output_dir / "model"
    if not folder.exists():
        options.output_dir.mkdir(parents=True, exist_ok=True)
        trained(settings, args, given, known, folder)
    if not has_labels(full, "test"):
        print("there are no test queries with labels, so nothing is measured.")
        return
    model = XMCModel.from_pretrained(folder)
    if model.calibration is None and known.validation is not None:  # an older model
        with overlap_expected():
            calibrate(model, known)
    queries = Queries.of(full, num_seen, options.num_queries)
    untrained = plain(build_encoder(settings, with_phrases(known), args.seed), settings)
    encoders = {"the encoder before training": untrained}
    encoders |= {Path(name).name: pretrained(name, options.encoder_length) for name in options.encoders}
    hierarchy = None if options.hierarchy is None else Hierarchy.read(options.hierarchy)
    report = {"num_train": len(known.train), "num_hidden": len(new) if share else 0}
    report |= compared(model, full, num_seen, queries, encoders, hierarchy, options.reserve)
    write_json(options.output_dir / "zero_shot.json", report)
    print(table(report))


def share_to_hide(data: XMCData) -> float:
    """Return no share if labels without training queries are enough of the positives of test, else a tenth."""
    positives = np.asarray(data.relevance("test").sum(0)).ravel() if has_labels(data, "test") else np.zeros(1)
    enough = positives.sum() and positives[data.label_counts() == 0].sum() >= FEW * positives.sum()
    return 0.0 if enough else HIDDEN


def hidden_labels(data: XMCData, share: float, seed: int) -> np.ndarray:
    """Return a share of the labels, drawn at random, in ascending order."""
    order = np.random.default_rng(seed).permutation(data.num_labels)
    return np.sort(order[data.num_labels - round(share * data.num_labels) :])


def pretrained(name: str, length: int | None) -> SentenceTransformer:
    encoder = SentenceTransformer(name)
    if length is not None:
        encoder.max_seq_length = length
    return encoder


def compared(
    model: XMCModel,
    data: XMCData,
    num_seen: int,
    queries: "Queries",
    encoders: dict[str, SentenceTransformer],
    hierarchy: Hierarchy | None = None,
    reserve: Sequence[int] = (),
) -> dict[str, Any]:
    """Add the labels after the first ``num_seen`` ones to a model that was trained on these, and return the report."""
    groups, excluded = (np.arange(num_seen), np.arange(num_seen, data.num_labels)), queries.excluded
    added = data.labels.select(groups[1])
    own = partial(model.search, queries.texts, PLACES, exclude=excluded)
    calibrated = model.calibration is not None
    model.add_labels(added)
    seen, new = (own(allow=group, probabilities=calibrated) for group in groups)
    alone = queries.precision(seen, groups[0])
    best = own(probabilities=calibrated)
    lists, probabilities = {OURS: (seen, new, best), SCORES: (seen, new, own())}, {OURS: best}
    reserved = {f"with {number} places reserved": number for number in reserve if calibrated}
    for name, number in reserved.items():
        probabilities[name] = own(probabilities=True, new=number)
        lists[name] = (seen, new, probabilities[name])
    above = {} if hierarchy is None else {PARENTS: hierarchy.parents, ANCESTORS: hierarchy.ancestors}
    known = set(data.labels["uid"])
    for name, of in above.items():
        model.remove_labels(added["uid"])
        parents = [[one for one in of.get(uid, []) if one in known] for uid in added["uid"]]
        model.add_labels(added, parents=parents)
        probabilities[name] = own(probabilities=calibrated)
        lists[name] = (seen, own(allow=groups[1], probabilities=calibrated), probabilities[name])
    texts = data.labels["text"][:]
    searches: dict[str, Search] = {"BM25": BM25(texts).search}
    searches |= {name: cosine_search(encoder, texts, queries.texts) for name, encoder in encoders.items()}
    for name, search in searches.items():
        ours, others = (search(queries.texts, PLACES, exclude=excluded, allow=group) for group in groups)
        lists[name] = (ours, others, merged(ours, others, 0.0))
    systems = {name: queries.figures(*found, num_seen) for name, found in lists.items()}
    for name in (SCORES, *reserved):
        for column in ("area", "rare new R@10, alone"):
            systems[name].pop(column, None)  # those of the model
    report = {
        "rare_new_among_all": {"R@10": systems[OURS].get("rare new R@10")},
        "seen": {name: systems[OURS][f"seen {name}"] for name in alone},
        "seen_without_new_labels": alone,
        "bm25": {"rare_new_among_all": {"R@10": systems["BM25"].get("rare new R@10")}},
        "num_new": len(added),
        "num_seen": num_seen,
        "num_queries": queries.numbers(num_seen),
        "systems": systems,
        "columns": COLUMNS,
    }
    if calibrated:
        for name, found in probabilities.items():
            systems[name]["ECE@5"] = queries.errors(found).mean
        report["calibration"] = {
            "ECE@5": queries.errors(best)._asdict(),
            "ECE@5 without new labels": queries.errors(seen)._asdict(),
            "new labels in ten": queries.probabilities_of(best, num_seen),
        }
    return report


def with_labels(data: XMCData, chosen: np.ndarray) -> XMCData:
    """Return the data with these labels only, in this order, without training queries that have none of them."""
    new_id = np.full(data.num_labels, -1)
    new_id[chosen] = np.arange(len(chosen))
    splits, pairs = {}, {}
    for name in (name for name in SPLITS if getattr(data, name) is not None):
        split = data.split(name)
        label_ids = [[int(new_id[label]) for label in ids if new_id[label] >= 0] for ids in split["label_ids"]]
        rows = [row for row, ids in enumerate(label_ids) if ids or name != "train"]
        texts = split.select(rows)["text"]
        splits[name] = Dataset.from_dict({"text": list(texts), "label_ids": [label_ids[row] for row in rows]})
        place = np.full(len(split), -1)
        place[rows] = np.arange(len(rows))
        old = data.filter_pairs.get(name, np.empty((0, 2), np.int64))
        new = np.stack([place[old[:, 0]], new_id[old[:, 1]]], axis=1)
        pairs[name] = new[(new >= 0).all(1)]
    return replace(data, labels=data.labels.select(chosen), filter_pairs=pairs, **splits)


def trained(
    settings: ExperimentSettings, args: XMCTrainingArguments, given: frozenset[str], known: XMCData, folder: Path
) -> None:
    """Train and save a model, and save it again with its memory and calibration."""
    set_seed(args.seed)
    fitted = fit(settings, args, known, given=given)
    encoder = plain(fitted.trainer.model, fitted.settings)
    model = XMCModel(encoder, known.labels, label_vectors=fitted.vectors)
    model.save_pretrained(folder)
    add_memory(model, known, settings)
    if known.validation is not None:
        model.remember(known.validation)
        with overlap_expected():
            calibrate(model, known)
    model.save_pretrained(folder)


class Error(NamedTuple):
    """A calibration error, and the ends of the interval with 95 % of its values on samples of the queries."""

    mean: float
    low: float
    high: float


class Queries(NamedTuple):
    """Test queries, their positives, and the labels of each group that are rare or not."""

    texts: list[str]
    relevance: sp.csr_array  # (N, L)
    excluded: np.ndarray  # (M, 2) filter pairs
    rare: np.ndarray  # (L,)
    measured: np.ndarray  # (N,), whether seen labels are measured on the query

    @classmethod
    def of(cls, data: XMCData, num_seen: int, number: int | None = None) -> "Queries":
        """Return the test queries; with a number, evenly spaced ones and those with a rare new label."""
        relevance, rare = data.relevance("test"), data.label_counts() <= RARE
        wanted = rare & (np.arange(data.num_labels) >= num_seen)
        size = len(data.test)
        measured = np.zeros(size, bool)
        measured[np.unique(np.linspace(0, size - 1, min(size, number or size)).astype(int))] = True
        rows = np.flatnonzero(measured | ((relevance @ wanted.astype(np.float32)) > 0))
        place = np.full(size, -1)
        place[rows] = np.arange(len(rows))
        pairs = data.filter_pairs.get("test", np.empty((0, 2), np.int64))
        excluded = np.stack([place[pairs[:, 0]], pairs[:, 1]], axis=1)
        texts = list(data.test.select(rows)["text"])
        return cls(texts, relevance[rows], excluded[excluded[:, 0] >= 0], rare, measured[rows])

    def of_group(self, group: np.ndarray, everywhere: bool = False) -> tuple[np.ndarray, sp.csr_array]:
        """Return the rows of the queries with a label in a mask, and their positives in it."""
        wanted = sp.csr_array(self.relevance @ sp.diags_array(group.astype(np.float32)))
        wanted.eliminate_zeros()
        rows = np.flatnonzero((np.diff(wanted.indptr) > 0) & (self.measured | everywhere))
        return rows, wanted[rows]

    def precision(self, found: TopK, group: np.ndarray) -> dict[str, float]:
        """Return P@1 and P@5 of some labels."""
        rows, wanted = self.of_group(np.isin(np.arange(self.relevance.shape[1]), group))
        metrics = evaluate_ranking(found.label_ids[rows], wanted, p_at=[1, 5], recall_at=[], ndcg_at=[])
        return {name: metrics[name] for name in ("P@1", "P@5")}

    def recall(self, found: TopK, group: np.ndarray, everywhere: bool = False) -> float | None:
        """Return R@10 of the labels in a mask, ``None`` if no query has one."""
        rows, wanted = self.of_group(group, everywhere)
        if not len(rows):
            return None
        return evaluate_ranking(found.label_ids[rows], wanted, p_at=[], recall_at=[PLACES], ndcg_at=[])["R@10"]

    def numbers(self, num_seen: int) -> dict[str, int]:
        new = np.arange(len(self.rare)) >= num_seen
        groups = {"rare new": (new & self.rare, True), "new": (new, False), "seen": (~new, False)}
        return {name: len(self.of_group(*group)[0]) for name, group in groups.items()}

    def figures(self, seen: TopK, new: TopK, best: TopK, num_seen: int) -> dict[str, float]:
        """Return the columns of :data:`COLUMNS`; those of labels without queries are left out.

        Args:
            seen, new: ``(N, 10)``, the best labels of each kind.
            best: ``(N, 10)``, the best of all labels.
            num_seen: The number of seen labels, which come first.
        """
        hidden = np.arange(len(self.rare)) >= num_seen
        rare = hidden & self.rare
        metrics: dict[str, float | None] = {
            "rare new R@10": self.recall(best, rare, True),
            "new R@10": self.recall(best, hidden),
            **{f"seen {name}": value for name, value in self.precision(best, np.arange(num_seen)).items()},
            "seen R@10": self.recall(best, ~hidden),
            "rare new R@10, alone": self.recall(new, rare, True),
            "new per text": float((best.label_ids >= num_seen).sum(1)[self.measured].mean()),
        }
        if (one := metrics["seen R@10"]) is not None and (other := metrics["rare new R@10"]) is not None:
            metrics["harmonic mean"] = 2 * one * other / max(one + other, 1e-12)
            metrics["area"] = self.area(seen, new, ~hidden, rare)
        return {name: value for name, value in metrics.items() if value is not None}

    def errors(self, found: TopK) -> Error:
        """Return ECE@5 of probabilities, on the queries on which seen labels are measured."""
        rows = np.flatnonzero(self.measured)
        label_ids, probabilities = (part[rows, :FIRST] for part in found)
        hits = self.relevance[rows[:, None], np.maximum(label_ids, 0)].toarray() > 0
        rng, errors = np.random.default_rng(0), []
        for drawn in (np.arange(len(rows)), *rng.integers(0, len(rows), (RESAMPLES, len(rows)))):
            kept = label_ids[drawn] >= 0
            errors.append(expected_calibration_error(probabilities[drawn][kept], hits[drawn][kept]))
        return Error(errors[0], *np.quantile(errors[1:], [0.025, 0.975]).tolist())

    def probabilities_of(self, found: TopK, num_seen: int) -> dict[str, float]:
        """Compare the probabilities of new labels among the ten with the fraction that are right."""
        rows = np.flatnonzero(self.measured)
        label_ids, scores = (part[rows] for part in found)
        new = TopK(np.where(label_ids >= num_seen, label_ids, -1), scores)
        probabilities, hits = scores_and_hits(new, self.relevance[rows])
        if not len(hits):
            return {"number": 0}
        error = expected_calibration_error(probabilities, hits)
        return {
            "number": len(hits),
            "probability": float(probabilities.mean()),
            "right": float(hits.mean()),
            "ECE": error,
        }

    def area(self, seen: TopK, new: TopK, of_seen: np.ndarray, of_new: np.ndarray) -> float:
        """Return the area under the curve of the recalls of both kinds, as a bonus for new labels grows."""
        some = slice(None, None, max(1, len(self.texts) // 1000))
        with np.errstate(invalid="ignore"):
            gaps = seen.scores[some, :, None] - new.scores[some, None, :]
        gaps = gaps[np.isfinite(gaps)]
        steps = np.quantile(gaps, np.linspace(0, 1, 31)) if len(gaps) else []
        points = [
            (self.recall(best, of_seen) or 0.0, self.recall(best, of_new, True) or 0.0)
            for best in (merged(seen, new, bonus) for bonus in (-np.inf, *steps, np.inf))
        ]
        x, y = np.array(points).T
        return float(auc(x, y) + x[-1] * y[-1])  # the curve starts on the axis


def merged(seen: TopK, new: TopK, bonus: float) -> TopK:
    """Return the ten best labels of both kinds, with a bonus on the scores of new labels."""
    bonuses = np.repeat([0, bonus], [seen.scores.shape[1], new.scores.shape[1]])
    label_ids, scores = (np.concatenate(parts, axis=1) for parts in zip(seen, new, strict=True))
    with np.errstate(invalid="ignore"):
        keys = np.where(label_ids < 0, -np.inf, scores + bonuses)
    order = np.lexsort((-scores, label_ids < 0, -keys), axis=1)[:, :PLACES]
    return TopK(np.take_along_axis(label_ids, order, axis=1), np.take_along_axis(keys, order, axis=1))


class BM25:
    """BM25 with labels as documents, without English stop words (Robertson and Zaragoza, The Probabilistic Relevance
    Framework, 2009), and with Lucene's idf, which is never negative."""

    def __init__(self, labels: list[str], k1: float = 1.5, b: float = 0.75) -> None:
        self.words = CountVectorizer(stop_words="english")
        counts = sp.csr_array(self.words.fit_transform(labels), dtype=np.float32)  # (L, V)
        length, num_with = counts.sum(1), np.bincount(counts.indices, minlength=counts.shape[1])
        row = np.repeat(np.arange(len(labels)), np.diff(counts.indptr))
        counts.data /= counts.data + k1 * (1 - b + b * length / length.mean())[row]
        counts.data *= np.log1p((len(labels) - num_with + 0.5) / (num_with + 0.5))[counts.indices]
        self.weights = sp.csc_array(counts.T)

    def search(self, texts: list[str], k: int, *, exclude: np.ndarray, allow: np.ndarray | None = None) -> TopK:
        allow = np.arange(self.weights.shape[1]) if allow is None else allow
        left_out = sp.csr_array((np.ones(len(exclude)), exclude.T), shape=(len(texts), self.weights.shape[1]))
        weights, found = sp.csr_array(self.weights[:, allow]), []
        for start in range(0, len(texts), 512):
            block = slice(start, start + 512)
            scores = (sp.csr_array(self.words.transform(texts[block])) @ weights).toarray()
            scores[left_out[block][:, allow].toarray() > 0] = -np.inf
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            found.append((allow[best], np.take_along_axis(scores, best, axis=1)))
        label_ids, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
        short = ((0, 0), (0, k - label_ids.shape[1]))
        return TopK(np.pad(label_ids, short, constant_values=-1), np.pad(scores, short, constant_values=-np.inf))


def cosine_search(encoder: SentenceTransformer, labels: list[str], queries: list[str]) -> Callable[..., TopK]:
    embed = partial(encoder.encode, convert_to_tensor=True, batch_size=256)
    index, embedded = LabelIndex(normalize(embed(labels).float()).cpu()), embed(queries).cpu()
    row_of = {text: row for row, text in enumerate(queries)}
    return lambda texts, k, **choices: index.search(embedded[[row_of[text] for text in texts]], k, **choices)


def table(report: dict) -> str:
    """Return the results as a Markdown table, in percent but for the last column."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, metrics in report["systems"].items():
        percent = {name: value if name == "new per text" else 100 * value for name, value in metrics.items()}
        cells = (f"{percent[column]:.2f}" if column in percent else "-" for column in COLUMNS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
