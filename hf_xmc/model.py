"""What users hold: an encoder and its labels. Text goes in, label text comes out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence, Sized
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm.auto import tqdm

from hf_xmc import card, hub, release
from hf_xmc.calibration import Calibration
from hf_xmc.data import relevance_of
from hf_xmc.grouped_index import GroupedIndex
from hf_xmc.index import LabelIndex, TopK
from hf_xmc.label_table import LabelTable
from hf_xmc.manifest import CALIBRATION, LABEL_INDEX, PARTS, TRAINING_MEMORY
from hf_xmc.memory import TrainingMemory

logger = logging.getLogger(__name__)

PREDICT_BATCH = 1024
HOW_TO_INDEX = (
    "XMCModel.from_pretrained(name, labels=[...]) embeds labels and indexes them, and so does "
    "`hf-xmc index name --labels FILE --output_dir FOLDER`"
)


class Prediction(NamedTuple):
    """One label of a text."""

    label_id: str
    text: str
    score: float


class XMCModel:
    """An encoder with an index of its labels.

    Args:
        encoder: any ``SentenceTransformer``, such as :class:`hf_xmc.XMCTrainer` leaves.
        labels: label texts, or a data set with a column ``text`` and, where labels have names of their own outside,
            ``label_id``, and ``seen``, whether a label was in the training. An id in several rows is one label with
            several texts: it scores as the best of them, and shows the first. Without any label, the model holds the
            encoder alone, and predicts nothing yet.
        embeddings: ``(L, D)``, those of the rows; by default they are computed.

    ``card`` is the text of the model card, where one was loaded or set; without, one is made of what is known.

    Raises:
        ValueError: no label, or embeddings that are not those of the labels.

    >>> model = XMCModel.from_pretrained("runs/demo/model")  # doctest: +SKIP
    >>> model.predict("a small boat with a sail", top_k=3)  # doctest: +SKIP
    """

    def __init__(
        self,
        encoder: SentenceTransformer,
        labels: Sequence[str] | Dataset | None = None,
        embeddings: Tensor | None = None,
    ) -> None:
        if labels is not None and not len(labels):
            raise ValueError("there is no label: a model predicts one of its labels.")
        self.encoder = encoder
        self.card: str | None = None
        self.memory: TrainingMemory | None = None
        self.calibration: Calibration | None = None
        self.table, order = LabelTable.of([] if labels is None else labels)
        given = self._embed_labels(self.table) if embeddings is None else embeddings.detach().cpu()
        expected = len(order), encoder.get_embedding_dimension() or 0
        if tuple(given.shape) != expected:
            raise ValueError(
                f"embeddings have shape {tuple(given.shape)}; expected {expected}: a row for each label, made by this "
                "encoder."
            )
        in_order = embeddings is None or bool((order == np.arange(len(order))).all())
        self.index = LabelIndex(given if in_order else given[torch.from_numpy(order)])

    @property
    def labels(self) -> Dataset:
        """A row for each label: ``label_id``, its preferred ``text``, and, where it is known of any, ``seen``: whether
        the label was in the training."""
        return self.table.labels

    def search(
        self,
        texts: Sequence[str],
        top_k: int,
        *,
        exclude: np.ndarray | None = None,
        allow: Iterable[int] | None = None,
        deny: Iterable[int] | None = None,
    ) -> TopK:
        """The best labels of each text as row numbers and scores; arguments as in :meth:`LabelIndex.search`."""
        queries = self.embed(texts)
        if self.memory is None:
            return self.label_index.search(queries, top_k, exclude=exclude, allow=allow, deny=deny)
        return self.memory.search(queries, top_k, self.label_index, exclude=exclude, allow=allow, deny=deny)

    @property
    def label_index(self) -> LabelIndex:
        """:attr:`index`, which is of texts, as one of labels; the same where each label has one text."""
        return GroupedIndex(self.index, self.table.label_of) if self.table.several else self.index

    def embed(self, texts: Sequence[str]) -> Tensor:
        """``(N, D)`` embeddings of queries."""
        if not len(self.labels):
            raise ValueError(f"the model has no label to predict: {HOW_TO_INDEX}.")
        queries = self.encoder.encode_query(list(texts), convert_to_tensor=True, batch_size=PREDICT_BATCH)
        return queries.float().cpu().reshape(len(texts), self.index.embedding_dim)  # of no text, `encode` makes (0,)

    def remember(self, queries: Dataset) -> None:
        """Let queries with known labels vote from now on, see :class:`hf_xmc.TrainingMemory`; nothing is trained.

        Args:
            queries: columns ``text`` and ``label_ids``, rows of :attr:`labels`: those of the training, or newer ones.
        """
        texts = list(queries["text"])
        known = self.embed(texts).half(), relevance_of(queries, len(self.labels)), texts
        if self.memory is None:
            self.memory = TrainingMemory(*known)
        else:
            self.memory.add(*known)

    def tune_memory(self, validation: Dataset, **settings: Any) -> dict[str, Any]:
        """Choose how the votes count on queries that the memory does not hold; as :meth:`hf_xmc.TrainingMemory.tune`.

        Args:
            validation: columns ``text`` and ``label_ids``.
            settings: ``metric``, ``inverse_propensity``, ``tolerance``, ``exclude``.
        """
        if self.memory is None:
            raise ValueError("there is no memory to tune: call `remember` with the training queries first.")
        queries, relevance = self.embed(validation["text"]), relevance_of(validation, len(self.labels))
        return self.memory.tune(queries, relevance, self.index, **settings)

    def add_labels(self, labels: Sequence[str] | Dataset) -> None:
        """Labels that can be predicted from now on; nothing is trained. They come behind those that are there.

        Args:
            labels: as in the class; several rows of one ``label_id`` are texts of one label. Texts without ids get the
                next free numbers. ``seen`` is false unless it is given.

        Raises:
            ValueError: a label id that is there already. The model is then as before, as after any error here.
        """
        table, new = self.table.added(labels)
        self.index.add(self._embed_labels(new))
        self._renumber(np.arange(len(self.table)), table)

    def remove_labels(self, label_ids: Iterable[str]) -> None:
        """Labels that go, by the ids that :meth:`predict` shows. Rows of the others close up, as in a list.

        Raises:
            ValueError: an id that is none of the labels', or no label would be left.
        """
        self._keep(self.table.visible(None, label_ids))

    def rename_label(self, label_id: str, text: str) -> None:
        """Another text, in the place of the preferred one; the label keeps its id, row, votes and other texts."""
        table, row = self.table.renamed(int(self.table.rows_of([label_id])[0]), text)
        new = self.encoder.encode_document([text], convert_to_tensor=True)
        self.index.replace([row], new.detach().cpu())
        self.table = table

    def _keep(self, labels: np.ndarray) -> None:
        if not labels.any():
            raise ValueError("no label would be left: a model predicts one of its labels.")
        table = self.table.kept(labels)
        self.index.remove(np.flatnonzero(~labels[self.table.label_of]))
        self._renumber(np.flatnonzero(labels), table)

    def _renumber(self, kept: np.ndarray, table: LabelTable) -> None:
        if self.memory is not None:
            self.memory.keep_labels(kept, len(table))
        self.table = table

    def _embed_labels(self, table: LabelTable) -> Tensor:
        if not len(table):
            return torch.empty(0, self.encoder.get_embedding_dimension() or 0)
        texts = list(table.texts["text"])
        embeddings = self.encoder.encode_document(texts, convert_to_tensor=True, batch_size=PREDICT_BATCH)
        return embeddings.detach().cpu()

    @overload
    def predict(self, texts: str, top_k: int = 5, **choices: Any) -> list[Prediction]: ...

    @overload
    def predict(self, texts: Sequence[str], top_k: int = 5, **choices: Any) -> list[list[Prediction]]: ...

    def predict(  # type: ignore[misc]
        self,
        texts: str | Sequence[str],
        top_k: int = 5,
        *,
        allow: Iterable[str] | None = None,
        deny: Iterable[str] | None = None,
        show_progress_bar: bool = False,
    ) -> list[Prediction] | list[list[Prediction]]:
        """The best labels of each text, best first: all of them where there are fewer than ``top_k``.

        Args:
            texts: one text, which gives one list, or several, which give a list each. A blank text has no label.
            top_k: how many labels.
            allow, deny: ids of labels to choose from, or not to.
            show_progress_bar: on standard error.

        Scores are the encoder's dot products, to compare labels of one text by.
        """
        one = [texts] if isinstance(texts, str) else texts
        predictions = self.predict_stream(one, top_k, allow=allow, deny=deny, show_progress_bar=show_progress_bar)
        return next(predictions) if isinstance(texts, str) else list(predictions)

    def predict_stream(
        self,
        texts: Iterable[str],
        top_k: int = 5,
        *,
        allow: Iterable[str] | None = None,
        deny: Iterable[str] | None = None,
        show_progress_bar: bool | None = False,
    ) -> Iterator[list[Prediction]]:
        """:meth:`predict` for texts without end: 1024 are read and answered at a time, and none is kept.

        Args:
            show_progress_bar: on standard error; ``None`` where that is a terminal.
        """
        choice = {}
        if allow is not None or deny is not None:
            choice = {"allow": np.flatnonzero(self.table.visible(allow, deny))}
        total = len(texts) if isinstance(texts, Sized) else None
        off = None if show_progress_bar is None else not show_progress_bar
        remaining, number = iter(texts), 0
        with tqdm(total=total, unit=" texts", disable=off) as bar:
            while block := list(islice(remaining, PREDICT_BATCH)):
                for place, text in enumerate(block, start=number):
                    if not isinstance(text, str):
                        raise ValueError(f"text {place} is a {type(text).__name__}; expected a string.")
                yield from self._predict_block(block, top_k, **choice)
                number += len(block)
                bar.update(len(block))

    def _predict_block(self, texts: list[str], top_k: int, **choice: Any) -> list[list[Prediction]]:
        written = [number for number, text in enumerate(texts) if text.strip()]
        found = self.search([texts[number] for number in written], min(top_k, len(self.labels)), **choice)
        chosen = np.unique(found.label_ids)
        chosen = chosen[chosen >= 0]
        rows = self.labels[chosen.tolist()]  # `select` would take longer than the search
        named = zip(chosen.tolist(), rows["label_id"], rows["text"], strict=True)
        name = {label: (label_id, text) for label, label_id, text in named}
        predictions: list[list[Prediction]] = [[] for _ in texts]
        for number, label_ids, scores in zip(written, *(part.tolist() for part in found), strict=True):
            predictions[number] = [
                Prediction(*name[label], score) for label, score in zip(label_ids, scores, strict=True) if label >= 0
            ]
        return predictions

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that :meth:`from_pretrained` reads, and ``SentenceTransformer(folder)`` alone too."""
        self._save(folder, card.SOME_REPOSITORY)

    def _save(self, folder: str | Path, repo_id: str) -> None:
        index = partial(release.write_label_index, labels=self.table.texts, embeddings=self.index.embeddings)
        parts: dict[str, release.Writer] = {LABEL_INDEX: index} if len(self.labels) else {}
        if self.memory is not None:
            parts[TRAINING_MEMORY] = partial(release.write_training_memory, memory=self.memory)
        if self.calibration is not None:
            parts[CALIBRATION] = partial(release.write_calibration, calibration=self.calibration)
        remembered = 0 if self.memory is None else self.memory.relevance.shape[0]
        text = self.card or card.of_model(self.encoder, len(self.labels), remembered)
        release.save(folder, self.encoder, parts, text.replace(card.SOME_REPOSITORY, repo_id))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Encoder and label index",
        token: str | bool | None = None,
    ) -> str:
        """Publish encoder, labels and index in one commit; :func:`hf_xmc.hub.push` says what happens if that fails.

        Args:
            repo_id: ``org/name`` of the repository, which is made if there is none.
            private: who may see a repository that is made.
            revision, create_pr: the branch to commit to, which is made if there is none; or open a pull request.
            commit_message, token: as everywhere on the Hub.

        Returns the address of the commit, or of the pull request.
        """
        with TemporaryDirectory() as folder:
            self._save(Path(folder) / "release", repo_id)
            return hub.push(
                Path(folder) / "release",
                repo_id,
                private=private,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                token=token,
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        labels: Sequence[str] | Dataset | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        device: str | None = None,
    ) -> XMCModel:
        """Read a saved model, once every file is found to be the one that was saved.

        A model of sentence-transformers that was not saved by this package loads too. It has no labels; give some.

        Args:
            name: a folder, or ``org/name`` of a model of the Hub.
            labels: labels to predict in the place of those that the model was saved with, whose index is then neither
                downloaded nor read. They are embedded.
            revision, token, cache_dir, local_files_only: as everywhere on the Hub.
            device: where the encoder goes; by default the best there is.

        Raises:
            FileNotFoundError: a path that leads nowhere.
            ValueError: the model is not whole, not the one that was saved, or not to be found.
        """
        where: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        where["local_files_only"] = local_files_only
        parts = PARTS if labels is None else ()
        folder = hub.find(name, parts=parts, **where)
        if folder is None:
            if labels is None:
                logger.warning("%s is an encoder without labels, and predicts nothing yet: %s.", name, HOW_TO_INDEX)
            return cls(hub.plain_encoder(str(name), device=device, **where), labels)
        saved = release.load(folder, device, parts)
        embeddings = None
        if LABEL_INDEX in saved.parts:
            labels, embeddings = release.read_label_index(saved)
        model = cls(saved.encoder, labels, embeddings)
        model.memory = release.read_training_memory(saved)
        model.calibration = release.read_calibration(saved)
        model.card = saved.card if parts else None  # one of other labels
        return model
