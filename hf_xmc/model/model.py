"""The model that users hold: an encoder and its labels. Text goes in, label text comes out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from datasets import Dataset

from hf_xmc.data.labels import LabelTexts
from hf_xmc.encoders.encode import compares_by_cosine
from hf_xmc.hub import card, release, repository
from hf_xmc.hub.manifest import CALIBRATION, LABEL_INDEX, PARTS, TRAINING_MEMORY, files_of_part
from hf_xmc.model.predictor import Predictor
from hf_xmc.model.searcher import HOW_TO_INDEX
from hf_xmc.search.exact import LabelIndex
from hf_xmc.search.grouped import GroupedIndex

logger = logging.getLogger(__name__)


class XMCModel(Predictor):
    """An encoder with an index of its labels.

    Args:
        encoder: any ``SentenceTransformer``, such as :class:`hf_xmc.XMCTrainer` leaves.
        labels: label texts, or a data set with a column ``text`` and, where labels have names of their own outside,
            ``label_id``, and ``seen``, whether a label was in the training. An id in several rows is one label with
            several texts: it scores as the best of them, and shows the first. Without any label, the model holds the
            encoder alone, and predicts nothing yet.
        embeddings: ``(L, D)``, the embeddings of the rows, scaled to unit norm if the encoder compares by the cosine.
            By default they are computed.

    Labels are found by the encoder's own similarity, the cosine or the dot product.

    ``long_text`` says what becomes of texts that are longer than the encoder reads: ``"truncate"``, what is behind is
    not read; ``"mean"``, the mean of the embeddings of their chunks; ``"max"``, a label scores as in the chunk that it
    scores highest in. It is not saved. ``card`` is the text of the model card, where one was loaded or set: saving
    brings its number of labels up to date, and a push its repository. Without, one is made of what is known.

    Raises:
        ValueError: if there are no labels, the embeddings do not fit the labels, or the encoder compares by a distance.

    >>> model = XMCModel.from_pretrained("runs/demo/model")  # doctest: +SKIP
    >>> model.predict("a small boat with a sail", top_k=3)  # doctest: +SKIP
    """

    card: str | None = None
    _index: LabelIndex

    @property
    def index(self) -> LabelIndex:
        """The index of label texts, one row per text. Set a :class:`hf_xmc.FaissIndex` to search faster.

        Raises:
            ValueError: if it is set to something else, or to an index of another number of texts or dimensions.
        """
        return self._index

    @index.setter
    def index(self, index: LabelIndex) -> None:
        if not isinstance(index, LabelIndex) or isinstance(index, GroupedIndex):
            raise ValueError(f"`index` must be a LabelIndex or a FaissIndex, got {type(index).__name__}.")
        expected = len(self.table.texts), self.encoder.get_embedding_dimension()
        if (index.num_labels, index.embedding_dim) != expected:
            raise ValueError(
                f"`index` must be of {expected[0]} label texts with {expected[1]} dimensions, got "
                f"{index.num_labels} with {index.embedding_dim}. Make it of `model.index.embeddings`."
            )
        if self.calibration is not None and not torch.equal(index.embeddings, self._index.embeddings):
            self._forget_calibration("Another index")
        self._index = index

    def add_labels(self, labels: Sequence[str] | Dataset, *, length: float | None = None) -> None:
        """Append labels, which can be predicted at once; nothing is trained.

        Args:
            labels: as in the class; several rows of one ``label_id`` are texts of one label. Texts without ids get the
                next free numbers. ``seen`` is false unless it is given.
            length: of their embeddings. Where an encoder leaves it free, training makes it tell how frequent a label
                is; that of a label it has not seen tells nothing, and one for all finds rare labels better.

        Raises:
            ValueError: if a label id already exists, or ``length`` is not positive or has no effect. The model is
                unchanged after an error.
        """
        if length is not None and not length > 0:
            raise ValueError(f"length must be positive, got {length}.")
        if length is not None and compares_by_cosine(self.encoder):
            raise ValueError("the encoder compares by the cosine, to which length means nothing: leave it out.")
        table, new = self.table.added(labels)
        embeddings = self._embed_labels(new.texts["text"])
        if length is not None:
            embeddings = length * torch.nn.functional.normalize(embeddings)
        self._change(lambda: self.index.add(embeddings), table, np.arange(len(self.table)))

    def remove_labels(self, label_ids: Iterable[str]) -> None:
        """Remove labels by the ids that :meth:`predict` shows. The rows of the remaining labels close up, as in a list.

        Raises:
            ValueError: if an id is not an id of a label, or no label would be left.
        """
        self._keep(self.table.visible(None, label_ids))

    def rename_label(self, label_id: str, text: str) -> None:
        """Replace the preferred text of a label. The label keeps its id, row, votes and other texts."""
        table, row = self.table.renamed(int(self.table.rows_of([label_id])[0]), text)
        self.index.replace([row], self._embed_labels([text]))
        self.table = table

    def _keep(self, labels: np.ndarray) -> None:
        if not labels.any():
            raise ValueError("no label would be left: a model predicts one of its labels.")
        table = self.table.kept(labels)
        gone = np.flatnonzero(~labels[self.table.label_of])
        self._change(lambda: self.index.remove(gone), table, np.flatnonzero(labels))

    def _change(self, change_index: Callable[[], None], table: LabelTexts, kept: np.ndarray) -> None:
        """Take another table, of which the first rows are the labels ``kept``. The index is the last that can fail."""
        renumbered = copy(self.memory)
        if renumbered is not None:
            renumbered.keep_labels(kept, len(table))
        change_index()
        if self.memory is not None and renumbered is not None:
            self.memory.relevance = renumbered.relevance
        self.table = table

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that :meth:`from_pretrained` reads, and ``SentenceTransformer(folder)`` alone too."""
        self._save(folder)

    def _save(self, folder: str | Path, repo_id: str | None = None) -> None:
        index = partial(release.write_label_index, labels=self.table.texts, index=self.index)
        parts: dict[str, release.Writer] = {LABEL_INDEX: index} if len(self.labels) else {}
        if self.memory is not None:
            parts[TRAINING_MEMORY] = partial(release.write_training_memory, memory=self.memory)
        if self.calibration is not None:
            parts[CALIBRATION] = partial(release.write_calibration, calibration=self.calibration)
        remembered = 0 if self.memory is None else self.memory.relevance.shape[0]
        text = self.card or card.of_model(self.encoder, len(self.labels), remembered)
        release.save(folder, self.encoder, parts, card.brought_up_to_date(text, len(self.labels), repo_id))

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
            repo_id: ``org/name`` of the repository, which is created if it does not exist.
            private: who may see a repository that is made.
            revision, create_pr: the branch to commit to, which is created if it does not exist; or open a pull request.
            commit_message, token: as everywhere on the Hub.

        Returns the address of the commit, or of the pull request.
        """
        with TemporaryDirectory() as folder:
            self._save(Path(folder) / "release", repo_id)
            return repository.push(
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
        allow: Iterable[str] | None = None,
        deny: Iterable[str] | None = None,
        allow_patterns: str | list[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        device: str | None = None,
    ) -> XMCModel:
        """Read a saved model, once every file is found to be the one that was saved.

        A model of sentence-transformers that was not saved by this package loads too. It has no labels; give some.

        Args:
            name: a folder, or ``org/name`` of a model of the Hub.
            labels: labels to embed and predict instead of the saved ones, whose index is then neither downloaded
                nor read.
            allow, deny: ids of the labels to keep, or to leave out: these take no memory, and have no votes.
            allow_patterns: which files may be downloaded and read in addition to the encoder, as on the Hub; ``[]`` is
                the encoder alone, ``"label_index/*"`` the labels without a memory. Label index, memory and
                calibration are taken whole or not at all. Memory and calibration need the label index, and a
                calibration needs the memory whose votes it was fitted with.
            revision, token, cache_dir, local_files_only, force_download: as everywhere on the Hub. If the Hub does not
                answer, what is cached is used.
            device: where the encoder goes; by default the best there is.

        Raises:
            FileNotFoundError: if ``name`` is neither a folder nor the name of a repository.
            ValueError: if the model is not whole or not the one that was saved, or if it can neither be downloaded nor
                be found in the cache.
        """
        place = repository.source(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        parts: Collection[str] = PARTS if labels is None else ()
        folder = repository.find(place, parts=parts, allow_patterns=allow_patterns)
        saved = None
        if folder is not None:
            parts = repository.allowed(folder, parts, allow_patterns)
            saved = release.load(folder, device, parts)
        if labels is None and (saved is None or LABEL_INDEX not in saved.parts):
            logger.warning("%s is an encoder without labels, and predicts nothing yet: %s.", name, HOW_TO_INDEX)
        if saved is None:
            return cls(repository.plain_encoder(place, device), labels)._restricted(allow, deny)
        embeddings = None
        if LABEL_INDEX in saved.parts:
            labels, embeddings = release.read_label_index(saved)
        model = cls(saved.encoder, labels, embeddings)
        model.memory = release.read_training_memory(saved)
        calibration = release.read_calibration(saved)
        if model.memory is None and files_of_part(saved.files, TRAINING_MEMORY):
            if calibration is not None:
                logger.info("The calibration of %s is for scores with its memory, and is left out with it.", name)
        else:
            model.calibration = calibration
        model.card = saved.card if parts else None  # one of other labels
        model._restricted(allow, deny)
        model.index = release.read_index(saved, model.index)
        return model

    def _restricted(self, allow: Iterable[str] | None, deny: Iterable[str] | None) -> XMCModel:
        if allow is not None or deny is not None:
            self._keep(self.table.visible(allow, deny))
        return self
