"""Two experiments on random texts: one easy positive among arbitrary ones, and memorizing pairs.

    python recipes/synthetic.py easy --output_dir runs/synthetic
    python recipes/synthetic.py limits --output_dir runs/limits
    python recipes/synthetic.py pairs --output_dir runs/pairs

`easy`: a document has its own words and five labels. One label shares a word with it (easy: the text shows it), and
four are arbitrary (they must be memorized). P@1 is how often the easy label comes first. Each document is written many
times for training, each time with other words added, and once more for the test. `limits` is the same with one
change at a time. `pairs`: every query has one label, and nothing in the texts relates them.

Each experiment writes `metrics.json` with the last step of every run, and `curves.json` and `curves.png` with all
measurements. Other settings are flags, such as `--num_easy 50`.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import fill

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from transformers import HfArgumentParser, TrainerCallback, set_seed

from hf_xmc import XMCData, XMCTrainer, XMCTrainingArguments, losses, static_encoder

LOSSES = {
    "decoupled": losses.DecoupledSoftmaxLoss,
    "softmax": losses.SoftmaxLoss,
    "soft_top_5": losses.SoftTopKLoss,
}


@dataclass(frozen=True)
class Setting:
    """Texts, encoder and training of one run."""

    num_documents: int = 1000
    num_labels: int = 1000
    num_easy: int = field(default=10, metadata={"help": "Labels that share a word with their documents."})
    num_arbitrary: int = field(
        default=4, metadata={"help": "Number of positives of a document in addition to the easy one."}
    )
    num_words: int = 2000
    own_words: int = field(default=8, metadata={"help": "Number of words that identify a document."})
    other_words: int = field(default=2, metadata={"help": "Number of words drawn each time a document is written."})
    label_words: int = 4
    repeats: int = field(
        default=375,  # num_steps * batch_size / num_documents: no text is seen twice
        metadata={"help": "Number of times that a document is written for training."},
    )
    embedding_dim: int = 64
    initial_std: float = 0.3
    temperature: float = 1.0
    cosine: bool = False
    optimizer: str = field(default="sgd", metadata={"help": "`sgd`, with momentum 0.9, or `adamw`."})
    learning_rate: float = field(
        default=20.0, metadata={"help": "Initial learning rate, which falls linearly to zero."}
    )
    batch_size: int = 250
    num_steps: int = 1500


PAIRS = Setting(
    num_documents=30_000,
    num_labels=30_000,
    num_easy=0,
    num_words=20_000,
    other_words=0,
    repeats=1,
    embedding_dim=128,
    optimizer="adamw",
    learning_rate=0.1,
    batch_size=1000,
    num_steps=120,
)

LIMITS = {
    "AdamW, 0.01": {"optimizer": "adamw", "learning_rate": 0.01},
    "no other words": {"other_words": 0, "repeats": 1},
    "1 easy label": {"num_easy": 1},
    "50 easy labels": {"num_easy": 50},
    "an easy label for each document": {"num_easy": 1000, "num_labels": 2000},
}


@dataclass
class Options:
    experiment: str = field(metadata={"help": "`easy`, `limits` or `pairs`."})
    output_dir: Path = field(metadata={"help": "Folder for metrics, curves and the plot."})
    losses: list[str] = field(default_factory=lambda: ["decoupled", "softmax"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    points: int = field(default=15, metadata={"help": "Number of measurements in a run."})


def main(argv: list[str]) -> None:
    parser = HfArgumentParser((Options, Setting))
    if argv and argv[0] == "pairs":
        parser.set_defaults(**vars(PAIRS), losses=["decoupled"], seeds=[0], points=8)
    if argv and argv[0] == "limits":
        parser.set_defaults(seeds=[0])
    options, setting = parser.parse_args_into_dataclasses(["--experiment", *argv])
    cases = LIMITS if options.experiment == "limits" else {"": {}}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[list[dict]]] = {}
    for case, changes in cases.items():
        for seed in options.seeds:
            changed = replace(setting, **changes)
            data = make_data(changed, seed)
            for loss in options.losses:
                start = time.perf_counter()
                curve = train(changed, data, loss, seed, max(1, changed.num_steps // options.points))
                name = f"{case}: {loss}" if case else loss
                curves.setdefault(name, []).append(curve)
                print(f"{name}, seed {seed}, {time.perf_counter() - start:.0f} s", flush=True)
                print(table(curve), flush=True)
    metrics = {name: summary(runs) for name, runs in curves.items()}
    for name, found in (("metrics", metrics), ("curves", curves)):
        (options.output_dir / f"{name}.json").write_text(json.dumps(found, indent=1))
    plot(curves, options.output_dir / "curves.png")
    print(json.dumps(metrics, indent=1))


def make_data(setting: Setting, seed: int) -> XMCData:
    """Make documents of random words. The easy label, if any, is the first label of a document.

    Train and test are the same documents with different words added. Validation documents are new, and only their easy
    label can be predicted.
    """
    rng = np.random.default_rng(seed)
    words = random_words(rng, setting.num_words + setting.num_easy)
    shared, words = words[: setting.num_easy], words[setting.num_easy :]
    label_texts = rng.choice(words, (setting.num_labels, setting.label_words))
    label_texts[: setting.num_easy, 0] = shared
    labels = Dataset.from_dict({"text": [" ".join(row) for row in label_texts]})

    def documents() -> tuple[np.ndarray, np.ndarray]:
        own = rng.choice(words, (setting.num_documents, setting.own_words))
        if not setting.num_easy:
            return own, rng.permutation(setting.num_labels)[: setting.num_documents, None]
        easy = np.arange(setting.num_documents) % setting.num_easy
        others = range(setting.num_easy, setting.num_labels)
        arbitrary = [rng.choice(others, setting.num_arbitrary, replace=False) for _ in easy]
        return np.column_stack([shared[easy], own]), np.column_stack([easy, arbitrary])

    def written(own: np.ndarray, label_ids: np.ndarray, times: int = 1) -> Dataset:
        texts = np.tile(own, (times, 1))
        texts = np.concatenate([texts, rng.choice(words, (len(texts), setting.other_words))], axis=1)
        return Dataset.from_dict(
            {"text": [" ".join(row) for row in texts], "label_ids": np.tile(label_ids, (times, 1))}
        )

    known = documents()
    return XMCData(
        train=written(*known, setting.repeats),
        test=written(*known),  # the same as in training if no words are added
        validation=written(*documents()) if setting.num_easy else None,
        labels=labels,
    )


def random_words(rng: np.random.Generator, number: int) -> np.ndarray:
    """Return different words of six random letters."""
    words: set[str] = set()
    while len(words) < number:
        words.update(row.tobytes().decode() for row in rng.integers(97, 123, (number, 6), dtype=np.uint8))
    return rng.permutation(sorted(words))[:number]


def train(setting: Setting, data: XMCData, loss: str, seed: int, every: int) -> list[dict]:
    """Train once, and return the curve."""
    set_seed(seed)
    texts = [*data.train["text"][:], *data.labels["text"][:]]
    encoder = static_encoder(
        texts, embedding_dim=setting.embedding_dim, vocab_size=200_000, std=setting.initial_std, seed=seed
    )
    if setting.cosine:
        encoder.append(Normalize())
    sgd = torch.optim.SGD(encoder.parameters(), lr=setting.learning_rate, momentum=0.9)
    args = XMCTrainingArguments(
        "runs/synthetic",
        per_device_train_batch_size=setting.batch_size,
        max_steps=setting.num_steps,
        learning_rate=setting.learning_rate,
        max_grad_norm=0.0,  # no clipping
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    curve = Curve(data, setting.temperature, every)
    XMCTrainer(
        encoder,
        args,
        data.train,
        labels=data.labels,
        loss=LOSSES[loss](temperature=setting.temperature),
        optimizers=(sgd if setting.optimizer == "sgd" else None, None),
        callbacks=[curve],
    ).train()
    return curve.points


class Curve(TrainerCallback):
    """Measure at regular steps and at the end: known documents with new words (test), as trained, and new ones."""

    def __init__(self, data: XMCData, temperature: float, every: int) -> None:
        splits = {"": data.test, "train ": data.train, "new ": data.validation}
        self.splits = {name: split.select(range(min(2000, len(split)))) for name, split in splits.items() if split}
        self.labels, self.temperature, self.every = data.labels, temperature, every
        self.points: list[dict] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        point = {"step": state.global_step}
        for name, split in self.splits.items():
            found = measure(model, split, self.labels, self.temperature)
            point |= {name + metric: value for metric, value in found.items() if name != "new " or metric == "P@1"}
        self.points.append(point)


def measure(encoder: SentenceTransformer, queries: Dataset, labels: Dataset, temperature: float) -> dict[str, float]:
    """Return P@1 of the first positive, P@k of all k positives, and the softmax of easy and arbitrary positives."""
    embedded = encoder.encode_document(labels["text"], convert_to_tensor=True, batch_size=1000)
    totals = sum(_totals(encoder, queries[rows], embedded, temperature) for rows in _slices(len(queries)))
    first, found, easy, arbitrary = (totals / len(queries)).tolist()
    num_positives = len(queries[0]["label_ids"])
    more = {f"P@{num_positives}": found, "easy": easy, "arbitrary": arbitrary} if num_positives > 1 else {}
    return {"P@1": first, **more}


def _slices(number: int, size: int = 1000) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, number, size))


def _totals(encoder: SentenceTransformer, rows: dict, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    scores = encoder.encode_query(rows["text"], convert_to_tensor=True, batch_size=1000) @ labels.T / temperature
    positives = torch.as_tensor(np.asarray(rows["label_ids"]), device=scores.device)
    top = scores.topk(positives.shape[1]).indices
    found = (top[:, :, None] == positives[:, None]).any(2).double().mean(1)
    share = scores.softmax(1).gather(1, positives).double()
    first = (top[:, 0] == positives[:, 0]).double()
    return torch.stack([first.sum(), found.sum(), share[:, 0].sum(), share[:, 1:].mean(1).sum()])


def summary(runs: list[list[dict]]) -> dict:
    """Return the means of the last steps over the seeds, and P@1 for each seed."""
    last = [run[-1] for run in runs]
    return {name: float(np.mean([point[name] for point in last])) for name in last[0]} | {
        "P@1 by seed": [point["P@1"] for point in last]
    }


def table(curve: list[dict]) -> str:
    lines = [" ".join(f"{name:>15}" for name in curve[0])]
    for point in curve:
        values = [f"{v:15d}" if isinstance(v, int) else f"{v:15.3f}" for v in point.values()]
        lines.append(" ".join(values))
    return "\n".join(lines)


def plot(curves: dict[str, list[list[dict]]], path: Path) -> None:
    """Draw a panel for each metric, with a column for each case if there are several."""
    from hf_xmc.experiment.plots import COLORS, legend, panels, style

    first = next(iter(curves.values()))[0][0]
    wanted = {
        "P@1": "P@1, easy first, %" if "easy" in first else "P@1, %",
        "P@5": "P@5, %",
        "easy": "softmax of the\neasy positive, %",
        "arbitrary": "softmax of an\narbitrary one, %",
    }
    metrics = [metric for metric in wanted if metric in first]
    cases = list(dict.fromkeys(name.rpartition(": ")[0] for name in curves))
    losses = list(dict.fromkeys(name.rpartition(": ")[2] for name in curves))
    alone = len(cases) == 1
    with style():
        shape = (-(-len(metrics) // 2), min(2, len(metrics))) if alone else (len(metrics), len(cases))
        figure, axes = panels(*shape, size=(3.1, 2.4) if alone else (2.3, 1.7), sharex=True, sharey=True)
        for row, metric in enumerate(metrics):
            for column, case in enumerate(cases):
                axis = axes.flat[row] if alone else axes[row, column]
                for loss, color in zip(losses, COLORS, strict=False):
                    for run in curves.get(f"{case}: {loss}" if case else loss, []):
                        steps, values = [point["step"] for point in run], [100 * point[metric] for point in run]
                        axis.plot(steps, values, color=color, label=loss)
                axis.set(ylim=(-4, 104))
                if alone:
                    axis.set(title=wanted[metric].replace("\n", " "), xlabel="steps")
                    continue
                axis.set(xlabel="steps" if row == len(metrics) - 1 else "")
                axis.set_title(fill(case, 20) if row == 0 else "", fontsize=10)
                axis.set_ylabel(wanted[metric] if column == 0 else "", fontsize=9)
        legend(figure)
        figure.savefig(path)


if __name__ == "__main__":
    main(sys.argv[1:])
