"""``hf-xmc``: prepare data, index labels, predict and evaluate from the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice, tee
from pathlib import Path
from typing import IO, Any

ANSWER = b'{"text": '  # how each line of an output begins


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of each option that has one, unless its help names it already."""

    def add_argument(self, action: argparse.Action) -> None:
        told = action.default in (None, False, argparse.SUPPRESS) or "default" in (action.help or "")
        if not told and action.help != argparse.SUPPRESS:
            action.help = f"{action.help or ''} (default: %(default)s)".strip()
        super().add_argument(action)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except BrokenPipeError:  # whoever read the output has seen enough, as in `hf-xmc predict ... | head`
        sys.stderr.close()
    except (ValueError, OSError) as error:
        print(f"hf-xmc {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-xmc", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = partial(commands.add_parser, formatter_class=HelpFormatter)

    prepare = add("prepare", help="check a data set and write it in the form that opens at once")
    prepare.add_argument("data", help="a folder in any layout that load_xmc reads, or a data set of the Hub")
    prepare.add_argument("output_dir", type=Path, help="a folder to write to")
    prepare.set_defaults(run=_prepare)

    index = add("index", help="embed labels and save a model that predicts them")
    index.add_argument("encoder", help="a sentence-transformers model: a folder, or a model of the Hub")
    index.add_argument("--labels", required=True, help="a text file with one label per line, or a data set")
    index.add_argument("--output_dir", type=Path, required=True, help="a folder to write the model to")
    index.set_defaults(run=_index)

    predict = add("predict", help="labels of texts, one line of JSON per text")
    predict.add_argument("model", help="a saved model: a folder, or a model of the Hub")
    predict.add_argument(
        "texts", nargs="*", help="texts; without any, --file or standard input is read, one text per line"
    )
    predict.add_argument("--file", type=Path, help="a text file with one text per line")
    predict.add_argument(
        "--top_k",
        type=int,
        help="maximum number of labels of a text (default: 5, or with --threshold all that reach it, 200 at most)",
    )
    predict.add_argument(
        "--threshold",
        type=float,
        help="minimum probability of a label, from 0 to 1; the model must be calibrated (default: no threshold)",
    )
    predict.add_argument("--hierarchy", type=Path, help="a file of `label_id TAB parent_id`: scores rise to parents")
    predict.add_argument(
        "--long_text",
        choices=["truncate", "mean", "max"],
        default="truncate",
        help="how to read texts that are longer than the encoder reads",
    )
    predict.add_argument("--allow", type=Path, help="a file of the label ids to choose from, one a line")
    predict.add_argument("--deny", type=Path, help="a file of label ids not to choose")
    predict.add_argument("--output", type=Path, help="a file to write to; by default standard output")
    predict.add_argument("--resume", action="store_true", help="go on with an --output that was not written to its end")
    predict.set_defaults(run=_predict)

    evaluate = add("evaluate", help="P@k, PSP@k, nDCG@k and R@k on a split, as JSON")
    evaluate.add_argument("model", help="a saved model: a folder, or a model of the Hub")
    evaluate.add_argument("data", help="a data set with the labels of the model")
    evaluate.add_argument("--split", default="test", help="the split to evaluate on")
    evaluate.add_argument("--propensity", default="default", help="preset of A and B for PSP@k")
    evaluate.set_defaults(run=_evaluate)
    return parser


def _prepare(arguments: argparse.Namespace) -> None:
    from hf_xmc.data.loading import load_xmc

    data = load_xmc(arguments.data)
    data.save(arguments.output_dir)
    splits = {name: len(split) for name in ("train", "validation", "test") if (split := getattr(data, name))}
    _write({"num_labels": data.num_labels, **splits, "notes": dict(data.notes)})


def _index(arguments: argparse.Namespace) -> None:
    from hf_xmc.hub.release import check_target
    from hf_xmc.model.model import XMCModel

    check_target(arguments.output_dir)  # before the labels are embedded
    labels = _labels(arguments.labels)
    model = XMCModel.from_pretrained(arguments.encoder, labels=labels)
    model.save_pretrained(arguments.output_dir)
    _write({"num_labels": len(model.labels), "model": str(arguments.output_dir)})


def _labels(name: str) -> Any:
    from hf_xmc.data.loading import load_xmc

    if not Path(name).is_file():
        return load_xmc(name).labels
    texts = list(_lines(Path(name)))
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise ValueError(f"{name}, line {number}: an empty label.")
    return texts


def _predict(arguments: argparse.Namespace) -> None:
    from hf_xmc.model.hierarchy import Hierarchy
    from hf_xmc.model.model import XMCModel

    if arguments.texts and arguments.file:
        raise ValueError("texts are given as arguments or with --file, not both.")
    if arguments.resume and not arguments.output:
        raise ValueError("--resume goes on with a file: name it with --output.")
    if arguments.output and arguments.output.exists() and not arguments.resume:
        raise ValueError(f"{arguments.output} exists: go on with it by --resume, or choose another file.")
    remaining = iter(arguments.texts or _lines(arguments.file))
    if arguments.resume:
        _skip_done(arguments.output, remaining)
    model = XMCModel.from_pretrained(arguments.model)
    choices: dict[str, Any] = {"threshold": arguments.threshold}
    choices |= {name: list(_lines(path)) for name in ("allow", "deny") if (path := getattr(arguments, name))}
    if arguments.hierarchy:
        choices["hierarchy"] = Hierarchy.read(arguments.hierarchy)
    model.long_text = arguments.long_text
    tells = "seen" in model.labels.column_names
    seen = dict(zip(model.labels["label_id"], model.labels["seen"], strict=True)) if tells else {}
    remaining, texts = tee(remaining)
    answers = model.predict_stream(texts, arguments.top_k, show_progress_bar=None, **choices)
    with arguments.output.open("a", encoding="utf-8", newline="\n") if arguments.output else nullcontext() as output:
        for text, labels in zip(remaining, answers, strict=True):
            rows = [label._asdict() for label in labels]
            if tells:
                rows = [row | {"seen": seen[row["label_id"]]} for row in rows]
            _write({"text": text, "labels": rows}, output)


def _skip_done(path: Path, texts: Iterator[str]) -> None:
    """Take from ``texts`` those whose answers a file holds; a last line that was not written to its end is cut off."""
    if not path.exists():
        return
    whole, number, last, torn = 0, 0, b"", b""
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                torn = line
                break
            whole, number, last = whole + len(line), number + 1, line
    skipped = list(deque(enumerate(islice(texts, number), start=1), maxlen=1))
    if number and skipped != [(number, _text_of(last))]:
        raise ValueError(f"line {number} of {path} does not answer text {number}: was it written for other texts?")
    if torn[: len(ANSWER)] != ANSWER[: len(torn)]:
        raise ValueError(f"line {number + 1} of {path} is no answer: choose another file.")
    os.truncate(path, whole)


def _text_of(answer: bytes) -> str | None:
    """The text that a line answers, if it is an answer."""
    try:
        text: str = json.loads(answer)["text"]
    except (ValueError, KeyError, TypeError):
        return None
    return text


def _evaluate(arguments: argparse.Namespace) -> None:
    from hf_xmc.data.labels import LabelTexts
    from hf_xmc.data.loading import load_xmc
    from hf_xmc.evaluator import ExtremeMultilabelClassificationEvaluator
    from hf_xmc.model.model import XMCModel

    model, data = XMCModel.from_pretrained(arguments.model), load_xmc(arguments.data)
    labels, _ = LabelTexts.of(data.labels)
    if model.labels["label_id"] != labels.labels["label_id"]:
        raise ValueError(
            f"{arguments.model} has {len(model.labels)} labels and {arguments.data} has {data.num_labels}, and they "
            "are not the same: index the labels of the data set first."
        )
    evaluator = ExtremeMultilabelClassificationEvaluator.from_data(
        data, arguments.split, propensity=arguments.propensity
    )
    found = model.search(evaluator.texts, evaluator.max_k, exclude=evaluator.filter_pairs, leave_one_out=True)
    metrics = evaluator.score(found)
    if model.calibration is not None:
        metrics["ECE@5"] = model.calibration.error(found, evaluator.relevance, 5)
    _write({name: round(value, 6) for name, value in metrics.items()})


def _lines(path: Path | None) -> Iterator[str]:
    """The lines of a file, or of standard input. Only a line feed ends a line."""
    stream = sys.stdin.buffer if path is None else path.open("rb")
    with stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path or 'standard input'}, line {number}: not UTF-8 ({error.reason}).") from None


def _write(row: dict[str, Any], file: IO[str] | None = None) -> None:
    print(json.dumps(row, ensure_ascii=False), file=file, flush=False)


if __name__ == "__main__":
    sys.exit(main())
