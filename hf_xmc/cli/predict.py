"""``hf-xmc predict``: the labels of texts, as lines of JSON or as a table."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain, islice, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_xmc.cli.loading import add_options, loading_of
from hf_xmc.cli.sources import Source, check_source
from hf_xmc.cli.streams import line_of, read_lines
from hf_xmc.cli.tables import TableLines, check_separator

if TYPE_CHECKING:
    from hf_xmc.model.model import XMCModel
    from hf_xmc.model.word_weights import WordWeights

ANSWER = b'{"text": '  # beginning of each output line
EXAMPLE = """Example, which keeps the columns of the input and adds those of the predictions:
  hf-xmc predict runs/books/model --file new.csv --text title,abstract --output predicted.csv

On several processes, each with its own GPU if there are any:
  torchrun --nproc_per_node 4 -m hf_xmc.cli predict runs/books/model --file texts.txt --output answers.jsonl --resume"""


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to those of ``hf-xmc``."""
    predict = add("predict", help="predict the labels of texts, as one line of JSON per text")
    predict.add_argument("model", help="folder of a model, output_dir of `hf-xmc train`, or a model on the Hub")
    predict.add_argument(
        "texts", nargs="*", help="texts to label; by default one text per line of --file or of standard input"
    )
    predict.add_argument("--file", type=Path, help="text file with one text per line")
    predict.add_argument("--data", help="data set with the texts: a name on the Hub, or a folder")
    predict.add_argument("--split", help="split of --data, such as test")
    predict.add_argument(
        "--top_k",
        type=int,
        help="maximum number of labels per text (default: 5; with --threshold, all labels that reach it, at most 200)",
    )
    predict.add_argument(
        "--threshold",
        type=float,
        help="minimum probability of a label, from 0 to 1, if the model is calibrated (default: no threshold)",
    )
    predict.add_argument(
        "--new",
        type=int,
        help="number of places at the end of the top_k to reserve for new labels, if the model is calibrated (default: "
        "the last two of each ten, for labels a tenth as probable as the others there)",
    )
    predict.add_argument(
        "--hierarchy",
        type=Path,
        help="file of `uid TAB parent_uid` lines, or a SKOS thesaurus; scores rise to parents",
    )
    predict.add_argument(
        "--long_text",
        choices=["truncate", "mean", "max"],
        default="truncate",
        help="how to read texts that are too long for the encoder",
    )
    predict.add_argument("--allow", type=Path, help="file with the uids of the labels to choose from, one per line")
    predict.add_argument("--deny", type=Path, help="file with the uids of labels to leave out, one per line")
    predict.add_argument(
        "--explain",
        action="store_true",
        help="also write the contribution of each word of the text to the score of each predicted label",
    )
    predict.add_argument("--output", type=Path, help="output file; by default standard output")
    predict.add_argument("--resume", action="store_true", help="continue an incomplete --output file")
    table = predict.add_argument_group("tables")
    table.add_argument(
        "--text",
        help="text columns of a CSV, such as title,abstract, which --file then is, gzipped or not, or of --data",
    )
    table.add_argument("--separator", default="; ", help="separator of the labels of a text in an output CSV")
    computing = predict.add_argument_group("computing")
    add_options(computing)
    computing.add_argument("--batch_size", type=int, default=1024, help="number of texts to embed at a time")
    computing.add_argument(
        "--no-verify", action="store_false", dest="verify", help="load the model by file sizes, without hashing files"
    )
    predict.epilog = EXAMPLE
    predict.set_defaults(run=_predict)


def _predict(arguments: argparse.Namespace) -> None:
    from hf_xmc import distributed
    from hf_xmc.model.embeddings import BATCH_SIZE
    from hf_xmc.model.model import XMCModel

    _check(arguments)
    path, as_table = arguments.output, _writes_table(arguments)
    loading = loading_of(arguments)
    device = distributed.join(arguments.device)
    first, together = distributed.rank() == 0, distributed.world_size() > 1
    if together and not (arguments.texts or arguments.file or arguments.data):
        raise ValueError("several processes cannot share standard input. Pass the texts with --file or --data.")
    if first and path and path.exists() and not arguments.resume:
        raise ValueError(f"{path} already exists. Continue it with --resume, or choose another file.")
    source = Source.of(arguments)
    if arguments.resume:
        done = distributed.from_first(lambda: Answered.of(path))
        done.skip(map(source.text, source.rows), path)
        if first and path.exists():
            os.truncate(path, done.size)
    model = XMCModel.from_pretrained(arguments.model, **loading | {"device": device}, verify=arguments.verify)
    model.long_text, model.batch_size = arguments.long_text, arguments.batch_size
    table = TableLines(source.table, arguments.separator) if source.table and as_table else None
    if table:
        check_separator(arguments.separator, [*model.labels["uid"], *model.labels["text"]])
    line = table.of if table else _json_lines(model, source, arguments.explain)

    shares, read = tee(distributed.own_shares(source.rows, BATCH_SIZE))
    texts = map(source.text, chain.from_iterable(read))
    bar = None if first else False
    answers = model.predict_stream(texts, arguments.top_k, show_progress_bar=bar, **_choices(arguments))
    number, start = 0, time.perf_counter()
    with path.open("a", encoding="utf-8", newline="\n") if path and first else nullcontext(sys.stdout) as output:
        if table and first:
            output.write(table.header)
        for share in shares:
            answered = zip(share, islice(answers, len(share)), strict=True)
            lines = (line(row, [label._asdict() for label in labels]) for row, labels in answered)
            for text in distributed.gather_in_order(lines):
                output.write(text)
                number += 1
        deque(answers, maxlen=0)  # nothing is left, but the stream gives its warnings at its end
    if together and first:
        seconds, processes = time.perf_counter() - start, distributed.world_size()
        rate = f"{number / seconds:,.0f} per second"
        print(f"hf-xmc predict: {number:,} texts on {processes} processes, {rate}", file=sys.stderr)
    distributed.leave()


def _check(arguments: argparse.Namespace) -> None:
    check_source(arguments)
    if arguments.resume and not arguments.output:
        raise ValueError("--resume needs the file to continue. Pass it as --output.")
    if arguments.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {arguments.batch_size}.")
    output: Path | None = arguments.output
    if output and output.suffix.lower() == ".gz":
        raise ValueError(f"--output is written without compression, got {output}. Choose {output.with_suffix('')}.")
    if output and not output.exists() and not os.access(output.absolute().parent, os.W_OK):
        raise ValueError(f"--output must be in a folder that exists and can be written, got {output}.")


def _choices(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the labels to choose from, as arguments of :meth:`hf_xmc.XMCModel.predict_stream`."""
    from hf_xmc.model.hierarchy import Hierarchy

    choices: dict[str, Any] = {"threshold": arguments.threshold, "new": arguments.new}
    choices |= {name: list(read_lines(file)) for name in ("allow", "deny") if (file := getattr(arguments, name))}
    if arguments.hierarchy:
        choices["hierarchy"] = Hierarchy.read(arguments.hierarchy)
    return choices


def _json_lines(model: XMCModel, source: Source, explain: bool) -> Callable[[Any, list[dict[str, Any]]], str]:
    """Return a function from a row and its labels to a line of JSON."""
    tells = "seen" in model.labels.column_names
    seen = dict(zip(model.labels["uid"], model.labels["seen"], strict=True)) if tells else {}

    def line(row: Any, labels: list[dict[str, Any]]) -> str:
        text = source.text(row)
        if tells:
            labels = [label | {"seen": seen[label["uid"]]} for label in labels]
        if explain:
            labels = [label | _words(model.weigh_words(text, label["uid"])) for label in labels]
        return line_of({"text": text, "labels": labels})

    return line


def _writes_table(arguments: argparse.Namespace) -> bool:
    """Return whether the output is a table: by its name, or like the input if the output has no name.

    Raises:
        ValueError: if a table cannot hold the requested output.
    """
    path: Path | None = arguments.output
    from_table = bool(arguments.text) and not arguments.data
    wanted = from_table and not arguments.explain if path is None else path.suffix.lower() in (".csv", ".tsv")
    if wanted and not from_table:
        raise ValueError(
            f"a CSV output such as {path} needs a CSV input. Pass its text columns as --text, or write a .jsonl file."
        )
    for name in ("explain", "resume"):
        if wanted and getattr(arguments, name):
            raise ValueError(f"--{name} needs lines of JSON. Write to a .jsonl file with --output.")
    return wanted


def _words(weights: WordWeights) -> dict[str, Any]:
    return {"words_add_up": weights.exact, "words": [word._asdict() for word in weights.words]}


class Answered(NamedTuple):
    """The complete lines of an output file.

    Attributes:
        number: How many there are.
        text: Text that the last of them answers.
        size: Bytes until their end.
    """

    number: int
    text: str | None
    size: int

    @classmethod
    def of(cls, path: Path) -> Answered:
        """Read a file, which may end with an incomplete line and need not exist.

        Raises:
            ValueError: if an incomplete last line is not the beginning of a prediction.
        """
        size, number, last, partial_line = 0, 0, b"", b""
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        partial_line = line
                        break
                    size, number, last = size + len(line), number + 1, line
        if partial_line[: len(ANSWER)] != ANSWER[: len(partial_line)]:
            raise ValueError(f"line {number + 1} of {path} is not a prediction. Choose another file.")
        return cls(number, _text_of(last), size)

    def skip(self, texts: Iterator[str], path: Path) -> None:
        """Skip the texts that the file already answers.

        Raises:
            ValueError: if the last of them is not the text that the last line answers.
        """
        skipped = deque(enumerate(islice(texts, self.number), start=1), maxlen=1)
        if self.number and list(skipped) != [(self.number, self.text)]:
            raise ValueError(
                f"line {self.number} of {path} does not answer text {self.number}. Pass the same texts as before."
            )


def _text_of(answer: bytes) -> str | None:
    """Return the text that a line answers, or ``None`` if the line is not a prediction."""
    try:
        text: str = json.loads(answer)["text"]
    except (ValueError, KeyError, TypeError):
        return None
    return text
