"""What the training loop needs beside the stock arguments, and nothing twice."""

from __future__ import annotations

from dataclasses import dataclass, field

from sentence_transformers import SentenceTransformerTrainingArguments


@dataclass
class XMCTrainingArguments(SentenceTransformerTrainingArguments):
    """Stock arguments of sentence-transformers, and how labels are embedded.

    The temperature, k and alpha belong to the loss, pooling and normalisation to the encoder.
    """

    label_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Labels embedded at a time; lower it if memory runs out. By default 1024, and all at once for a "
            "static encoder, which keeps no activations."
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
        super().__post_init__()
        if self.label_chunk_size is not None and self.label_chunk_size < 1:
            raise ValueError(f"label_chunk_size must be at least 1, got {self.label_chunk_size}.")
        if self.on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite is 'stop' or 'skip', got {self.on_nonfinite!r}.")
