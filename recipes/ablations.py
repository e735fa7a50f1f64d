"""Train with one change that was tried for `static.yaml` and rejected, and for which `train.py` has no flag.

    python recipes/ablations.py words_masked recipes/static.yaml --data recipes/data/wordnet-hypernyms \
        --output_dir runs/words_masked --validation_size 0.05 --embedding_dim 128 --num_train_epochs 4

The first argument names the change, and the other arguments are those of `train.py`; `no_change` is the baseline. The
last line has the metrics on validation queries: P@1, P@5, PSP@5, R@10 and R@100 of the labels, and the first four with
the memory. A dash marks a metric that was not measured, for example without validation queries.
"""

import json
import string
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from sentence_transformers import SentenceTransformer

from hf_xmc import XMCData, load_xmc, losses
from hf_xmc.experiment.encoders import build_encoder
from hf_xmc.experiment.options import parse
from hf_xmc.experiment.run import run
from hf_xmc.experiment.settings import ExperimentSettings

METRICS = ("P@1", "P@5", "PSP@5", "R@10", "R@100")


class Halves(losses.DecoupledSoftmaxLoss):
    """The mean of the decoupled softmax and another loss."""

    def __init__(self, temperature: float, other: torch.nn.Module) -> None:
        super().__init__(temperature)
        self.other = other

    def forward(self, *args, **kwargs):
        return (super().forward(*args, **kwargs) + self.other(*args, **kwargs)) / 2


def half_softmax(settings: ExperimentSettings) -> Halves:
    return Halves(settings.temperature, losses.SoftmaxLoss(settings.temperature))


def half_soft_top_5(settings: ExperimentSettings) -> Halves:
    return Halves(settings.temperature, losses.SoftTopKLoss(k=5, temperature=settings.temperature))


def words_masked(encoder: SentenceTransformer) -> SentenceTransformer:
    """Replace a fifth of the tokens of queries and labels by the unknown token in training."""

    def mask(module: torch.nn.Module, inputs: tuple) -> tuple:
        ids, *rest = inputs
        return (torch.where(torch.rand(ids.shape) < 0.2, 0, ids) if module.training else ids, *rest)

    encoder[0].embedding.register_forward_pre_hook(mask)
    return encoder


def label_texts_as_queries(data: XMCData) -> XMCData:
    """Add each label's text to the training queries."""
    more = Dataset.from_dict(
        {"text": data.labels["text"][:], "label_ids": [[label] for label in data.label_of.tolist()]}
    )
    kept = data.train.select_columns(["text", "label_ids"])
    return replace(data, train=concatenate_datasets([kept, more.cast(kept.features)]))


def no_punctuation(data: XMCData) -> XMCData:
    spaces = str.maketrans(dict.fromkeys(string.punctuation, " "))

    def strip(table: Dataset | None) -> Dataset | None:
        return table and table.map(lambda row: {"text": row["text"].translate(spaces)})

    return replace(data, **{name: strip(getattr(data, name)) for name in ("labels", "train", "validation", "test")})


def after(function: Callable, change: Callable) -> Callable:
    return lambda *args: change(function(*args))


CHANGES: dict[str, dict[str, Callable]] = {  # arguments of `run` and their values; `change_data` is applied first
    "no_change": {},
    "words_masked": {"build_encoder": after(build_encoder, words_masked)},
    "no_punctuation": {"change_data": no_punctuation},
    # Only for the encoder: the memory holds the original training queries.
    "label_texts_as_queries": {"augment": label_texts_as_queries},
    "half_softmax": {"build_loss": half_softmax},
    "half_soft_top_5": {"build_loss": half_soft_top_5},
}


def main(name: str, argv: list[str]) -> None:
    settings, args, given = parse(argv)
    changes = dict(CHANGES[name])
    data = changes.pop("change_data", lambda data: data)(load_xmc(settings.data))
    run(settings, args, data, given=given, **changes)
    output_dir = Path(args.output_dir)
    history = json.loads((output_dir / "history.json").read_text())
    settings = json.loads((output_dir / "metrics.json").read_text()).get("memory_settings", {})
    labels = next((entry for entry in reversed(history) if "eval_P@1" in entry), {})
    shown = [labels.get(f"eval_{metric}") for metric in METRICS]
    shown += [settings.get("validation", {}).get(metric) for metric in METRICS[:-1]]
    print(f"| {name} | {' | '.join('-' if value is None else f'{100 * value:.1f}' for value in shown)} |")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in CHANGES:
        raise SystemExit(f"the first argument must be one of {', '.join(CHANGES)}.")
    main(sys.argv[1], sys.argv[2:])
