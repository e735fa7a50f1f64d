"""Run an experiment from end to end."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import fields, replace
from errno import ENOSPC
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from accelerate import PartialState
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_xmc import distributed
from hf_xmc.data.carving import carve
from hf_xmc.data.dataset import XMCData
from hf_xmc.data.loading import load_xmc
from hf_xmc.data.readers.corpus_files import find_corpora
from hf_xmc.data.readers.user_data import holds_names
from hf_xmc.encoders.progress import no_file_bars
from hf_xmc.experiment import encoders
from hf_xmc.experiment.card import write_card
from hf_xmc.experiment.defaults import refits, validation_size
from hf_xmc.experiment.fit import BuildEncoder, BuildLoss, fit
from hf_xmc.experiment.measure import complete
from hf_xmc.experiment.settings import EncoderSettings, ExperimentSettings, Parsed, from_dict
from hf_xmc.experiment.splits import also_in_train, hold_out
from hf_xmc.hub.card import XMCCard, hardware
from hf_xmc.hub.release import check_target
from hf_xmc.model.model import XMCModel
from hf_xmc.training.arguments import XMCTrainingArguments

logger = logging.getLogger(__name__)

LEAST_SPACE = 2**23  # bytes that a folder for results must take


def train(
    data: XMCData | str | Path,
    encoder: str | Path | SentenceTransformer = "phrases",
    *,
    output_dir: str | Path,
    text: str | Sequence[str] | None = None,
    labels: str | None = None,
    separator: str | None = None,
    vocabulary: str | Path | None = None,
    preset: str = "default",
    **settings: Any,
) -> XMCModel:
    """Train a model, add memory and calibration, save it, measure it, and return it.

    The model is saved as soon as it is trained, and again when it is complete. ``output_dir`` then has ``model``,
    ``metrics.json``, ``history.json`` and ``report.html``. Steps that need a missing split are skipped with a warning.
    Other settings are derived from the encoder and the data, and one log line names them.

    Args:
        data: The data, or a path or Hub name for :func:`hf_xmc.load_xmc`.
        encoder: ``"phrases"`` or ``"static"``, which are built from the texts; any sentence-transformers model, as a
            folder or a name on the Hub; or the encoder itself, which training changes.
        output_dir: Folder for the results.
        text: Text column of a table; several as a list, or as ``"title,abstract"``.
        labels: Column of a table with the labels of a text.
        separator: Separator of labels in that column.
        vocabulary: File of all labels.
        preset: Size of an encoder built from the data, and number of epochs: ``"fast"``, ``"default"`` or ``"best"``.
        settings: Fields of :class:`hf_xmc.experiment.settings.ExperimentSettings` and arguments of
            :class:`XMCTrainingArguments`.

    Returns:
        The saved model.

    Raises:
        TypeError: if a name in ``settings`` is unknown, or is about the encoder, which is given as an object.
        ValueError: if a setting or the data are invalid, ``output_dir`` has content other than a run, or there are
            several processes. Use ``accelerate launch -m hf_xmc.cli train`` for those.
    """
    if not isinstance(data, XMCData | str | Path):
        raise ValueError(
            f"data must be a path, a name on the Hub or XMCData, got {type(data).__name__}. Write "
            "`XMCData.from_pandas(frame, text=..., labels=...)`, or `from_dataset` or `from_lists`."
        )
    if PartialState().num_processes > 1:
        raise ValueError(
            f"train must run in one process, got {PartialState().num_processes}. For several processes, use "
            "`accelerate launch -m hf_xmc.cli train`."
        )
    given = encoder if isinstance(encoder, SentenceTransformer) else None
    columns = text if text is None or isinstance(text, str) else ",".join(text)
    values = {
        "data": str(data) if isinstance(data, str | Path) else "data",
        "model": str(encoder) if given is None else _name_of(given),
        "output_dir": str(output_dir),
        "preset": preset,
        "text": columns,
        "labels": labels,
        "separator": separator,
        "vocabulary": None if vocabulary is None else str(vocabulary),
    }
    if repeated := sorted(settings.keys() & values.keys()):
        raise TypeError(f"{', '.join(repeated)} must not be given. Pass the encoder as `encoder`.")
    of_encoder = {field.name for field in fields(EncoderSettings)} - {"preset"} | {"refit"}
    if given is not None and (ignored := sorted(settings.keys() & of_encoder)):
        raise TypeError(f"{', '.join(ignored)} must not be given with an encoder object. Change the encoder itself.")
    parsed = from_dict({**values, **settings})
    loaded = load(parsed) if isinstance(data, str | Path) else data
    build = encoders.build_encoder if given is None else lambda *_: given
    model, _ = run(parsed.settings, parsed.args, loaded, given=parsed.given, build_encoder=build)
    assert model is not None  # there is one process
    return model


def load(parsed: Parsed) -> XMCData:
    """Return the data in the settings, after checking ``output_dir``.

    If a table or a corpus of texts and label names has no test split, one is taken from train. :func:`run` takes the
    validation split.
    """
    settings, path = parsed.settings, Path(parsed.settings.data)
    check_output_dir(Path(str(parsed.args.output_dir)))
    options: dict[str, Any] = {"labels": settings.labels, "separator": settings.separator}
    defaults = {"unknown": "error", "encoding": "utf-8"}
    changed = {name: value for name, usual in defaults.items() if (value := getattr(settings, name)) != usual}
    options |= {"vocabulary": settings.vocabulary, "text": settings.text and settings.text.split(",")}
    given = {name: value for name, value in options.items() if value is not None}
    data = load_xmc(settings.data, **given, **changed, language=settings.language, carve_missing=False)
    named = bool(given) or path.is_file() or (path.is_dir() and (holds_names(path) or bool(find_corpora(path))))
    return carve(data, validation=None) if named else data


@no_file_bars()
def run(
    settings: ExperimentSettings,
    args: XMCTrainingArguments,
    full: XMCData,
    *,
    given: frozenset[str] | None = None,
    build_encoder: BuildEncoder = encoders.build_encoder,
    build_loss: BuildLoss = encoders.build_loss,
    augment: Callable[[XMCData], XMCData] | None = None,
) -> tuple[XMCModel | None, dict[str, Any]]:
    """Train a model, save it, measure it, and write a report and a card.

    The model is saved as soon as it is trained, and again once it has its memory and calibration. Parts that need a
    missing split are skipped with a warning.

    Args:
        settings, args: The settings, and the training arguments, whose ``output_dir`` gets ``model``, ``metrics.json``,
            ``history.json`` and ``report.html``.
        full: The data as they were loaded.
        given: Names of the training arguments that were given; the others may be chosen to fit the encoder and the
            data. ``None`` keeps all of them.
        build_encoder, build_loss: Functions that make the encoder and the loss, as in
            :func:`hf_xmc.experiment.fit.fit`.
        augment: Function that changes the training data of the encoder; memory and metrics use the original data.

    Returns:
        The model and the content of ``metrics.json``; ``None`` and an empty dictionary on all processes but the first.

    Raises:
        ValueError: if a setting is invalid, or ``output_dir`` has content other than a saved model.
    """
    output_dir = Path(str(args.output_dir))
    check_output_dir(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if any(output_dir.glob("checkpoint-*")) and not args.resume_from_checkpoint:
        logger.warning(
            "%s holds a run, which is started again and replaced. resume_from_checkpoint=True continues it.", output_dir
        )
    set_seed(args.seed)
    for name, count in full.load_report.items():
        if "taken from train" not in name:  # which the log says already
            logger.info("%s: %s: %s", settings.data, name, count)
    settings = replace(settings, refit=refits(settings, full))
    settings = replace(settings, validation_size=validation_size(settings, full))
    data = hold_out(full, settings.validation_size or 0.0)
    if data.validation is not None and data is not full:
        logger.info("validation: %d of %d training queries are taken.", len(data.validation), len(full.train))
    repeated = also_in_train(full)
    read = augment(data) if augment else data
    build: dict[str, Any] = {"build_encoder": build_encoder, "build_loss": build_loss, "given": given}
    before = copy(args)
    trainer, vectors, seconds, settings = fit(settings, args, read, **build)

    # Only the evaluator of the trainer encodes on all processes; what follows runs on the first one.
    encoder, first = trainer.model, trainer.is_world_process_zero()
    loss, args, history = trainer.loss, trainer.args, trainer.state.log_history
    del trainer
    distributed.leave()
    if not first:
        return None, {}
    assert encoder is not None
    model = _model(encoders.plain(encoder, settings), full, vectors)
    model.save_pretrained(output_dir / "model")  # before any step that may fail
    metrics: dict[str, Any] = {
        "split": None,
        "deciles": [],
        "num_train": len(data.train),
        "also_in_train": repeated,
        "train_seconds": seconds,
        "hardware": hardware(),
        "recipe": {**vars(settings), "temperature": getattr(loss, "temperature", settings.temperature)},
        "arguments": args.to_dict(),
    }
    write_json(output_dir / "history.json", history)
    write_json(output_dir / "metrics.json", metrics)

    again = None
    if settings.refit and data is not full:
        again, more = _refitted(settings, before, augment(full) if augment else full, full, build)
        metrics |= {"num_train": len(full.train), "train_seconds": seconds + more}
    metrics |= complete(model, full, data, settings, again)
    model = model if again is None else again
    model.save_pretrained(output_dir / "model")
    write_json(output_dir / "metrics.json", metrics)
    model.card = write_about(output_dir, full, settings.data, model)
    return model, metrics


def _refitted(
    settings: ExperimentSettings, args: XMCTrainingArguments, read: XMCData, full: XMCData, build: dict[str, Any]
) -> tuple[XMCModel, float]:
    """Train once more, on all training queries, without evaluation or checkpoints. Return the model and the seconds."""
    logger.info("refit: training once more, on all %d training queries.", len(full.train))
    args.save_strategy, args.resume_from_checkpoint = SaveStrategy.NO, None
    args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
    set_seed(args.seed)
    trainer, vectors, seconds, settings = fit(settings, args, read, **build)
    encoder = trainer.model
    del trainer
    distributed.leave()
    assert encoder is not None
    return _model(encoders.plain(encoder, settings), full, vectors), seconds


def _model(encoder: SentenceTransformer, full: XMCData, vectors: Tensor | None) -> XMCModel:
    """Return a model whose labels say whether a training query has them, also one that was taken for validation."""
    seen = (full.label_counts() > 0)[full.label_of].tolist()
    return XMCModel(encoder, full.labels.add_column("seen", seen), label_vectors=vectors)


def check_output_dir(folder: Path) -> None:
    """Raise if a run could not write its results to a folder.

    Raises:
        ValueError: if it cannot be made or written, there is no space for even a small model, or its ``model`` is
            something else than a saved model.
    """
    check_target(folder / "model")
    try:
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with TemporaryFile(dir=place, buffering=0) as file:
            if file.write(bytes(LEAST_SPACE)) < LEAST_SPACE:  # the disk became full
                raise OSError(ENOSPC, os.strerror(ENOSPC))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"`output_dir` must be a folder that can be written, got {str(folder)!r}: {reason}. Choose another one."
        ) from None


def write_about(run: Path, full: XMCData, name: str, model: XMCModel) -> XMCCard:
    """Write the card and, with matplotlib, the report of a finished run. Return the card.

    Args:
        run: The ``output_dir`` of the run.
        full: The data as they were loaded.
        name: Folder or name of the data; a folder may have metrics of other systems in ``peers.json``.
        model: The finished model, as it is saved.
    """
    card = write_card(run, full, Path(name).name, model)
    try:
        from hf_xmc.experiment.report import write_report

        write_report(run, full, Path(name).name, Path(name) / "peers.json", model)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        logger.warning(
            "report.html is not written, because matplotlib is not installed. Run: pip install 'hf_xmc[report]'."
        )
    return card


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, with unsupported objects as text."""
    path.write_text(json.dumps(value, indent=2, default=str))


def _name_of(encoder: SentenceTransformer) -> str:
    """Return the name of an encoder's base model, or of its class."""
    return encoder.model_card_data.base_model or type(encoder).__name__
