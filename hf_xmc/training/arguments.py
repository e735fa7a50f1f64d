"""Training arguments in addition to those of sentence-transformers."""

from __future__ import annotations

from dataclasses import dataclass, field

from sentence_transformers import SentenceTransformerTrainingArguments

from hf_xmc.training.refusals import refuse_arguments

LABEL_MODES = ("exact", "fresh", "bank", "mined")


@dataclass
class XMCTrainingArguments(SentenceTransformerTrainingArguments):
    """Stock arguments of sentence-transformers, which labels take part in a step, and how they are embedded.

    The temperature, k and alpha belong to the loss, pooling and normalisation to the encoder.
    """

    label_mode: str | None = field(
        default=None,
        metadata={
            "help": "`exact`: all labels, embedded twice with gradient caching. `fresh`: all labels are scored, and "
            "a sample of them carries the gradient, unbiased. `bank`: remembered embeddings propose a sample, which "
            "alone is embedded. `mined`: the labels of the batch, hard negatives and random labels. By default "
            "`exact` for a static encoder, to which labels cost nothing, and `fresh` for others."
        },
    )
    label_sample_share: float = field(
        default=0.05,
        metadata={
            "help": "Fraction of the labels that `fresh` and `bank` sample; `bank` adds the batch's positives. Word "
            "vectors then learn faster under Adam, unless `learning_rate_mapping` has a rate for them."
        },
    )
    label_bank_max_age: int = field(
        default=50, metadata={"help": "Batches after which `bank` embeds a label that was not drawn, to remember it."}
    )
    num_hard_negatives: int = field(default=1, metadata={"help": "Mined labels that `mined` draws for each query."})
    num_random_negatives: int = field(default=0, metadata={"help": "Labels that `mined` draws from all, a step."})
    num_positives: int | None = field(
        default=None,
        metadata={
            "help": "Positives of a query that a step draws, by their weight; the others are neither positives nor "
            "negatives in it. By default all."
        },
    )
    label_chunk_size: int | None = field(
        default=None, metadata={"help": "Labels embedded at a time, at most. By default as many as their tokens allow."}
    )
    label_chunk_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of labels, with padding, embedded at a time; lower it if memory runs out. By default 8192, "
            "and all at once for a static encoder, which keeps no activations."
        },
    )
    on_nonfinite: str = field(
        default="stop",
        metadata={
            "help": "What to do with an update whose loss or gradient is NaN or infinite: stop, naming the rows of the "
            "batch, or skip it on every process.",
            "choices": ["stop", "skip"],
        },
    )

    def __post_init__(self) -> None:
        drop_last = self.dataloader_drop_last
        super().__post_init__()
        self.dataloader_drop_last = drop_last  # several processes may have uneven batches here; the stock losses hang
        self.check()

    def check(self) -> None:
        """Raise ``ValueError`` for a value that cannot be followed; a trial of a search is checked too."""
        refuse_arguments(self)
        if self.label_mode is not None and self.label_mode not in LABEL_MODES:
            raise ValueError(f"label_mode is one of {', '.join(LABEL_MODES)}, got {self.label_mode!r}.")
        if not 0 < self.label_sample_share <= 1:
            raise ValueError(f"label_sample_share is a share above 0 and up to 1, got {self.label_sample_share}.")
        for name in ("label_bank_max_age", "num_positives", "label_chunk_size", "label_chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name in ("num_hard_negatives", "num_random_negatives"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        if self.on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite is 'stop' or 'skip', got {self.on_nonfinite!r}.")
