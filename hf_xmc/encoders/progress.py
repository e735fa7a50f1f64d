"""Hide progress bars of other libraries that say nothing: of files that are read at once, and of example texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from sentence_transformers.base import model_card
from transformers.utils import logging


@contextmanager
def no_file_bars() -> Iterator[None]:
    """Hide the progress bars of loading and saving weights within the block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# sentence-transformers 6.x draws example texts for the card when a trainer is made, with a bar that no argument hides.
@contextmanager
def no_card_bars() -> Iterator[None]:
    """Hide the progress bar of the example texts for the model card within the block."""
    names = vars(model_card)  # which does not export `tqdm`
    shown = names["tqdm"]
    names["tqdm"] = partial(shown, disable=True)
    try:
        yield
    finally:
        names["tqdm"] = shown
