"""Labels that training never saw: a share is hidden, added by text afterwards, and found beside those that were seen.

python recipes/zero_shot.py --data recipes/data/wordnet-hypernyms --output_dir runs/zero_shot

Training knows neither the hidden labels nor their texts; their ids are taken from the queries, and a query that has no
other is dropped. `XMCModel.add_labels` adds them afterwards. Beside the model stand BM25, the encoder before training,
and encoders taken as they are. Writes `zero_shot.json`, and prints it as a table.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import train
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sklearn.feature_extraction.text import CountVectorizer
from torch.nn.functional import normalize
from transformers import set_seed

from hf_xmc import LabelIndex, TopK, XMCData, XMCModel, load_xmc, with_phrases
from hf_xmc.cli import HelpFormatter
from hf_xmc.data.prepared import SPLITS
from hf_xmc.metrics.ranking import evaluate_ranking

RECIPE = Path(__file__).with_name("static.yaml")
RARE = 50  # training queries of a label, before it was hidden
COLUMNS = {
    "hidden P@1": "hidden labels, ranked among themselves, on the test queries that have one",
    "hidden R@10": "the same",
    "rare P@1": f"hidden labels of at most {RARE} training queries, ranked among themselves, on the queries of one",
    "rare R@10": "the same",
    "rare R@10, all": "the same labels and queries, ranked among all labels, seen ones too",
    "rare R@100, all": "the same",
    "seen P@1": "seen labels, ranked among themselves, on the test queries that have one",
    "seen R@10": "the same",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", required=True, help="a folder in any layout that load_xmc reads")
    parser.add_argument("--output_dir", type=Path, required=True, help="a model that is there is not trained anew")
    parser.add_argument("--share", type=float, default=0.1, help="of the labels that are hidden")
    parser.add_argument("--hide_seed", type=int, default=0)
    parser.add_argument("--encoders", nargs="*", default=[], help="sentence-transformers models, taken as they are")
    parser.add_argument("train_flags", nargs="*", help="after `--`: flags of train.py, such as --num_train_epochs 1")
    options = parser.parse_args()
    where = ["--data", options.data, "--output_dir", str(options.output_dir)]
    recipe, args = train.parse([str(RECIPE), *where, *options.train_flags])

    full = load_xmc(options.data)
    if len(full.labels) > full.num_labels:
        raise ValueError(f"{options.data} has several texts for a label; this comparison needs one text per label.")
    order = np.random.default_rng(options.hide_seed).permutation(full.num_labels)
    num_seen = full.num_labels - round(options.share * full.num_labels)
    if not 0 < num_seen < full.num_labels:
        raise SystemExit(f"--share must hide some of {full.num_labels} labels and leave some, got {options.share}.")
    full = with_labels(full, np.concatenate([np.sort(order[:num_seen]), np.sort(order[num_seen:])]))
    known = train.hold_out(with_labels(full, np.arange(num_seen)), recipe.validation_size)

    folder = options.output_dir / "model"
    if not folder.exists():
        options.output_dir.mkdir(parents=True, exist_ok=True)
        trained(recipe, args, known, folder)
    if not train.has_labels(full, "test"):
        print("there are no test queries with labels: nothing is measured.")
        return
    model = XMCModel.from_pretrained(folder)
    if model.memory is None:
        print(f"{folder} holds a model without a memory: only its labels are searched. Delete it to train it again.")
    new = full.labels.select(range(num_seen, full.num_labels))
    model.add_labels(new)
    one_length = XMCModel.from_pretrained(folder)
    one_length.memory = None
    one_length.add_labels(new, length=float(one_length.index.embeddings.norm(dim=1).median()))
    memory, texts, queries = model.memory, list(full.labels["text"]), list(full.test["text"])

    def without_memory(*arguments, **choices) -> TopK:
        model.memory = None
        found = model.search(*arguments, **choices)
        model.memory = memory
        return found

    untrained = train.plain(train.build_encoder(recipe, with_phrases(known), args.seed), recipe)
    systems = {
        "labels and memory": model.search,
        "labels": without_memory,
        "labels, the hidden ones at one length": one_length.search,
        "BM25": BM25(texts).search,
        "the encoder before training": cosine_search(untrained, texts, queries),
    }
    systems |= {name: cosine_search(SentenceTransformer(name), texts, queries) for name in options.encoders}
    report = {"num_hidden": full.num_labels - num_seen, "num_seen": num_seen, "num_train": len(known.train)}
    report["systems"] = {name: measured(search, full, num_seen) for name, search in systems.items()}
    train.write_json(options.output_dir / "zero_shot.json", {**report, "columns": COLUMNS})
    print(table(report))


def with_labels(data: XMCData, chosen: np.ndarray) -> XMCData:
    """These labels alone, in this order; a training query that has none of them is dropped."""
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


def trained(recipe: train.RecipeArguments, args: train.XMCTrainingArguments, known: XMCData, folder: Path) -> None:
    """Train a model and save it, again once it has its memory."""
    set_seed(args.seed)
    trainer, _ = train.fit(recipe, args, known)
    model = XMCModel(train.plain(trainer.model, recipe), known.labels)
    model.save_pretrained(folder)
    train.add_memory(model, known, recipe)
    if known.validation is not None:
        model.remember(known.validation)
    model.save_pretrained(folder)


def measured(search: Callable[..., TopK], data: XMCData, num_seen: int) -> dict[str, float]:
    """Return what :data:`COLUMNS` describes, for a function like :meth:`XMCModel.search`.

    Groups of labels that no query has are left out.
    """
    relevance, pairs = data.relevance("test"), data.filter_pairs.get("test", np.empty((0, 2), np.int64))
    hidden = np.arange(data.num_labels) >= num_seen
    rare = hidden & (data.label_counts() <= RARE)
    metrics: dict[str, float] = {}
    for name, group, deep in (("hidden", hidden, False), ("rare", rare, True), ("seen", ~hidden, False)):
        wanted = sp.csr_array(relevance @ sp.diags_array(group.astype(np.float32)))
        wanted.eliminate_zeros()
        rows = np.flatnonzero(np.diff(wanted.indptr))
        metrics[f"{name} queries"] = len(rows)
        if not len(rows):
            continue
        texts = list(data.test.select(rows)["text"])
        place = np.full(len(data.test), -1)
        place[rows] = np.arange(len(rows))
        here = np.stack([place[pairs[:, 0]], pairs[:, 1]], axis=1)
        here = here[here[:, 0] >= 0]
        best = search(texts, 10, exclude=here, allow=np.flatnonzero(group)).label_ids
        reached = evaluate_ranking(best, wanted[rows], p_at=[1], recall_at=[10], ndcg_at=[])
        metrics |= {f"{name} {at}": reached[at] for at in ("P@1", "R@10")}
        if deep:
            best = search(texts, 100, exclude=here).label_ids
            reached = evaluate_ranking(best, wanted[rows], p_at=[1], recall_at=[10, 100], ndcg_at=[])
            metrics |= {f"{name} {at}, all": reached[at] for at in ("R@10", "R@100")}
    return metrics


class BM25:
    """Labels as documents, English stop words left out (Robertson and Zaragoza, The Probabilistic Relevance Framework,
    2009; the idf of Lucene, which is never negative)."""

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
    """Markdown, in percent."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, metrics in report["systems"].items():
        cells = (f"{100 * metrics[column]:.2f}" if column in metrics else "-" for column in COLUMNS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
