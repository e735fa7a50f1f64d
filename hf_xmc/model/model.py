"""The model that users hold: an encoder and its labels. Text goes in, label text comes out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import scipy.sparse as sp
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch import Tensor

from hf_xmc.data.columns import as_dataset, check_is_list, texts_of
from hf_xmc.data.dataset import relevance_of
from hf_xmc.data.label_changes import LabelChanges, update_to
from hf_xmc.data.labels import LabelTexts
from hf_xmc.data.vocabulary import Vocabulary
from hf_xmc.encoders.long_text import LONG_TEXT, Truncation, max_tokens, truncation
from hf_xmc.hub import card, release, repository, space
from hf_xmc.hub.backends import Loading
from hf_xmc.hub.manifest import LAYOUT
from hf_xmc.metrics.calibration import Calibration, check_wanted, choose_threshold
from hf_xmc.model.answers import DEFAULT_TOP_K, MAX_LABELS, Answers, Choice, answer_stream
from hf_xmc.model.calibrated import FittedCalibration, ScoreSource, check_calibrated
from hf_xmc.model.description import describe
from hf_xmc.model.embeddings import (
    BATCH_SIZE,
    check_index,
    check_norm,
    checked_vectors,
    embed_label_texts,
    embed_queries,
    index_of_texts,
    own_share,
    warn_about_unknown,
)
from hf_xmc.model.explanation import Explanation, explain
from hf_xmc.model.hierarchy import Hierarchy
from hf_xmc.model.new_labels import NewLabels, check_reservable, learn_scores
from hf_xmc.model.own_votes import own_rows
from hf_xmc.model.predictions import Prediction
from hf_xmc.model.queries import Found, Queries
from hf_xmc.model.reranking import Reranker, Reranking
from hf_xmc.model.saved import read_model, writers
from hf_xmc.model.word_weights import WordWeights, weigh_words
from hf_xmc.search.contract import LabelSearch, visible_labels
from hf_xmc.search.exact import LabelIndex
from hf_xmc.search.grouped import label_index
from hf_xmc.search.memory import TrainingMemory
from hf_xmc.search.named import index_named
from hf_xmc.search.new_labels import NewLabelSearch
from hf_xmc.search.places import handicaps
from hf_xmc.storage.snapshots import DownloadSettings
from hf_xmc.tensors import unit_rows
from hf_xmc.topk import TopK, checked_k

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)

HOW_TO_INDEX = (
    "XMCModel.from_pretrained(name, labels=[...]) embeds labels and indexes them, and so does "
    "`hf-xmc index name --labels FILE --output_dir FOLDER`"
)


class XMCModel:
    """An encoder with an index of its labels.

    Labels are found by the encoder's own similarity, the cosine or the dot product.

    Args:
        encoder: Any ``SentenceTransformer``, such as :class:`hf_xmc.XMCTrainer` leaves.
        labels: Label texts, or a data set with a column ``text`` and optionally ``uid``, the external name of a label,
            and ``seen``, whether a label was in the training. Several rows with one ``uid`` are texts of one label: it
            scores as the best of them, and shows the first. Without labels, the model holds the encoder alone and
            predicts nothing yet.
        embeddings: ``(T, D)`` embeddings of the rows, scaled to unit norm if the encoder compares by the cosine; or an
            index of such embeddings, which is used as it is. By default they are computed, with ``label_vectors``
            added; given ones already contain them.
        label_vectors: ``(L, D)``, a vector for each label that is added to the embeddings of its texts, such as
            ``trainer.label_vectors()``.

    Attributes:
        encoder: The encoder.
        label_texts: The labels with all their texts.
        card: The model card, if one was loaded or set: a :class:`hf_xmc.XMCCard`, which is rendered again with the
            present numbers of labels and remembered queries, or a text, which is saved as it is. If it is ``None``, a
            card is made from the known facts.
        batch_size: Number of texts that are embedded at a time.

    Raises:
        ValueError: if ``labels`` is empty, the embeddings do not fit the labels, or the encoder compares by a distance.

    >>> from hf_xmc import static_encoder
    >>> labels = ["sailing boat", "red car"]
    >>> model = XMCModel(static_encoder(labels, embedding_dim=64, device="cpu"), labels)
    >>> [label.text for label in model.predict("an old red car", top_k=1)]
    ['red car']
    >>> model
    XMCModel(
      encoder: StaticEmbedding, 64 dimensions, dot product
      labels: 2, searched by LabelIndex
      memory: 0 queries, not calibrated
    )
    """

    def __init__(
        self,
        encoder: SentenceTransformer,
        labels: Sequence[str] | Dataset | None = None,
        embeddings: np.ndarray | Tensor | LabelIndex | None = None,
        label_vectors: np.ndarray | Tensor | None = None,
    ) -> None:
        if labels is not None and not len(labels):
            raise ValueError("`labels` must hold at least one label, got none. Leave it out for an encoder alone.")
        self.encoder = encoder
        self.card: card.XMCCard | str | None = None
        self.batch_size = BATCH_SIZE
        self.label_texts, order = LabelTexts.of(Dataset.from_dict({"text": []}) if labels is None else labels)
        if label_vectors is not None:
            label_vectors = checked_vectors(label_vectors, len(self.label_texts), encoder.get_embedding_dimension())
        self._label_vectors = label_vectors
        self._index = index_of_texts(encoder, self.label_texts, order, embeddings, label_vectors)
        self._memory: TrainingMemory | None = None
        self._long_text = "truncate"
        self._warned_of_cuts = False
        self._fitted: FittedCalibration | None = None
        self._new_labels = NewLabels()
        self._source: tuple[SentenceTransformer, Path] | None = None  # the loaded encoder, and where it was saved

    def __repr__(self) -> str:
        valid = self._fitted is not None and self._fitted.is_valid(self._score_source())
        return describe(self.encoder, self.label_texts, type(self.index).__name__, len(self.memory or ()), valid)

    # The parts of a model

    @property
    def labels(self) -> Dataset:
        """A row for each label: ``uid``, its preferred ``text`` and, if known, ``seen``: whether it was in training.

        ``parent_texts`` holds the texts of the parents of :meth:`add_labels`, one per line, if any label has some.
        """
        return self.label_texts.labels

    @property
    def index(self) -> LabelIndex:
        """The index of label texts, one row per text.

        Set ``"auto"`` to index the present embeddings as fits their number, ``"exact"`` to score all labels, a factory
        string of :class:`hf_xmc.FaissIndex`, or an index.

        Raises:
            ValueError: if it is set to something else, or to an index of another number of texts or dimensions.
        """
        return self._index

    @index.setter
    def index(self, index: LabelIndex | str) -> None:
        if isinstance(index, str):
            index = index_named(index, self._index.embeddings)
        check_index(index, len(self.label_texts.texts), self.encoder.get_embedding_dimension())
        same = index.embeddings.data_ptr() == self._index.embeddings.data_ptr()
        if not same and self.calibration is not None and not torch.equal(index.embeddings, self._index.embeddings):
            self._forget_calibration("Another index")
        self._index = index

    @property
    def label_index(self) -> LabelSearch:
        """An index of labels, made from :attr:`index`; the same index if each label has one text."""
        return label_index(self.index, self.label_texts)

    @property
    def label_vectors(self) -> Tensor | None:
        """The vector of each label ``(L, D)``, which :attr:`index` contains; ``None`` if no label has one.

        They come from a training with ``label_vectors``. A renamed label keeps its vector, and that of a new label is
        zero.
        """
        return self._label_vectors

    @property
    def memory(self) -> TrainingMemory | None:
        """Queries that vote, see :meth:`remember`. Setting it ends the calibration."""
        return self._memory

    @memory.setter
    def memory(self, memory: TrainingMemory | None) -> None:
        self._forget_calibration("The memory")
        self._memory = memory

    @property
    def long_text(self) -> str:
        """How to read texts that are longer than the encoder reads. It is not saved.

        ``"truncate"`` reads the beginning. ``"mean"`` takes the mean of the embeddings of all chunks. ``"max"`` gives
        a label the score of the chunk in which it scores highest.

        Raises:
            ValueError: if it is set to another value.
        """
        return self._long_text

    @long_text.setter
    def long_text(self, value: str) -> None:
        if value not in LONG_TEXT:
            raise ValueError(f"`long_text` must be one of {', '.join(LONG_TEXT)}, got {value!r}.")
        self._long_text = value

    @property
    def calibration(self) -> Calibration | None:
        """The map from scores to probabilities, see :meth:`calibrate`. It ends when the memory changes."""
        if self._fitted is None:
            return None
        now = self._score_source()
        if not self._fitted.is_valid(now):
            self._forget_calibration("The memory")
            return None
        apart = partial(self._new_labels.are_all_added, labels=self.label_texts, memory=self.memory)
        self._fitted = self._fitted.moved_to(now, max_tokens(self.encoder) is not None, apart)
        return self._fitted.calibration

    @calibration.setter
    def calibration(self, calibration: Calibration | None) -> None:
        self._fitted = None if calibration is None else FittedCalibration(calibration, self._score_source())

    def _score_source(self) -> ScoreSource:
        return ScoreSource.of(self.memory, self.label_texts, self.long_text)

    def _forget_calibration(self, reason: str) -> None:
        if self._fitted is not None:
            logger.warning("%s changes what scores mean: call `calibrate` again.", reason)
            self._fitted = None

    def _check_calibrated(self, reranking: Reranking | None, required: bool) -> None:
        fitted = None if self.calibration is None else self._fitted
        check_calibrated(fitted, reranking, required)

    # Texts to labels

    @overload
    def predict(self, texts: str, top_k: int | None = None, **choices: Any) -> list[Prediction]: ...

    @overload
    def predict(self, texts: Sequence[str], top_k: int | None = None, **choices: Any) -> list[list[Prediction]]: ...

    def predict(  # type: ignore[misc]
        self,
        texts: str | Sequence[str],
        top_k: int | None = None,
        *,
        threshold: float | None = None,
        allow: Iterable[str] | None = None,
        deny: Iterable[str] | None = None,
        hierarchy: Hierarchy | None = None,
        rerank: Reranker | None = None,
        rerank_top_k: int | None = None,
        new: int | None = None,
        show_progress_bar: bool = False,
    ) -> list[Prediction] | list[list[Prediction]]:
        """Return the best labels of each text, best first.

        Args:
            texts: One text, which gives one list, or several, which give a list each. A blank text has no label.
                Neither has a text that embeds to zero because the encoder knows none of its tokens.
            top_k: Maximum number of labels of a text. By default 5, or with a threshold all that reach it, 200 at most.
            threshold: Minimum probability of a label, from 0 to 1, for a calibrated model. A text may have no label.
            allow, deny: The uids of the labels to choose from, or not to choose.
            hierarchy: Lets scores rise from labels to their ancestors, see :meth:`hf_xmc.Hierarchy.roll_up`.
            rerank: A function ``(text, [Candidate(uid, text, score), ...]) -> scores``, or a ``CrossEncoder``, that
                gives the best labels of a text new scores. Only labels that it scores are returned. A calibrated model
                must be calibrated with the same ``rerank``.
            rerank_top_k: Number of labels of a text that ``rerank`` scores, 50 by default.
            new: Number of places at the end of the ``top_k`` to reserve for new labels; see below.
            show_progress_bar: Whether to show a progress bar on standard error.

        Raises:
            ValueError: if an argument is not of this form, there is a threshold or ``new`` and the model is not
                calibrated, or the model was calibrated with another ``rerank`` or ``rerank_top_k``.

        In a calibrated model, new labels (``seen`` is false, and no remembered query has them) compete by the
        probability that they are right, which :meth:`calibrate` learns. Of each ten places, the last two go to new
        labels already if they are a tenth as probable as the seen labels there. ``new`` reserves other places outright,
        and with a threshold none are reserved. Seen labels keep their order.

        Scores are probabilities once :meth:`calibrate` was called. Before, they compare the labels of one text: the
        encoder's similarities, with a memory the mixed scores of :class:`hf_xmc.TrainingMemory`, or the scores of
        ``rerank``.
        """
        answers = self.predict_stream(
            [texts] if isinstance(texts, str) else texts,
            top_k,
            threshold=threshold,
            allow=allow,
            deny=deny,
            hierarchy=hierarchy,
            rerank=rerank,
            rerank_top_k=rerank_top_k,
            new=new,
            show_progress_bar=show_progress_bar,
        )
        predictions = list(answers)
        return predictions[0] if isinstance(texts, str) else predictions

    def predict_stream(
        self,
        texts: Iterable[str],
        top_k: int | None = None,
        *,
        threshold: float | None = None,
        allow: Iterable[str] | None = None,
        deny: Iterable[str] | None = None,
        hierarchy: Hierarchy | None = None,
        rerank: Reranker | None = None,
        rerank_top_k: int | None = None,
        new: int | None = None,
        show_progress_bar: bool | None = False,
    ) -> Iterator[list[Prediction]]:
        """Predict the labels of a stream of texts, which may be endless; other arguments as in :meth:`predict`.

        Texts are read and answered 1024 at a time, or 16 with ``rerank``, and none is kept. Arguments are checked at
        the call, each text when it is read.

        Args:
            texts: A list or an iterator of texts.
            show_progress_bar: Whether to show a progress bar on standard error, after two seconds; ``None``: if that is
                a terminal.
        """
        check_is_list("a list or an iterator of texts", texts)
        reranking = Reranking.of(rerank, rerank_top_k)
        choice = Choice.of(self.label_texts, top_k, threshold, allow, deny, hierarchy, reranking, new)
        self._check_calibrated(reranking, required=threshold is not None)
        if new is not None:
            check_reservable(self.calibration, self._new_labels.scores)
        return answer_stream(texts, self._answer, choice, show_progress_bar)

    def _answer(self, texts: list[str], choice: Choice) -> Answers:
        asked = [text for text in texts if text.strip()]
        queries, new = self._queries(asked), None if choice.reranking else self._competing()
        if new is None:
            found = queries.find(self.label_index, self.memory, choice.num_candidates, allow=choice.allow)
            return choice.answers(texts, found, self.calibration, self.labels)
        found = self._with_new(queries, new, choice.handicaps(), allow=choice.allow)
        return choice.answers(texts, found, None, self.labels)

    def _competing(self) -> NewLabelSearch | None:
        """Return a search among the new labels, if they compete by their probability."""
        if self.calibration is None or self._fitted is None or self._fitted.reranking:
            return None
        return self._new_labels.search_in(self.label_texts, self.index.embeddings, self.memory)

    def _with_new(self, queries: Queries, new: NewLabelSearch, needed: np.ndarray, **choice: Any) -> Found:
        """Return the best labels of each text with their probabilities, new labels in their places."""
        assert self.calibration is not None
        means, parts = queries.means(self.encoder), (self.calibration, self.label_index, self.memory)
        return self._new_labels.find(queries, means, new, *parts, needed, **choice)

    def explain(self, text: str, uid: str, nearest: int = 5) -> Explanation:
        """Explain why a label is predicted for a text, or is not; ``print`` shows the answer line by line.

        Each word of the text gets a weight. For a static encoder it is what the word adds to the label score, and the
        weights add up to that score. For any other encoder it is the score that is lost without the word. This takes
        an embedding per word, and the weights do not add up. Scores are those of the model before reranking.

        Args:
            text: A text that is not blank; a long one is read as :meth:`embed` reads it.
            uid: The external name of the label, as :meth:`predict` shows it.
            nearest: Maximum number of remembered queries with this label to show; 0 for none.

        Raises:
            ValueError: if the label is unknown, or the text is blank or holds no token that the encoder knows.
        """
        words = self.weigh_words(text, uid)
        label, rows = self._rows_of(uid)
        query, about = self.embed([text]), self.labels[label]
        calibration = None if self.calibration is None or self._fitted is None else self._fitted.before_reranking
        own = self._vector_score(query[0], label, rows)
        new = self._competing()
        is_new = new is not None and label in new.label_ids
        deny = None if new is None or is_new else new.label_ids  # they compete by their own probability
        explained = explain(query, label, about, self.label_index, self.memory, calibration, nearest, words, own, deny)
        if new is not None and is_new:
            score = new.search([text], query, 1, allow=np.array([label])).scores
            probability = float(self._new_labels.probabilities(score)[0, 0])
            explained = explained._replace(score=probability, raw_score=float(score[0, 0]), new=True)
        return explained

    def weigh_words(self, text: str, uid: str) -> WordWeights:
        """Return the words of :meth:`explain` alone, without a search.

        Args:
            text: A text that is not blank.
            uid: The external name of the label.

        Raises:
            ValueError: if the label is unknown, or the text is blank or holds no token that the encoder knows.
        """
        _, rows = self._rows_of(uid)
        if not text.strip() or not self.embed([text]).any():
            raise ValueError(f"the text {text[:60]!r} holds no token that the encoder knows: it gets no label.")
        return weigh_words(self.encoder, self.embed, text, self.index.embeddings[rows], self.long_text)

    def _rows_of(self, uid: str) -> tuple[int, Tensor]:
        """Return the number of a label, and the rows of its texts."""
        label = int(self.label_texts.rows_of([uid])[0])
        return label, torch.from_numpy(np.flatnonzero(self.label_texts.label_of == label))

    def _vector_score(self, query: Tensor, label: int, rows: Tensor) -> float | None:
        """Return what the vector of a label adds to its best text's score; ``None`` if it has none."""
        if self._label_vectors is None or not self._label_vectors[label].any():
            return None
        best = int(rows[(self.index.embeddings[rows].float() @ query).argmax()])
        text = self.label_texts.texts["text"][best]
        return own_share(self.encoder, query, self.index.embeddings[best], text, self._label_vectors[label])

    def search(
        self,
        texts: Sequence[str],
        top_k: int,
        *,
        exclude: np.ndarray | None = None,
        allow: Iterable[int] | None = None,
        deny: Iterable[int] | None = None,
        leave_one_out: bool = False,
        probabilities: bool = False,
        new: int | None = None,
    ) -> TopK:
        """Return the best labels of each text as label ids and scores; arguments as in :meth:`LabelIndex.search`.

        A text that embeds to zero, because the encoder knows none of its tokens, has no label; a warning counts such
        texts. Encoders with layers on top of their tokens never embed to zero, so that a text of unknown tokens alone
        gets labels too.

        Args:
            leave_one_out: Whether texts that the memory holds get no vote of their own, to measure or to fit on them.
                They still count in the frequency of their labels.
            probabilities: Whether to return what :meth:`predict` shows: probabilities, with new labels in their places.
            new: With probabilities, the number of places to reserve for new labels, as in :meth:`predict`; 0 ranks as a
                threshold does.

        Raises:
            ValueError: if probabilities are wanted and the model is not calibrated.
        """
        if probabilities:
            self._check_calibrated(None, required=True)
        queries = self._queries(texts)
        own = queries.own_rows(self.encoder, self.memory) if leave_one_out else None
        if probabilities and (competing := self._competing()) is not None:
            visible = visible_labels(len(self.labels), allow, deny)
            chosen = None if visible is None else np.flatnonzero(visible)
            found = self._with_new(queries, competing, handicaps(top_k, new), own=own, exclude=exclude, allow=chosen)
        else:
            found = queries.find(self.label_index, self.memory, top_k, own, exclude, allow=allow, deny=deny)
            if probabilities and self.calibration is not None:
                found = found._replace(labels=TopK(found.labels.label_ids, self.calibration(found.labels.scores)))
        warn_about_unknown(int((~found.recognised).sum()), len(texts))
        return found.labels

    def _queries(self, texts: Sequence[str]) -> Queries:
        if self.long_text == "max":
            return Queries.in_chunks(self.encoder, texts, self._embed)
        return Queries(texts, self.embed(texts))

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return the ``(N, D)`` embeddings of queries; long ones are cut, or are the mean of their chunks."""
        if self.long_text == "truncate":
            if not self._warned_of_cuts and (report := self.truncation(texts)).num_cut:
                logger.warning("%s: `model.long_text = 'mean'`, or 'max', reads them in chunks.", report)
                self._warned_of_cuts = True
            return self._embed(texts)
        return Queries.in_chunks(self.encoder, texts, self._embed).means(self.encoder)

    def _embed(self, texts: Sequence[str]) -> Tensor:
        if not len(self.labels):
            raise ValueError(f"the model has no label to predict: {HOW_TO_INDEX}.")
        return embed_queries(self.encoder, texts, self.batch_size)

    def truncation(self, texts: Sequence[str]) -> Truncation:
        """Count the texts that are longer than the encoder reads, and the tokens that are lost."""
        return truncation(self.encoder, texts)

    # Queries with known labels

    def remember(self, queries: Dataset) -> None:
        """Let queries with known labels vote from now on, see :class:`hf_xmc.TrainingMemory`; nothing is trained.

        This ends the calibration: call :meth:`calibrate` afterwards.

        Args:
            queries: Training queries, or newer ones, with columns ``text`` and ``label_ids``, rows of :attr:`labels`.
        """
        texts, relevance = self._known(queries)
        embeddings = unit_rows(self.embed(texts)).half()  # norms may be beyond float16
        if self.memory is None:
            self.memory = TrainingMemory(embeddings, relevance, texts)
        else:
            self.memory.add(embeddings, relevance, texts)
        self._forget_calibration("The memory")

    def tune_memory(self, validation: Dataset, **settings: Any) -> dict[str, Any]:
        """Choose the settings of the memory on queries with known labels; see :meth:`hf_xmc.TrainingMemory.tune`.

        A query in the memory does not vote for itself; a warning counts such queries. This discards the calibration.

        Args:
            validation: Queries with columns ``text`` and ``label_ids``, rows of :attr:`labels`.
            settings: ``metric``, ``inverse_propensity``, ``tolerance`` and ``exclude``.

        Raises:
            ValueError: if there is no memory, there is no positive to tune on, or the metric is unknown.
        """
        if self.memory is None:
            raise ValueError("there is no memory to tune: call `remember` with the training queries first.")
        texts, relevance = self._known(validation)
        queries = self.embed(texts)
        own = own_rows(self.memory, texts, queries)
        tuned = self.memory.tune(queries, relevance, self.label_index, silent=own, **settings)
        self._forget_calibration("The memory")
        return tuned

    def calibrate(
        self,
        validation: Dataset,
        top_k: int = DEFAULT_TOP_K,
        *,
        exclude: np.ndarray | None = None,
        rerank: Reranker | None = None,
        rerank_top_k: int | None = None,
    ) -> None:
        """Turn scores into probabilities from now on, see :class:`hf_xmc.metrics.calibration.Calibration`.

        This also learns how probable new labels are, from a sample of seen labels that are treated as new.

        The first ``top_k`` labels of a text share one map. The labels after them, up to the 200 that a threshold
        chooses from, share another. A text that the memory holds gets no vote of its own; a warning counts them.

        Args:
            validation: Queries that the encoder was not trained on, with columns ``text`` and ``label_ids``, rows of
                :attr:`labels`.
            top_k: Number of labels of a text that will be read without a threshold.
            exclude: ``(M, 2)`` filter pairs (row of the query, label id).
            rerank, rerank_top_k: As in :meth:`predict`, which then refuses another value of either. A saved model
                cannot hold a function, so this calibration is not saved.

        Raises:
            ValueError: if there is no prediction to learn from.
        """
        top_k, reranking = checked_k(top_k, "top_k"), Reranking.of(rerank, rerank_top_k)
        texts, relevance = self._known(validation)
        if reranking is None:
            parts = self.encoder, self.label_texts, self.memory
            self._new_labels.scores = learn_scores(*parts, texts, self.embed(texts), relevance, exclude)
        found = self._held_out(texts, max(top_k, MAX_LABELS), exclude, reranking)
        self._fitted = FittedCalibration(Calibration.fit(found, relevance, top_k), self._score_source(), reranking)

    def take_settings(self, tuned: XMCModel) -> None:
        """Take the settings of the memory and the calibration of a model with the same labels.

        Scores of both models must be alike, as those of a model that was trained again on a few more queries.

        Raises:
            ValueError: if the labels differ, or only one of the models has a memory.
        """
        labels, theirs = (
            (texts["uid"][:], texts["text"][:]) for texts in (self.label_texts.texts, tuned.label_texts.texts)
        )
        if labels != theirs or (self.memory is None) != (tuned.memory is None):
            raise ValueError("`tuned` must have the same labels, and a memory if this model has one.")
        if self.memory is not None and tuned.memory is not None:
            self.memory.settings = tuned.memory.settings
        self.calibration, self._new_labels.scores = tuned.calibration, tuned._new_labels.scores

    def threshold_for(
        self,
        validation: Dataset,
        top_k: int | None = None,
        *,
        precision: float | None = None,
        labels_per_text: float | None = None,
        exclude: np.ndarray | None = None,
        rerank: Reranker | None = None,
        rerank_top_k: int | None = None,
    ) -> float:
        """Choose a threshold for :meth:`predict`, by default the one of the best micro F1.

        Args:
            validation, exclude, rerank, rerank_top_k: As in :meth:`calibrate`, with the same ``rerank``.
            top_k: The value that ``predict`` will get: by default all labels above the threshold, 200 at most.
            precision: Wanted fraction of right predictions.
            labels_per_text: Wanted mean number of labels of a text.

        Raises:
            ValueError: if the model is not calibrated, or no threshold gives the wanted value.
        """
        reranking = Reranking.of(rerank, rerank_top_k)
        if reranking is not None:
            reranking.check_top_k(top_k, len(self.labels))
        top_k = MAX_LABELS if top_k is None else checked_k(top_k, "top_k")
        check_wanted(precision, labels_per_text)
        texts, relevance = self._known(validation)
        self._check_calibrated(reranking, required=True)
        if reranking is None:
            top_k = min(top_k, len(self.labels))
            found = self.search(texts, top_k, exclude=exclude, leave_one_out=True, probabilities=True, new=0)
        else:
            found = self._held_out(texts, top_k, exclude, reranking)
            if self.calibration is not None:
                found = TopK(found.label_ids, self.calibration(found.scores))
        return choose_threshold(found, relevance, precision=precision, labels_per_text=labels_per_text)

    def _held_out(self, texts: list[str], top_k: int, exclude: np.ndarray | None, reranking: Reranking | None) -> TopK:
        """Return the best labels of texts, which get no vote of their own."""
        k = top_k if reranking is None else reranking.top_k
        new = None if reranking else self._new_labels.search_in(self.label_texts, self.index.embeddings, self.memory)
        settings: dict[str, Any] = {"exclude": exclude, "leave_one_out": True}
        settings["deny"] = None if new is None else new.label_ids  # they compete by a probability of their own
        found = self.search(texts, min(k, max(1, len(self.labels))), **settings)
        if reranking is not None:
            found = reranking.apply(texts, found, self.labels)
        return TopK(*(part[:, :top_k] for part in found))

    def _known(self, queries: Dataset) -> tuple[list[str], sp.csr_array]:
        """Return the texts of queries and their positives ``(N, L)``; an error names row and column."""
        queries = as_dataset(queries, "queries")
        return texts_of(queries).to_pylist(), relevance_of(queries, len(self.labels))

    # Labels that come and go

    def add_labels(
        self,
        labels: Sequence[str] | Dataset,
        *,
        parents: Sequence[Sequence[str]] | None = None,
        norm: float | None = None,
    ) -> None:
        """Append labels, which can be predicted at once; nothing is trained. They have no vector of their own.

        Args:
            labels: Labels as in the class. Several rows with one ``uid`` are texts of one label. Texts without uids
                get the next free numbers. ``seen`` is false unless it is given.
            parents: The broader concepts of each label: uids of the model or of the new labels, or texts. In a
                calibrated model, their words count as words of the label when :meth:`predict` compares words. They
                are not embedded. The texts are those of the time of this call.
            norm: Norm of the new embeddings; by default the encoder's. If an encoder leaves the norm free, training
                makes it grow with the frequency of a label. The norm of an unseen label means nothing, and one norm for
                all of them finds rare labels better.

        Raises:
            ValueError: if a uid already exists, there is not a list of parents for each label, or ``norm`` is not
                positive or has no effect. The model is unchanged after an error.
        """
        check_norm(norm, self.encoder)
        label_texts, new = self.label_texts.added(labels, parents)
        embeddings = embed_label_texts(self.encoder, new.texts["text"], norm)
        self._change(lambda: self.index.add(embeddings), label_texts, np.arange(len(self.label_texts)))

    def remove_labels(self, uids: Iterable[str]) -> None:
        """Remove labels. The rows of the remaining labels close up, as in a list.

        Args:
            uids: The external names of the labels, as :meth:`predict` shows them.

        Raises:
            ValueError: if a uid is unknown, or no label would be left.
        """
        self._keep(self.label_texts.visible(None, uids))

    def rename_label(self, uid: str, text: str) -> None:
        """Replace the preferred text of a label. The label keeps its uid, row, votes, vector and other texts.

        Raises:
            ValueError: if ``uid`` is unknown.
        """
        label = int(self.label_texts.rows_of([uid])[0])
        label_texts, row = self.label_texts.renamed(label, text)
        vectors = None if self._label_vectors is None else self._label_vectors[[label]]
        self.index.replace([row], embed_label_texts(self.encoder, [text], vectors=vectors))
        self.label_texts = label_texts

    def update_labels(self, vocabulary: Any, *, norm: float | None = None, dry_run: bool = False) -> LabelChanges:
        """Replace the labels by another version of their vocabulary, and return the differences.

        Labels with the same uid are the same label: they keep their votes and their vectors, and the embeddings of the
        texts that stay. Only new texts are embedded, and nothing is trained. ``seen`` is false for new labels. The rows
        of the labels that stay close up, and new labels follow them.

        Args:
            vocabulary: The new version, in any form that :meth:`hf_xmc.data.vocabulary.Vocabulary.of` takes. A list of
                names refers to the labels by their texts.
            norm: Norm of the embeddings of new labels, as in :meth:`add_labels`. New texts of other labels keep the
                encoder's norm.
            dry_run: Whether to return the differences and leave the model unchanged.

        Raises:
            ValueError: if the vocabulary has another form or shares no label with the model, or ``norm`` is not
                positive or has no effect. The model is unchanged after an error.
        """
        check_norm(norm, self.encoder)
        update = update_to(self.label_texts, Vocabulary.of(vocabulary))
        if update.changes and not dry_run:
            rows = np.flatnonzero(update.source < 0)
            texts = update.label_texts.texts.select(rows)["text"][:]
            stay = int((update.label_texts.label_of[rows] < len(update.kept)).sum())  # texts of new labels come last
            owners = torch.from_numpy(update.kept[update.label_texts.label_of[rows[:stay]]])
            vectors = None if self._label_vectors is None else self._label_vectors[owners]
            known = embed_label_texts(self.encoder, texts[:stay], vectors=vectors)
            new = torch.cat([known, embed_label_texts(self.encoder, texts[stay:], norm)])
            self._change(lambda: self.index.rearrange(update.source, new), update.label_texts, update.kept)
        return update.changes

    def _keep(self, labels: np.ndarray) -> None:
        if not labels.any():
            raise ValueError("no label would be left: a model predicts one of its labels.")
        gone = np.flatnonzero(~labels[self.label_texts.label_of])
        self._change(lambda: self.index.remove(gone), self.label_texts.kept(labels), np.flatnonzero(labels))

    def _change(self, change_index: Callable[[], None], label_texts: LabelTexts, kept: np.ndarray) -> None:
        """Take other labels, of which the first are the labels ``kept``. The index is the last that can fail."""
        renumbered = copy(self.memory)
        if renumbered is not None:
            renumbered.keep_labels(kept, len(label_texts))
        change_index()
        if self.memory is not None and renumbered is not None:
            self.memory.relevance = renumbered.relevance
        self._label_vectors = self._vectors_after(kept, len(label_texts))
        self.label_texts = label_texts

    def _vectors_after(self, kept: np.ndarray, num_labels: int) -> Tensor | None:
        """Return the vectors of ``num_labels`` labels: those of the labels ``kept``, and zeros for new labels."""
        if self._label_vectors is None:
            return None
        vectors = torch.zeros(num_labels, self._label_vectors.shape[1])
        vectors[: len(kept)] = self._label_vectors[torch.from_numpy(kept)]
        return vectors

    # Folders and the Hub

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder for :meth:`from_pretrained`. ``SentenceTransformer(folder)`` reads its encoder too."""
        self._save(folder)

    def _save(self, folder: str | Path, repo_id: str | None = None) -> None:
        fitted = None if self.calibration is None else self._fitted
        parts = writers(self.label_texts, self.index, self.memory, fitted, self.label_vectors, self._new_labels.scores)
        sizes = len(self.labels), len(self.memory or ())
        about = card.current_card(self.card, self.encoder, *sizes, repo_id, self.label_vectors is not None)
        loaded, source = self._source or (None, None)
        release.save(folder, self.encoder, parts, about, source if loaded is self.encoder else None)

    def push_to_hub(self, repo_id: str, **settings: Unpack[repository.PushSettings]) -> str:
        """Publish encoder, labels, index, memory and calibration in one commit.

        Args:
            repo_id: Name of the repository, ``org/name``, which is created if it does not exist.
            settings: ``private``, ``revision``, ``create_pr``, ``commit_message`` and ``token``, see
                :func:`hf_xmc.hub.push`.

        Returns the address of the commit, or of the pull request.

        Raises:
            RuntimeError: if the push fails, see :func:`hf_xmc.hub.push`.
        """
        with TemporaryDirectory() as folder:
            self._save(Path(folder) / "release", repo_id)
            return repository.push(Path(folder) / "release", repo_id, **settings)

    def push_to_space(self, repo_id: str, **settings: Unpack[space.SpaceSettings]) -> str:
        """Publish a page that shows the labels of a text, as a Space of the Hub.

        Args:
            repo_id: Name of the Space, ``org/name``, which is created if it does not exist.
            settings: ``model_id``, the repository that holds this model, by default the Space has a copy;
                ``requirement``, ``private``, ``commit_message`` and ``token``, see :func:`hf_xmc.hub.space.push`.

        Returns the address of the commit.

        Raises:
            ValueError: if a name is not ``org/name``, there is no token, the Space has other content, ``model_id`` is
                another model, or the model has no label. Nothing was changed then.
            RuntimeError: if the push fails, see :func:`hf_xmc.hub.space.push`.
        """
        if not len(self.labels):
            raise ValueError(f"the model has no label to show: {HOW_TO_INDEX}.")
        return space.push(self._save, repo_id, **settings)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        labels: Sequence[str] | Dataset | None = None,
        allow: Iterable[str] | None = None,
        deny: Iterable[str] | None = None,
        parts: Iterable[str] | None = None,
        device: str | None = None,
        backend: str = "torch",
        model_kwargs: Mapping[str, Any] | None = None,
        verify: bool = True,
        **settings: Unpack[DownloadSettings],
    ) -> XMCModel:
        """Load a saved model, after a check that every file is the one that was saved.

        A model of sentence-transformers that was not saved by this package loads too. It has no labels; give some.

        Args:
            name: A folder, the ``output_dir`` of :func:`hf_xmc.train`, or ``org/name`` of a model of the Hub.
            labels: Labels to embed and predict instead of the saved ones, whose index is then neither downloaded nor
                read.
            allow, deny: The uids of the labels to keep, or to leave out. Labels that are left out take no memory and
                have no votes.
            parts: Parts to download and read in addition to the encoder, out of ``"label_index"``,
                ``"training_memory"``, ``"calibration"`` and ``"new_labels"``, the probabilities of new labels. ``None``
                stands for all parts that the model has, ``()`` for the encoder alone. All others need the label index.
                The calibration of a model with a memory needs the memory.
            device: Device of the encoder; by default the best one available.
            backend: Library that runs the encoder: ``"torch"``, ``"onnx"`` or ``"openvino"``. The last two need
                packages that ``recipes/serving/README.md`` names, and only predict.
            model_kwargs: Arguments for the loader of the weights, as in ``SentenceTransformer``, such as
                ``{"file_name": "model_qint8_avx512.onnx"}`` or ``{"dtype": "bfloat16"}``.
            verify: Whether to read each file and compare its SHA-256 with the saved one. ``False`` starts sooner and
                compares sizes alone, and reads no embedding: use it for a model that has been verified since it was
                last written or copied, such as that of a container image.
            settings: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and ``force_download`` of a download,
                see :class:`hf_xmc.storage.snapshots.Snapshot`.

        Raises:
            FileNotFoundError: if ``name`` is neither a folder nor the name of a repository.
            ValueError: if the model is incomplete or was modified, if it can neither be downloaded nor be found in the
                cache, if a part is unknown, missing, or given without a part that it needs, or if the backend does not
                fit the encoder or the device.
            ModuleNotFoundError: if the packages of the backend are missing, or do not import together.
        """
        if labels is not None and parts:
            raise ValueError(f"`parts` must be None with `labels`, which replace the saved ones, got {parts!r}.")
        place = repository.source(name, **settings)
        loading = Loading(device, backend, model_kwargs)
        saved = read_model(place, parts if labels is None else (), loading, verify=verify)
        if labels is not None and saved.release is not None and LAYOUT.label_vectors in saved.release.files:
            logger.warning(
                "The saved labels of %s have vectors of their own, which the given labels lack. `update_labels` keeps "
                "those of labels that stay.",
                name,
            )
        labels = saved.labels if labels is None else labels
        if labels is None and parts is None:
            logger.warning("%s is an encoder without labels, and predicts nothing yet: %s.", name, HOW_TO_INDEX)
        embeddings: Tensor | LabelIndex | None = saved.embeddings
        if saved.embeddings is not None and not verify:
            embeddings = LabelIndex(saved.embeddings, check=False)
        model = cls(saved.encoder, labels, embeddings, saved.label_vectors)
        model.memory, model.calibration = saved.memory, saved.calibration
        model._new_labels.scores = saved.new_labels
        if allow is not None or deny is not None:
            model._keep(model.label_texts.visible(allow, deny))
        if saved.release is not None:
            model._source = saved.encoder, saved.release.folder
            model.card = saved.release.card if saved.release.parts else None  # the card is about the saved labels
            model.index = release.read_index(saved.release, model.index, check=verify)
        return model
