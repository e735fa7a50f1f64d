"""Estimate the cost of the recipes for the paper's data sets: hours and memory by number of GPUs.

    python recipes/paper/cost.py --tflops 100

The encoder's floating-point operations are divided by the speed of a GPU (`--tflops`, an assumption). The loss is three
matrix products, times the overhead that `benchmarks/loss.py` measured. The work of a label mode per label (4 forward
passes in `exact`, 1 + 3 per drawn label in `fresh`) predicts the time measured by `benchmarks/step.py`. Lengths of
texts in tokens are assumptions. Evaluation, mining and communication are left out.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import yaml

from hf_xmc.cli import HelpFormatter

HERE = Path(__file__).parent
LOSS_OVER_PRODUCTS = 1.23  # benchmarks/loss.py, 16,384 to 262,144 labels
MEMORY_BUDGET = 2**28  # of the loss, bytes
CHUNK_TOKENS = 8192  # of labels embedded at a time


@dataclass(frozen=True)
class Encoder:
    """DistilBERT: 66.4 million parameters, of which those in the layers apply to every token."""

    parameters: int = 66_362_880
    layers: int = 6
    width: int = 768
    heads: int = 12

    def forward(self, tokens: float, length: float) -> float:
        """Return the operations of a forward pass: two per weight of the layers, and attention."""
        return tokens * self.layers * (2 * 12 * self.width**2 + 4 * length * self.width)

    def activations(self, tokens: float, length: float) -> float:
        """Return the bytes stored for the backward pass in half precision.

        Source: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, 2022.
        """
        return tokens * self.layers * (34 * self.width + 5 * self.heads * length)


@dataclass(frozen=True)
class Sizes:
    """The size of a data set: queries, labels, tokens per query (padded, in a batch) and per label (mean)."""

    queries: int
    labels: int
    query_tokens: float
    label_tokens: float


DATA = {
    "eurlex-4k": Sizes(15_449, 3_956, 128, 6),
    "lf-amazontitles-131k": Sizes(294_805, 131_073, 32, 16),
    "lf-wikipedia-500k": Sizes(1_813_391, 501_070, 128, 7),
    "lf-amazontitles-1.3m": Sizes(2_248_619, 1_305_265, 32, 16),
}


@dataclass(frozen=True)
class Cost:
    """The cost of a run: total hours, seconds per step, the fraction of time for labels, and GiB per GPU."""

    hours: float
    seconds: float
    label_share: float
    gib: float


def estimate(data: Sizes, recipe: dict, gpus: int, tflops: float, encoder: Encoder | None = None) -> Cost:
    """Estimate the cost of a recipe's settings (those of ``XMCTrainingArguments``) for a number of GPUs."""
    encoder = encoder or Encoder()
    batch = recipe["per_device_train_batch_size"]
    steps = recipe["num_train_epochs"] * math.ceil(data.queries / (batch * gpus))
    scored, passes = data.labels / gpus, 4.0  # labels scored per GPU in a step, and forward passes per label
    if recipe["label_mode"] == "fresh":
        passes = 1 + 3 * recipe.get("label_sample_fraction", 0.05)
    if recipe["label_mode"] == "mined":
        # One positive per query and the mined ones, embedded forward and backward, without repetition.
        drawn = recipe["num_positives"] + recipe["num_hard_negatives"]
        scored, passes = min(batch * drawn, data.labels / gpus), 4.0
    queries = 3 * encoder.forward(batch * data.query_tokens, data.query_tokens)
    labels = passes * encoder.forward(scored * data.label_tokens, data.label_tokens)
    loss = LOSS_OVER_PRODUCTS * 3 * 2 * batch * gpus * scored * encoder.width
    total = queries + labels + loss
    memory = [
        16 * encoder.parameters,  # weights, gradient, two moments
        encoder.activations(batch * data.query_tokens, data.query_tokens),
        encoder.activations(CHUNK_TOKENS, data.label_tokens),
        2 * 4 * encoder.width * (scored + batch * gpus),  # embeddings and their gradients
        MEMORY_BUDGET,
    ]
    seconds = total / (tflops * 1e12)
    return Cost(steps * seconds / 3600, seconds, labels / total, sum(memory) / 2**30)


def settings(*names: str) -> dict:
    """Read a recipe from YAML files, where later files override earlier ones."""
    merged: dict = {}
    for name in names:
        merged |= yaml.safe_load((HERE / f"{name}.yaml").read_text())
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--tflops", type=float, default=100, help="speed of a GPU, in 1e12 operations per second")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 4, 8, 16])
    options = parser.parse_args()
    head = [f"{gpus} GPU{'s' if gpus > 1 else ''}: hours, GiB" for gpus in options.gpus]
    print(f"| data set | negatives | {' | '.join(head)} | seconds per step | labels' share |")
    print("|---" * (4 + len(options.gpus)) + "|")
    for name, data in DATA.items():
        mined = [name, "hard-negatives"] + (["lf-wikipedia-500k-hard-negatives"] if "wikipedia" in name else [])
        kinds = {
            "all": settings(name),
            "all, `--label_mode fresh`": settings(name) | {"label_mode": "fresh"},
            "mined": settings(*mined),
        }
        for kind, recipe in kinds.items():
            costs = [estimate(data, recipe, gpus, options.tflops) for gpus in options.gpus]
            cells = [f"{cost.hours:,.{0 if cost.hours > 10 else 2}f}, {cost.gib:.0f}" for cost in costs]
            first, last = costs[0], costs[-1]
            print(
                f"| {name} | {kind} | {' | '.join(cells)} | {first.seconds:.2f} to {last.seconds:.2f} | "
                f"{100 * first.label_share:.0f} % |"
            )


if __name__ == "__main__":
    main()
