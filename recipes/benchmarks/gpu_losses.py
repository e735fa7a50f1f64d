"""Compare all losses on a device with float64, at shapes that no tile divides and at 1.3 million labels.

    python recipes/benchmarks/gpu_losses.py --device cuda --json losses.json

For each loss, engine and precision: the relative error of the value and of both gradients. At the largest shape the
reference is the same loss in float64 for some of the queries. It ends with an error if an error is too large, or if the
kernels were replaced by plain torch.
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_xmc.cli import HelpFormatter
from hf_xmc.losses import streaming

LOSSES = {
    "decoupled": (streaming.decoupled_softmax_loss, {}),
    "softmax": (streaming.softmax_loss, {}),
    "bce": (streaming.bce_loss, {"bias": -10.0}),
    "soft_top_k": (streaming.soft_top_k_loss, {"k": 5, "alpha": 2.0}),
}
SHAPES = [(1, 1, 1), (3, 17, 5), (129, 4097, 33), (257, 10_001, 100), (1000, 33_333, 384), (515, 131_073, 768)]
LARGEST = (64, 1_305_265, 384)
TINY = [(1, 1, 1), (3, 17, 5), (19, 101, 21)]
ALLOWED = {torch.float32: (1e-4, 5e-3), torch.bfloat16: (1e-4, 1e-2)}  # relative errors of the value, and of gradients


def make(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, num_labels, dim = shape
    generator = torch.Generator(device).manual_seed(0)
    queries = 20 * F.normalize(torch.randn(rows, dim, generator=generator, device=device))
    labels = F.normalize(torch.randn(num_labels, dim, generator=generator, device=device))
    positives = torch.randint(num_labels, (rows, 5), generator=generator, device=device)
    positives[::7, 2:] = -100
    return queries.to(dtype), labels.to(dtype), positives


def results(loss: str, queries: Tensor, labels: Tensor, positives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    function, settings = LOSSES[loss]
    queries, labels = queries.requires_grad_(), labels.requires_grad_()
    value = function(queries, labels, positives, **settings)
    return (value.detach(), *torch.autograd.grad(value, (queries, labels)))


def measure(loss: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> dict:
    inputs = make(shape, dtype, device)
    start = time.perf_counter()
    got = results(loss, *inputs)
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    expected = results(loss, inputs[0].detach().double(), inputs[1].detach().double(), inputs[2])
    errors = [float((g.double() - e).norm() / e.norm().clamp(min=1e-12)) for g, e in zip(got, expected, strict=True)]
    if shape[1] == 1:  # a loss of zero has no relative error
        errors = [float((g.double() - e).norm()) for g, e in zip(got, expected, strict=True)]
    most = ALLOWED[dtype]
    row = {"loss": loss, "shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "seconds": seconds}
    row |= dict(zip(("value_error", "query_error", "label_error"), errors, strict=True))
    return row | {"passed": errors[0] <= most[0] and max(errors[1:]) <= most[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU can afford")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("hf_xmc").addHandler(handler)
    shapes = TINY if options.tiny else [*SHAPES, LARGEST]
    rows = []
    for shape in shapes:
        for loss in LOSSES:
            for dtype in ALLOWED:
                rows.append(measure(loss, shape, dtype, options.device))
                print(json.dumps(rows[-1]), flush=True)
    options.json.write_text(json.dumps({"rows": rows, "warnings": warnings}, indent=1))
    if warnings or not all(row["passed"] for row in rows):
        sys.exit(f"{sum(not row['passed'] for row in rows)} of {len(rows)} results differ; warnings: {warnings}")


if __name__ == "__main__":
    main()
