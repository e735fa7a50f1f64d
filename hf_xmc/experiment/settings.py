"""Settings of an experiment that are not training arguments, and those that a dictionary holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, ClassVar, NamedTuple

import numpy as np
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from hf_xmc import losses
from hf_xmc.metrics.frequency import PROPENSITY_PRESETS
from hf_xmc.search.memory_settings import METRICS
from hf_xmc.training.arguments import XMCTrainingArguments

LOSSES = {
    "decoupled_softmax": losses.DecoupledSoftmaxLoss,
    "soft_top_k": losses.SoftTopKLoss,
    "softmax": losses.SoftmaxLoss,
    "bce": losses.BCELoss,
}
LOSS_DTYPES = ("auto", "float32", "bfloat16")
MADE = ("static", "phrases")  # encoders made from the data
FEW_TEXTS = 10_000  # for training
PRESETS: dict[str, dict[str, int]] = {  # for encoders made from the data
    "fast": {"embedding_dim": 128, "num_phrases": 100_000},
    "default": {"embedding_dim": 384, "num_phrases": 100_000},
    "best": {"embedding_dim": 512, "num_phrases": 200_000},
}
ARGUMENTS: dict[str, Any] = {  # training arguments whose defaults differ from those of transformers
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_steps": 25,
    "report_to": "none",
}
CHOSEN = {  # training arguments that are derived from the encoder and the data
    "learning_rate": "0.04 for a static encoder, 0.06 with a sample of the labels (`fast`: 0.08); for others by steps",
    "per_device_train_batch_size": "by the number of training queries",
    "num_train_epochs": "by preset and encoder",
    "label_mode": "`sampled` for a static encoder and 1,000 labels or more",
    "label_sample_fraction": "0.05; for a static encoder by preset",
    "sparse_updates": "with `sampled` for a static encoder",
    "label_vectors": "0.25 for a static encoder, 0 for others",
    "vote_loss": "0.5 for a static encoder with a memory (`fast`: 0), 0 for others",
    "bf16": "if the GPU supports it",
}


@dataclass(kw_only=True)
class DataSettings:
    """The data, and the validation queries."""

    _argument_group_name: ClassVar[str] = "data"

    data: str = field(
        metadata={
            "help": "A folder in any layout that load_xmc reads, a table such as books.csv, or a data set of the Hub."
        }
    )
    text: str | None = field(default=None, metadata={"help": "Text columns of a table, such as title,abstract."})
    labels: str | None = field(default=None, metadata={"help": "Column of a table with the labels of a text."})
    separator: str | None = field(default=None, metadata={"help": "Separator of labels in that column."})
    vocabulary: str | None = field(default=None, metadata={"help": "File of all labels: uids with their texts."})
    language: str = field(
        default="en",
        metadata={"help": "Language of the label texts, if the vocabulary has several, such as in a thesaurus."},
    )
    unknown: str = field(
        default="error", metadata={"help": "What to do with labels that are not in the vocabulary: `error` or `drop`."}
    )
    encoding: str = field(default="utf-8", metadata={"help": "Encoding of a CSV or TSV file, such as latin-1."})
    validation_size: float | None = field(
        default=None,
        metadata={
            "help": "Fraction of train for validation if the data have no such split; 0 for none. By default 0.02, or "
            "100 queries if that is more, up to a tenth; see `refit`."
        },
    )
    refit: bool | None = field(
        default=None,
        metadata={
            "help": "Train once more at the end, on the validation queries too, of which there are 400 then, up to a "
            "fifth. By default for a model built from fewer than 10,000 queries, if there is a test split."
        },
    )


@dataclass(kw_only=True)
class EncoderSettings:
    """The encoder to train."""

    _argument_group_name: ClassVar[str] = "encoder"

    model: str = field(
        default="phrases",
        metadata={
            "aliases": ["--encoder"],
            "help": "A sentence-transformers model, by folder or Hub name, or one built from the data: `static`, or "
            "`phrases`, which also has vectors for pairs of words and leading words.",
        },
    )
    preset: str = field(
        default="default",
        metadata={"help": "Size of a model built from the data, and number of epochs: `fast`, `default` or `best`."},
    )
    embedding_dim: int | None = field(
        default=None, metadata={"help": "Embedding size of a model built from the data. By default from the preset."}
    )
    vocab_size: int = field(default=50_000, metadata={"help": "Vocabulary size of a model built from the data."})
    num_phrases: int | None = field(
        default=None, metadata={"help": "Number of pairs and leading words in `phrases`. By default from the preset."}
    )
    initial_std: float = field(
        default=0.3, metadata={"help": "Standard deviation of the initial vectors of a model built from the data."}
    )
    start_from: str | None = field(
        default=None,
        metadata={
            "help": "A sentence-transformers model, by folder or Hub name, whose embeddings of words a model built "
            "from the data starts from. By default random vectors."
        },
    )
    max_seq_length: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens per text. By default the maximum length of 99 percent of "
            "the texts, up to the maximum of the model."
        },
    )
    pooling: str | None = field(
        default=None,
        metadata={"help": "Pooling of the token vectors of a plain transformer: `cls`, `mean`, ..."},
    )
    normalize: bool = field(
        default=False, metadata={"help": "Scale embeddings to unit norm, so that scores are cosines."}
    )


@dataclass(kw_only=True)
class LossSettings:
    """The loss, and the mining of hard negatives."""

    _argument_group_name: ClassVar[str] = "loss"

    loss: str = field(default="decoupled_softmax", metadata={"help": f"One of {', '.join(LOSSES)}."})
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Number that divides the scores. By default 0.05 for embeddings of unit norm, and 1 for others."
        },
    )
    loss_dtype: str = field(
        default="auto",
        metadata={
            "help": "Precision of the matrix products of the loss: `float32`, `bfloat16`, or `auto` for bfloat16 on "
            "a CPU that multiplies it fast, in label_mode `sampled`."
        },
    )
    k: float = field(default=5, metadata={"help": "Number of labels that soft_top_k selects."})
    alpha: float = field(default=1.0, metadata={"help": "Sharpness of soft_top_k."})
    rarity: float | None = field(
        default=None,
        metadata={
            "help": "Exponent of the inverse propensity that weights positives; above 0 favors rare labels. By default "
            "0.5 for a model built from the data, and 0 for others."
        },
    )
    mining_start: int = field(
        default=0, metadata={"help": "Number of epochs before hard negatives are mined, in label_mode `mined`."}
    )
    mining_every: int = field(default=1, metadata={"help": "Number of epochs from one mining to the next."})


@dataclass(kw_only=True)
class MeasureSettings:
    """The classifiers, the memory, and the metrics."""

    _argument_group_name: ClassVar[str] = "classifiers, memory and metrics"

    classifiers: bool | None = field(
        default=None,
        metadata={
            "help": "Fit a linear classifier of each label after training, and add its scores. By default for a model "
            "built from fewer than 10,000 queries with at most 250 labels."
        },
    )
    memory: bool = field(default=True, metadata={"help": "Let the nearest training queries vote for labels."})
    memory_metric: str = field(default="nDCG@5", metadata={"help": "Validation metric by which the memory is tuned."})
    memory_tolerance: float = field(
        default=0.003, metadata={"help": "Maximum loss in that metric, and in P@1, that tuning accepts to raise PSP@5."}
    )
    propensity: str = field(default="default", metadata={"help": "Preset of A and B for PSP@k."})


GROUPS = (DataSettings, EncoderSettings, LossSettings, MeasureSettings)


@dataclass(kw_only=True)
class ExperimentSettings(DataSettings, EncoderSettings, LossSettings, MeasureSettings):
    """Settings of the data, the encoder, the loss, the memory and the metrics.

    Settings derived from other settings are filled in here. Settings derived from the data or the encoder stay ``None``
    until :mod:`hf_xmc.experiment.defaults` chooses them.

    Raises:
        ValueError: if a setting is invalid, even one that is only used at the end of a run.
    """

    def __post_init__(self) -> None:
        known: dict[str, Sequence[str]] = {"loss": [*LOSSES], "propensity": [*PROPENSITY_PRESETS]}
        known |= {"unknown": ("error", "drop"), "memory_metric": METRICS, "preset": [*PRESETS]}
        known["loss_dtype"] = LOSS_DTYPES
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {', '.join(values)}, got {getattr(self, name)!r}.")
        if self.validation_size is not None and not 0 <= self.validation_size < 1:
            raise ValueError(f"`validation_size` must be at least 0 and below 1, got {self.validation_size}.")
        if not 0 <= self.memory_tolerance < np.inf:
            raise ValueError(f"`memory_tolerance` must be at least 0, got {self.memory_tolerance}.")
        if self.start_from is not None and self.model not in MADE:
            raise ValueError(
                f"`start_from` needs a model built from the data: {' or '.join(MADE)}, got {self.model!r}, which has "
                "pretrained vectors of its own."
            )
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.rarity is None:
            self.rarity = 0.5 if self.model in MADE else 0.0


class Parsed(NamedTuple):
    """Settings and training arguments, and the names of the given ones."""

    settings: ExperimentSettings
    args: XMCTrainingArguments
    given: frozenset[str]


def from_dict(values: Mapping[str, Any]) -> Parsed:
    """Return settings and training arguments from one dictionary.

    Raises:
        TypeError: if a name is not a setting.
        ValueError: if a value is invalid.
    """
    ours = {f.name for f in fields(ExperimentSettings)}
    theirs = {f.name for f in fields(XMCTrainingArguments) if f.init}
    for name in values:
        if name not in ours | theirs:
            close = get_close_matches(name, ours | theirs, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{name!r} is neither a setting nor an argument of XMCTrainingArguments.{hint}")
    settings = ExperimentSettings(**{name: value for name, value in values.items() if name in ours})
    for name in ("pooling", "max_seq_length"):
        if settings.model in MADE and values.get(name) is not None:
            raise ValueError(
                f"`{name}` needs a pretrained transformer, got model {settings.model!r}, which averages all words of a "
                "text. Leave it out."
            )
    chosen = {name: value for name, value in values.items() if name in theirs}
    if not {"bf16", "fp16"} & set(chosen) and not chosen.get("use_cpu"):
        chosen["bf16"] = is_torch_bf16_gpu_available()
    return Parsed(settings, XMCTrainingArguments(**{**ARGUMENTS, **chosen}), frozenset(values))
