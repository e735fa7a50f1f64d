"""What users hold: an encoder and its labels. Text goes in, label text comes out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from datasets import Dataset, Features, Value
from sentence_transformers import SentenceTransformer
from torch import Tensor

from hf_xmc import card, hub, release
from hf_xmc.data import relevance_of
from hf_xmc.index import LabelIndex, TopK
from hf_xmc.manifest import LABEL_INDEX, PARTS, TRAINING_MEMORY
from hf_xmc.memory import TrainingMemory

logger = logging.getLogger(__name__)

PREDICT_BATCH = 1024
HOW_TO_INDEX = (
    "XMCModel.from_pretrained(name, labels=[...]) embeds labels and indexes them, and so does "
    "`hf-xmc index name --labels FILE --output_dir FOLDER`"
)
NO_LABELS = Features({"label_id": Value("string"), "text": Value("string")})


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
            ``label_id``. Without any, the model holds the encoder alone, and predicts nothing yet.
        embeddings: ``(L, D)``, those of the labels; by default they are computed.

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
        dim = encoder.get_embedding_dimension() or 0
        if labels is not None and not len(labels):
            raise ValueError("there is no label: a model predicts one of its labels.")
        if labels is None:
            table, embeddings = Dataset.from_dict({"label_id": [], "text": []}, NO_LABELS), torch.empty(0, dim)
        else:
            table = labels if isinstance(labels, Dataset) else Dataset.from_dict({"text": list(labels)})
        if "label_id" not in table.column_names:
            table = table.add_column("label_id", [str(row) for row in range(len(table))])
        self.encoder = encoder
        self.card: str | None = None
        self.memory: TrainingMemory | None = None
        self.labels = table.select_columns(["label_id", "text"])
        if embeddings is None:
            texts = list(self.labels["text"])
            embeddings = encoder.encode_document(texts, convert_to_tensor=True, batch_size=PREDICT_BATCH)
        self.index = LabelIndex(embeddings.detach().cpu())
        if (self.index.num_labels, self.index.embedding_dim) != (len(table), dim):
            raise ValueError(
                f"embeddings have shape {tuple(embeddings.shape)}; expected ({len(table)}, {dim}): a row for each "
                "label, made by this encoder."
            )

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
            return self.index.search(queries, top_k, exclude=exclude, allow=allow, deny=deny)
        return self.memory.search(queries, top_k, self.index, exclude=exclude, allow=allow, deny=deny)

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

    @overload
    def predict(self, texts: str, top_k: int = 5) -> list[Prediction]: ...  # type: ignore[overload-overlap]

    @overload
    def predict(self, texts: Sequence[str], top_k: int = 5) -> list[list[Prediction]]: ...

    def predict(self, texts: str | Sequence[str], top_k: int = 5) -> list[Prediction] | list[list[Prediction]]:
        """The best labels of each text, best first: all of them where there are fewer than ``top_k``.

        Args:
            texts: one text, which gives one list, or several, which give a list each. A blank text has no label.
            top_k: how many labels.

        Scores are the encoder's dot products, to compare labels of one text by.
        """
        if isinstance(texts, str):
            return self.predict([texts], top_k)[0]
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"text {number} is a {type(text).__name__}; expected a string.")
        written = [number for number, text in enumerate(texts) if text.strip()]
        found = self.search([texts[number] for number in written], min(top_k, self.index.num_labels))
        chosen = np.unique(found.label_ids)
        chosen = chosen[chosen >= 0]
        rows = {int(label): row for label, row in zip(chosen, self.labels.select(chosen), strict=True)}
        predictions: list[list[Prediction]] = [[] for _ in texts]
        for number, label_ids, scores in zip(written, *(part.tolist() for part in found), strict=True):
            predictions[number] = [
                Prediction(rows[label]["label_id"], rows[label]["text"], score)
                for label, score in zip(label_ids, scores, strict=True)
            ]
        return predictions

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that :meth:`from_pretrained` reads, and ``SentenceTransformer(folder)`` alone too."""
        self._save(folder, card.SOME_REPOSITORY)

    def _save(self, folder: str | Path, repo_id: str) -> None:
        index = partial(release.write_label_index, labels=self.labels, embeddings=self.index.embeddings)
        parts: dict[str, release.Writer] = {LABEL_INDEX: index} if len(self.labels) else {}
        if self.memory is not None:
            parts[TRAINING_MEMORY] = partial(release.write_training_memory, memory=self.memory)
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
        model.card = saved.card if parts else None  # one of other labels
        return model
