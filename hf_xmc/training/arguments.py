"""Training arguments in addition to those of sentence-transformers."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from sentence_transformers import SentenceTransformerTrainingArguments

from hf_xmc.training.checks import check_arguments

LabelMode = Literal["exact", "fresh", "bank", "sampled", "mined"]
NonFinitePolicy = Literal["stop", "skip"]
LABEL_MODES = get_args(LabelMode)


@dataclass
class XMCTrainingArguments(SentenceTransformerTrainingArguments):
    """Arguments of sentence-transformers, and how labels are selected and embedded in a step.

    The learning rate, the batch size and the number of epochs are ``None`` unless they are given. The trainer then
    derives them from the encoder and the number of queries, in a copy of the arguments. The temperature, k and alpha
    are arguments of the loss. Pooling and normalisation belong to the encoder.
    """

    _argument_group_name: ClassVar[str] = "training"  # in the help of a parser

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Highest learning rate. Default: 0.04 for a static encoder. For other encoders, 3e-4 for up to 56 "
            "steps, 5e-5 from 2,000 steps on, and in proportion to 1 / sqrt(steps) between them."
        },
    )
    per_device_train_batch_size: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Number of queries in a batch of one process. Default: the largest power of two that gives 15 "
            "batches an epoch, from 32 to 1024 for a static encoder, and from 16 to 64 for other encoders."
        },
    )
    num_train_epochs: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Number of passes over the queries. Default: 8 for a static encoder, and 3 for others."},
    )
    label_mode: LabelMode | None = field(
        default=None,
        metadata={
            "help": "Labels that a step scores. `exact`: score all labels, back-propagate through all of them. "
            "`fresh`: score all labels, back-propagate through a sample of them, without bias. `bank`: score and "
            "back-propagate through the batch's positives and a sample of the other labels, chosen with the help of "
            "remembered embeddings. `sampled`: the same, chosen by the gradients of earlier steps, which costs less "
            "and is less precise. `mined`: score the batch's positives, mined hard negatives and random labels. "
            "Default: `exact` for a static encoder and for labels of at most 16,384 tokens, and `fresh` otherwise."
        },
    )
    label_sample_fraction: float = field(
        default=0.05,
        metadata={
            "help": "Fraction of the labels that `fresh`, `bank` and `sampled` sample; the last two add the batch's "
            "positives."
        },
    )
    label_bank_max_age: int = field(
        default=50, metadata={"help": "Maximum age of an embedding in the memory of `bank`, in batches."}
    )
    num_hard_negatives: int = field(
        default=1, metadata={"help": "Number of hard negatives that `mined` draws for each query."}
    )
    num_random_negatives: int = field(
        default=0, metadata={"help": "Number of random labels that `mined` draws in each step."}
    )
    num_positives: int | None = field(
        default=None,
        metadata={
            "help": "Number of positives of a query that a step draws, in proportion to their weights. Its other "
            "positives are neither positives nor negatives in that step. Default: all positives."
        },
    )
    label_chunk_size: int | None = field(
        default=None,
        metadata={"help": "Maximum number of label texts that are embedded at a time. Default: no maximum."},
    )
    label_chunk_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of label tokens, with padding, that are embedded at a time. Lower it if memory "
            "runs out. Default: no maximum for a static encoder, and 8192 for other encoders."
        },
    )
    sparse_updates: bool = field(
        default=False,
        metadata={
            "help": "Update only those rows of a static encoder's table that a batch uses, with one second moment for "
            "each row: `hf_xmc.training.row_adam.RowAdam` in place of `optim`."
        },
    )
    word_rarity: float = field(
        default=0.0,
        metadata={
            "help": "Exponent of the inverse document frequency that multiplies the learning rate of a token's vector; "
            "above 0, frequent tokens learn more slowly. It needs `sparse_updates`: see "
            "`hf_xmc.training.learning_rates.token_rates`."
        },
    )
    label_vectors: float = field(
        default=0.0,
        metadata={
            "help": "Learning rate of a vector for each label that is added to the embedding of its text, as a "
            "fraction of `learning_rate`; 0 for no such vectors. They start at zero, and the encoder does not "
            "contain them: see `hf_xmc.training.label_vectors.LabelVectors`."
        },
    )
    vote_loss: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a second loss, which moves training queries with the same labels near each other, so "
            "that a memory predicts better; 0 for none: see `hf_xmc.training.vote_loss.VoteLoss`."
        },
    )
    vote_start: float = field(
        default=0.0, metadata={"help": "Fraction of the steps before `vote_loss` begins, at least 0 and below 1."}
    )
    vote_queries: int = field(
        default=2000,
        metadata={
            "help": "Maximum number of training queries that `vote_loss` embeds per step and process, besides the "
            "batch; 0 for the batch alone."
        },
    )
    # `None` is refused. It is in the type because HfArgumentParser then reads the option as text.
    word_learning_rate_factor: float | str | None = field(
        default="auto",
        metadata={
            "help": "Learning rate of the word vectors of a transformer, as a multiple of `learning_rate`. `auto`: a "
            "factor computed from the word counts if Adam trains on a sample of the labels (`fresh`, `bank`), where "
            "word vectors would learn too slowly; otherwise 1."
        },
    )
    on_nonfinite: NonFinitePolicy = field(
        default="stop",
        metadata={
            "help": "What to do with an update whose loss or gradient is NaN or infinite. `stop`: raise an error that "
            "names the rows of the batch. `skip`: leave the update out, on every process."
        },
    )

    def __post_init__(self) -> None:
        drop_last = self.dataloader_drop_last
        super().__post_init__()
        # sentence-transformers 6.x sets dataloader_drop_last on several processes, because its own losses hang if the
        # last batches differ in size. This trainer gathers batches of any size.
        self.dataloader_drop_last = drop_last
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is no device to copy to, and torch warns in every epoch
        self.check()

    def check(self) -> None:
        """Check all values; called again for each trial of a hyperparameter search.

        Raises:
            ValueError: if an argument has no effect in this trainer, or is out of range.
        """
        check_arguments(self)
        if self.label_mode is not None and self.label_mode not in LABEL_MODES:
            raise ValueError(f"label_mode must be one of {', '.join(LABEL_MODES)}, got {self.label_mode!r}.")
        if not 0 < self.label_sample_fraction <= 1:
            raise ValueError(
                f"label_sample_fraction must be greater than 0 and at most 1, got {self.label_sample_fraction}."
            )
        for name in ("label_bank_max_age", "num_positives", "label_chunk_size", "label_chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name in ("num_hard_negatives", "num_random_negatives", "vote_queries"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        for name in ("word_rarity", "label_vectors", "vote_loss"):
            value = getattr(self, name)
            if not (isinstance(value, float | int) and 0 <= value < math.inf):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}.")
        if not 0 <= self.vote_start < 1:
            raise ValueError(f"vote_start must be at least 0 and below 1, got {self.vote_start}.")
        if isinstance(self.word_learning_rate_factor, str):  # as a command line or a trial of a search gives a number
            with suppress(ValueError):
                self.word_learning_rate_factor = float(self.word_learning_rate_factor)
        factor = self.word_learning_rate_factor
        if factor != "auto" and not (isinstance(factor, float | int) and 0 < factor < math.inf):
            raise ValueError(f"word_learning_rate_factor must be 'auto' or a positive number, got {factor!r}.")
        if self.on_nonfinite not in get_args(NonFinitePolicy):
            raise ValueError(f"on_nonfinite must be 'stop' or 'skip', got {self.on_nonfinite!r}.")
