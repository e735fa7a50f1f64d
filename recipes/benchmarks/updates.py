"""What Adam makes of a sampled gradient: its update beside the one from exact gradients, along one path of training.

    python recipes/benchmarks/updates.py --data recipes/data/wordnet-hypernyms \
        --model sentence-transformers/all-MiniLM-L6-v2 --num_labels 2000 --json updates.json

The encoder follows the exact gradients, dropout off; at each step every sampled mode gives a gradient of the same
batch to an Adam of its own. Of two updates the table has the cosine, and how far the sampled one goes in the direction
of the exact one, as a share: Adam divides by the root mean square of a gradient, which sampling makes larger, so that
steps become shorter. The vectors of words are apart from the rest of the encoder: a word may be in one label only,
which is drawn now and then. The plot lies beside the JSON.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from step import make_trainer, take_step
from subset import subset
from torch import Tensor

from hf_xmc import load_xmc

PARTS = ("words", "rest")


class Updates:
    """Adam's updates at a learning rate of one, from clipped gradients."""

    def __init__(self, size: int) -> None:
        self.moved = torch.zeros(size, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.moved], lr=1.0)

    def __call__(self, gradient: Tensor) -> Tensor:
        before = self.moved.detach().clone()
        self.moved.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([self.moved], 1.0)
        self.optimizer.step()
        return self.moved.detach() - before


def compare(update: Tensor, exact: Tensor) -> dict[str, float]:
    product = float(update @ exact)
    return {"cosine": product / float(update.norm() * exact.norm()), "way": product / float(exact @ exact)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--num_labels", type=int)
    parser.add_argument("--max_share", type=float, default=0.05, help="of the queries, that a label may have")
    parser.add_argument("--max_seq_length", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--modes", nargs="+", choices=["fresh", "bank"], default=["fresh"])
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--warmup_steps", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.set_defaults(chunk_tokens=8192, num_positives=None, bf16=False)  # what a trainer is made with
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    data = subset(load_xmc(options.data), options.num_labels, max_share=options.max_share)
    encoder = SentenceTransformer(options.model)
    encoder.max_seq_length = options.max_seq_length
    trainers = {"exact": make_trainer(options, encoder, data, "exact")}
    for mode in options.modes:
        for share in options.shares:
            trainers[f"{mode} {share:g}"] = make_trainer(options, encoder, data, mode, label_sample_share=share)
    batches = iter(trainers["exact"].get_train_dataloader())
    adams: dict[str, Updates] = {}
    rows: list[dict] = []
    for step in range(options.steps):
        batch, updates = next(batches), {}
        for name, trainer in trainers.items():
            gradient, _ = take_step(trainer, encoder, batch, seed=step)
            updates[name] = adams.setdefault(name, Updates(len(gradient)))(gradient)
        reached = [(name, p) for name, p in encoder.named_parameters() if p.grad is not None]
        in_words = torch.cat([torch.full((p.numel(),), "word_embeddings" in name) for name, p in reached])
        for name, update in updates.items():
            if name != "exact":
                row = {"step": step, "mode": name}
                for part, chosen in zip(PARTS, (in_words, ~in_words), strict=True):
                    found = compare(update[chosen], updates["exact"][chosen])
                    row |= {f"{part}_{measure}": value for measure, value in found.items()}
                rows.append(row)
                print(row, flush=True)
        rate = options.learning_rate * min(1.0, (step + 1) / options.warmup_steps)
        with torch.no_grad():
            sizes = [p.numel() for _, p in reached]
            for (_, p), moved in zip(reached, updates["exact"].split(sizes), strict=True):
                p.add_(rate * moved.view_as(p))
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
            plot(rows, options.json.with_suffix(".png"))
    print(table(rows))


def table(rows: list[dict]) -> str:
    """Means over the second half of the steps."""
    half = (1 + max(row["step"] for row in rows)) // 2
    columns = [f"{part}_{measure}" for part in PARTS for measure in ("cosine", "way")]
    lines = ["| mode | words: cosine | way | rest: cosine | way |", "|---" * 5 + "|"]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        chosen = [row for row in rows if row["mode"] == mode and row["step"] >= half]
        means = (f"{statistics.mean(row[column] for row in chosen):.2f}" for column in columns)
        lines.append(f"| {mode} | {' | '.join(means)} |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for number, mode in enumerate(dict.fromkeys(row["mode"] for row in rows)):
        chosen = [row for row in rows if row["mode"] == mode]
        for part, line in zip(PARTS, ("--", "-"), strict=True):
            way = [row[f"{part}_way"] for row in chosen]
            axis.plot([row["step"] for row in chosen], way, line, color=f"C{number}", label=f"{mode}, {part}")
    axis.set_xlabel("step")
    axis.set_ylabel("how far Adam goes, exact = 1")
    axis.set_ylim(0, 1.05)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
