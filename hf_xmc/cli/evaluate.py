"""``hf-xmc evaluate``: the metrics of a saved model on a split."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hf_xmc.cli.loading import add_options, loading_of
from hf_xmc.cli.streams import write_row


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to those of ``hf-xmc``."""
    evaluate = add("evaluate", help="compute P@k, PSP@k, nDCG@k and R@k on a split, as JSON")
    evaluate.add_argument("model", help="folder of a model, output_dir of `hf-xmc train`, or a model on the Hub")
    evaluate.add_argument("data", help="data set with the labels of the model, or a table such as books.csv")
    evaluate.add_argument("--split", help="split to evaluate on (default: test, and all rows of a table)")
    evaluate.add_argument("--text", help="text columns of a table, such as title,abstract")
    evaluate.add_argument("--labels", help="column of a table with the labels of a text, by uid or text")
    evaluate.add_argument("--separator", help="separator of labels in that column")
    evaluate.add_argument(
        "--unknown",
        choices=["error", "drop"],
        help="what to do with labels of a table that the model does not have (default: error)",
    )
    add_options(evaluate)
    evaluate.add_argument("--batch_size", type=int, default=1024, help="number of texts to embed at a time")
    evaluate.add_argument("--propensity", default="default", help="preset of A and B for PSP@k")
    evaluate.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from hf_xmc.data.labels import LabelTexts
    from hf_xmc.data.loading import load_xmc
    from hf_xmc.evaluator import XMCEvaluator
    from hf_xmc.metrics.calibration import expected_calibration_error, scores_and_hits
    from hf_xmc.model.model import XMCModel
    from hf_xmc.topk import TopK

    model = XMCModel.from_pretrained(arguments.model, **loading_of(arguments))
    model.batch_size = arguments.batch_size
    evaluator_of = partial(XMCEvaluator.from_data, propensity=arguments.propensity)
    if Path(arguments.data).is_file():
        options: dict[str, Any] = {"labels": arguments.labels, "separator": arguments.separator}
        options["unknown"] = arguments.unknown
        options |= {"text": arguments.text and arguments.text.split(","), "vocabulary": model.label_texts.texts}
        given = {name: value for name, value in options.items() if value is not None}
        data = load_xmc(arguments.data, **given, carve_missing=False)
        for name, count in data.load_report.items():
            print(f"{arguments.data}: {name}: {count}", file=sys.stderr)
        evaluator = XMCEvaluator(data.train["text"][:], data.relevance("train"), data.labels)
    else:
        data = load_xmc(arguments.data)
        labels, _ = LabelTexts.of(data.labels)
        if model.labels["uid"] != labels.labels["uid"]:
            raise ValueError(
                f"{arguments.model} and {arguments.data} must have the same labels, got {len(model.labels)} and "
                f"{data.num_labels}, which differ. Index the labels of the data set first."
            )
        evaluator = evaluator_of(data, arguments.split or "test")
    calibrated = model.calibration is not None
    choice: dict[str, Any] = {"exclude": evaluator.filter_pairs, "leave_one_out": True, "probabilities": calibrated}
    found = model.search(evaluator.texts, evaluator.max_k, **choice)
    metrics = evaluator.score(found)
    if calibrated:
        first = TopK(*(part[:, :5] for part in found))
        metrics["ECE@5"] = expected_calibration_error(*scores_and_hits(first, evaluator.relevance))
    write_row({name: round(value, 6) for name, value in metrics.items()})
