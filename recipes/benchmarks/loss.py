"""Compare time and memory of the losses with the dense loss of the paper's code, and with three plain matrix products.

    python recipes/benchmarks/loss.py --json loss.json
    python recipes/benchmarks/loss.py --labels 1305265 --budgets 16 --repeats 3 --json loss_1300k.json
    python recipes/benchmarks/loss.py --device cuda --json loss_cuda.json

Forward and backward, from embeddings to the gradients of queries and labels. On a CPU: CPU seconds on one thread, with
the variants in turns in one process, as median (smallest to largest); ratios are medians of the ratios within a turn.
Memory is what a fresh process adds to its peak beyond the embeddings and their gradients (Linux: VmHWM), including the
buffers of libraries. On a GPU: CUDA events and `max_memory_allocated`. The plot is written next to the JSON. The share
of the roofline is the least time that the device could take (`roofline.py`), divided by the time taken.

* dense: one B x L matrix, a masked copy for the log-sum-exp, autograd; soft top-k by 32 bisections.
* floor: only the products, in chunks: scores, gradient of the queries, gradient of the labels.
* streamed: ours, under `--budgets` MiB; bf16: with `gradient_dtype=torch.bfloat16`.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from roofline import Peak, least_seconds, peak_of
from torch import Tensor

from hf_xmc.cli import HelpFormatter
from hf_xmc.losses import streaming

MIB = 2**20
DENSE_COPIES = {"decoupled": 4, "softmax": 4, "bce": 5, "soft_top_k": 7}  # matrices of B x L that the dense loss holds
STREAMED = {
    "decoupled": (streaming.decoupled_softmax_loss, {}),
    "softmax": (streaming.softmax_loss, {}),
    "bce": (streaming.bce_loss, {"bias": -10.0}),
    "soft_top_k": (streaming.soft_top_k_loss, {"k": 5, "alpha": 2.0}),
}
Step = Callable[[], tuple[Tensor, Tensor]]


class DenseTopK(torch.autograd.Function):
    """Logarithm of the soft top-k operator on a score matrix, with the threshold found by bisection."""

    @staticmethod
    def forward(ctx, scores: Tensor, k: float, alpha: float, steps: int) -> Tensor:
        low = -scores.amax(1, keepdim=True) - 10 / alpha
        high = -scores.amin(1, keepdim=True) + 10 / alpha
        for _ in range(steps):
            middle = (low + high) / 2
            too_few = torch.sigmoid(alpha * (scores + middle)).sum(1, keepdim=True) < k
            low, high = torch.where(too_few, middle, low), torch.where(too_few, high, middle)
        z = alpha * (scores + (low + high) / 2)
        log_p = z - F.softplus(z)
        ctx.save_for_backward(log_p)
        ctx.alpha = alpha
        return log_p

    @staticmethod
    def backward(ctx, grad: Tensor):
        p = ctx.saved_tensors[0].exp()
        direct = ctx.alpha * (1 - p)
        slope = p * direct
        pulled = direct * grad
        return pulled - slope * (pulled.sum(1, keepdim=True) / slope.sum(1, keepdim=True)), None, None, None


def dense_loss(loss: str, queries: Tensor, labels: Tensor, positives: Tensor) -> Tensor:
    scores = queries @ labels.T
    if loss == "bce":
        target = torch.zeros_like(scores).scatter_(1, positives, 1.0)
        return F.binary_cross_entropy_with_logits(scores - 10, target)
    if loss == "soft_top_k":
        return -DenseTopK.apply(scores, 5, 2.0, 32).gather(1, positives).mean()
    hits = scores.gather(1, positives)
    if loss == "softmax":
        return (scores.logsumexp(1, keepdim=True) - hits).mean()
    known = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, positives, True)
    negatives = scores.masked_fill(known, -math.inf).logsumexp(1, keepdim=True)
    return (torch.logaddexp(negatives, hits) - hits).mean()


@torch.no_grad()
def floor(queries: Tensor, labels: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    grad_queries, grad_labels = torch.zeros_like(queries), torch.empty_like(labels)
    scores = queries.new_empty(len(queries), min(chunk, len(labels)))
    for start in range(0, len(labels), chunk):
        part = labels[start : start + chunk]
        out = torch.mm(queries, part.T, out=scores[:, : len(part)])
        grad_queries.addmm_(out, part)
        torch.mm(out.T, queries, out=grad_labels[start : start + chunk])
    return grad_queries, grad_labels


def make_data(options: argparse.Namespace, num_labels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return unit vectors in random directions, with queries divided by the temperature."""
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(options.batch_size, options.dim, generator=generator)) / options.temperature
    labels = torch.empty(num_labels, options.dim)
    for part in labels.split(2**16):
        part.copy_(F.normalize(torch.randn(part.shape, generator=generator)))
    # Without repetition in a row, because the dense losses would count a label twice.
    spread = torch.randint(num_labels, (options.batch_size, 1), generator=generator)
    positives = (spread + torch.arange(options.positives) * (num_labels // options.positives)) % num_labels
    return queries.to(options.device), labels.to(options.device), positives.to(options.device)


def variants(options: argparse.Namespace, loss: str, num_labels: int) -> list[str]:
    names = ["floor"]
    if DENSE_COPIES[loss] * 4 * options.batch_size * num_labels <= options.max_dense_gb * 1e9:
        names.append("dense")
    for budget in options.budgets:
        names += [f"streamed, {budget} MiB", *([f"streamed, {budget} MiB, bf16"] if options.bf16 else [])]
    return names


def make_step(name: str, loss: str, queries: Tensor, labels: Tensor, positives: Tensor) -> Step:
    if name == "floor":
        return lambda: floor(queries, labels, 2048 if queries.device.type == "cpu" else 32768)
    inputs = [queries.requires_grad_(), labels.requires_grad_()]
    if name == "dense":
        return lambda: torch.autograd.grad(dense_loss(loss, *inputs, positives), inputs)
    function, settings = STREAMED[loss]
    dtype = torch.bfloat16 if name.endswith("bf16") else None
    options = streaming.StreamingOptions(memory_budget=int(name.split()[1]) * MIB, gradient_dtype=dtype)
    return lambda: torch.autograd.grad(function(*inputs, positives, **settings, options=options), inputs)


def seconds_of(step: Step, device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def measure_memory(options: argparse.Namespace, name: str, loss: str, num_labels: int) -> float:
    """Return the MiB at the peak of a step, beyond the embeddings and their gradients. Call it in a fresh process."""
    data = make_data(options, num_labels)
    gradients = (data[0].numel() + data[1].numel()) * 4
    step = make_step(name, loss, *data)
    if options.device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current memory
        before = held("VmRSS")
        step()
        return (held("VmHWM") - before - gradients) / MIB
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before - gradients) / MIB


def held(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(options: argparse.Namespace, loss: str, num_labels: int) -> list[dict]:
    names = variants(options, loss, num_labels)
    data = make_data(options, num_labels)
    steps = {name: make_step(name, loss, *data) for name in names}
    truth = steps["dense" if "dense" in steps else names[1]]()[1]
    errors = {name: float((steps[name]()[1] - truth).norm() / truth.norm()) for name in names if name != "floor"}
    del truth
    turns = [{name: seconds_of(step, options.device) for name, step in steps.items()} for _ in range(options.repeats)]
    rows = []
    for name in names:
        taken = [turn[name] for turn in turns]
        row = {"loss": loss, "labels": num_labels, "variant": name, "batch_size": options.batch_size}
        row |= {"seconds": statistics.median(taken), "seconds_min": min(taken), "seconds_max": max(taken)}
        row["times_floor"] = statistics.median(turn[name] / turn["floor"] for turn in turns)
        if "dense" in names:
            row["times_dense"] = statistics.median(turn[name] / turn["dense"] for turn in turns)
        row["label_gradient_error"] = errors.get(name)
        if peak := peak_for(options):
            least = least_seconds(options.batch_size, num_labels, options.dim, name.endswith("bf16"), peak)
            row |= {"least_seconds": least, "roofline_share": least / row["seconds"]}
        command = [sys.executable, *sys.argv, "--one", name, loss, str(num_labels)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row["extra_mib"] = float(done.stdout.splitlines()[-1])
        rows.append(row)
        print(line(row), flush=True)
    return rows


def peak_for(options: argparse.Namespace) -> Peak | None:
    """Return the peaks that the options give, or those of the GPU if they are known."""
    if options.peak_tflops:
        return Peak(options.peak_tflops, options.peak_bf16_tflops or options.peak_tflops, options.peak_gbs)
    return None if options.device == "cpu" else peak_of(torch.cuda.get_device_name(options.device))


def line(row: dict) -> str:
    cells = [row["loss"], f"{row['labels']:,}", row["variant"]]
    cells.append(f"{row['seconds']:.3f} ({row['seconds_min']:.3f}-{row['seconds_max']:.3f})")
    cells += [f"{row[name]:.2f}" if name in row else "-" for name in ("times_floor", "times_dense")]
    cells.append(f"{row['extra_mib']:.0f}")
    cells.append("-" if row["label_gradient_error"] is None else f"{row['label_gradient_error']:.0e}")
    cells += [f"{row['roofline_share']:.0%}"] if "roofline_share" in row else []
    return f"| {' | '.join(cells)} |"


def plot(rows: list[dict], path: Path) -> None:
    """Draw the time and the memory of each variant by the number of labels, with a column for each loss."""
    from hf_xmc.experiment.plots import GREY, legend, panels, style

    with style():
        losses = list(dict.fromkeys(row["loss"] for row in rows))
        figure, axes = panels(2, len(losses), sharex=True)
        titles = {"times_floor": "Time, three plain products = 1", "extra_mib": "MiB beyond embeddings and gradients"}
        for column, loss in enumerate(losses):
            for field, panel in zip(titles, axes[:, column], strict=True):
                for name in dict.fromkeys(row["variant"] for row in rows if row["loss"] == loss):
                    points = sorted(
                        (row["labels"], max(row[field], 1 if field == "extra_mib" else 0))
                        for row in rows
                        if (row["loss"], row["variant"]) == (loss, name)
                    )
                    line = {"color": GREY, "linestyle": "--", "marker": ""} if name == "floor" else {"marker": "o"}
                    panel.plot(*zip(*points, strict=True), label=name, **line)
                title = titles[field] if len(losses) == 1 else f"{loss}\n{titles[field]}"
                panel.set(xscale="log", yscale="log", title=title)
            axes[0, column].yaxis.set_major_formatter("{x:g}")
            axes[0, column].yaxis.set_minor_formatter("{x:g}")
            axes[1, column].set_xlabel("labels")
        legend(figure, 2)
        figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--labels", type=int, nargs="+", default=[4096, 16384, 65536, 262144])
    parser.add_argument("--losses", nargs="+", choices=STREAMED, default=["decoupled"])
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--positives", type=int, default=5, help="of a query")
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--budgets", type=int, nargs="+", default=[256], help="`memory_budget`, in MiB")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--max_dense_gb", type=float, default=4, help="skip the dense loss if it needs more memory")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak_tflops", type=float, help="peak of float32 products (default: that of a known GPU)")
    parser.add_argument("--peak_bf16_tflops", type=float, help="peak of bfloat16 products (default: --peak_tflops)")
    parser.add_argument("--peak_gbs", type=float, default=math.inf, help="peak of memory in GB/s (default: no limit)")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # what a child process measures the memory of
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        name, loss, num_labels = options.one
        print(measure_memory(options, name, loss, int(num_labels)))
        return

    columns = ["loss", "labels", "variant", "seconds", "x floor", "x dense", "MiB", "label gradient error"]
    columns += ["share of roofline"] if peak_for(options) else []
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    about = {"device": options.device, "machine": platform.machine(), "torch": torch.__version__}
    rows = [row | about for loss in options.losses for n in options.labels for row in measure(options, loss, n)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
        plot(rows, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
