"""Approximate search in a Milvus database, whose candidates the stored embeddings rank in float32."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_xmc.search.approximate import ApproximateIndex
from hf_xmc.search.candidates import Candidates, Change
from hf_xmc.search.equal_rows import codes_of, fingerprint

try:
    from pymilvus import DataType, MilvusClient
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("MilvusIndex needs pymilvus: pip install 'hf_xmc[milvus]'.") from error

logger = logging.getLogger(__name__)

SENT_AT_ONCE = 4096  # vectors per message
SIGNATURE = "hf_xmc.made_of"  # property of a collection: the embeddings and settings that it was made from


class MilvusCandidates(Candidates):
    """Candidates from a collection of Milvus; arguments as in :class:`MilvusIndex`.

    A vector in the collection has a number, the field ``place``, which is never used again. So an insertion that fails
    halfway cannot be mistaken for a later one.
    """

    max_candidates = 16384  # the limit of Milvus

    def __init__(
        self,
        client: MilvusClient,
        collection_name: str,
        keep: bool,
        index_type: str,
        index_params: dict[str, Any],
        search_params: dict[str, Any],
    ) -> None:
        self.client, self.collection_name, self.keep = client, collection_name, keep
        self.index_type, self.index_params, self.search_params = index_type, index_params, search_params
        self._numbers = np.empty(0, dtype=np.int64)  # (num_places,), the number of the vector at each place
        self._stored = np.empty(0, dtype=bool)  # by number, whether the collection may hold the vector

    @property
    def num_places(self) -> int:
        return len(self._numbers)

    def build(self, vectors: np.ndarray, embeddings: Tensor) -> None:
        """Fill a new collection, or use an existing one.

        Raises:
            ValueError: if the existing collection does not hold these embeddings, or was made with other settings.
        """
        self._signature = self._signature_of(embeddings)
        if self.client.has_collection(self.collection_name):
            self._reuse(vectors, len(embeddings))
        else:
            self._create(vectors)

    def _create(self, vectors: np.ndarray) -> None:
        schema = self.client.create_schema(auto_id=False)
        schema.add_field("place", DataType.INT64, is_primary=True)
        schema.add_field("code", DataType.INT64)  # of the vector, to find it in a collection that was kept
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=vectors.shape[1])
        index = self.client.prepare_index_params()
        index.add_index("vector", index_type=self.index_type, metric_type="IP", params=self.index_params)
        self.client.create_collection(
            self.collection_name, schema=schema, index_params=index, consistency_level="Strong"
        )
        try:
            self._numbers = self._insert(vectors)
            self._sign(self._signature)
        except BaseException:
            self.client.drop_collection(self.collection_name)
            raise

    def _reuse(self, vectors: np.ndarray, num_labels: int) -> None:
        name, instead = self.collection_name, "drop it, or choose another name."
        properties = self.client.describe_collection(name).get("properties") or {}
        if SIGNATURE not in properties:
            raise ValueError(f"the collection {name!r} does not say which embeddings it holds: {instead}")
        found = json.loads(properties[SIGNATURE])
        if found["embeddings"] != self._signature["embeddings"]:
            raise ValueError(f"the collection {name!r} does not hold these {num_labels} embeddings: {instead}")
        if found != self._signature:
            raise ValueError(f"the collection {name!r} was made with other settings, {found}: {instead}")
        self.client.load_collection(name)  # milvus-lite does not by itself what a process before this one left
        rows = self._rows_in_collection()
        number_of = {row["code"]: row["place"] for row in rows}
        codes = codes_of(torch.from_numpy(vectors)).view(np.int64).tolist()
        if len(set(codes)) < len(codes) or not number_of.keys() >= set(codes):
            raise ValueError(f"the collection {name!r} lacks some of these embeddings: {instead}")
        self._numbers = np.array([number_of[code] for code in codes], dtype=np.int64)
        self._stored = np.zeros(max((row["place"] for row in rows), default=-1) + 1, dtype=bool)
        self._stored[[row["place"] for row in rows]] = True  # an interrupted change may have left other vectors

    def _rows_in_collection(self) -> list[dict[str, int]]:
        """Return the number and the code of each vector in the collection."""
        rows: list[dict[str, int]] = []
        pages = self.client.query_iterator(
            self.collection_name, batch_size=SENT_AT_ONCE, output_fields=["place", "code"]
        )
        while page := pages.next():
            rows += page
        pages.close()
        return rows

    def update(self, change: Change) -> bool:
        removed, signature, start = self._numbers[change.removed], self._signature_of(change.after), len(self._stored)
        try:
            numbers = self._insert(change.added_vectors())
            self._sign(signature)  # before vectors are deleted: a signed collection holds all of its vectors
            self._delete(removed)
        except BaseException:
            self._undo(np.arange(start, len(self._stored)), removed, change)
            raise
        self._numbers, self._signature = np.append(self._numbers, numbers), signature
        return True

    def _undo(self, inserted: np.ndarray, deleted: np.ndarray, change: Change) -> None:
        """Undo a change that failed, if the database answers."""
        try:
            for rows in _rows(change.removed_vectors(), deleted):
                self.client.upsert(self.collection_name, rows)
            self._stored[deleted] = True
            self._delete(inserted)
            self._sign(self._signature)
        except Exception as error:  # the caller raises the first error
            logger.warning("The collection %r may hold vectors without a label: %s", self.collection_name, error)

    def _insert(self, vectors: np.ndarray) -> np.ndarray:
        """Insert vectors, and return their numbers."""
        numbers = np.arange(len(self._stored), len(self._stored) + len(vectors))
        self._stored = np.append(self._stored, np.ones(len(vectors), dtype=bool))  # even if the insertion fails
        for rows in _rows(vectors, numbers):
            self.client.insert(self.collection_name, rows)
        return numbers

    def _delete(self, numbers: np.ndarray) -> None:
        if len(numbers):
            self.client.delete(self.collection_name, ids=numbers.tolist())
            self._stored[numbers] = False

    def keep_collection(self, keep: bool, embeddings: Tensor) -> None:
        """Choose whether the collection of these embeddings stays after the index is closed."""
        self.keep = keep
        self._signature = self._signature_of(embeddings)
        self._sign(self._signature)

    def _sign(self, signature: dict[str, Any]) -> None:
        """Store in a collection that will be kept which embeddings it holds."""
        if self.keep:
            properties = {SIGNATURE: json.dumps(signature)}
            self.client.alter_collection_properties(self.collection_name, properties=properties)

    def _signature_of(self, embeddings: Tensor) -> dict[str, Any]:
        settings = {"index_type": self.index_type, "index_params": self.index_params}
        return {"embeddings": fingerprint(embeddings.numpy()).hex() if self.keep else None, **settings}

    def nearest(self, queries: np.ndarray, k: int, visible: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        wanted = np.zeros(len(self._stored), dtype=bool)
        wanted[self._numbers if visible is None else self._numbers[visible]] = True
        hidden, among = self._stored & ~wanted, ""
        if hidden.any():
            fewer, which = (hidden, "not in") if hidden.sum() < wanted.sum() else (wanted, "in")
            among = f"place {which} {np.flatnonzero(fewer).tolist()}"
        found = self.client.search(
            self.collection_name,
            list(queries),
            limit=k,
            filter=among,
            search_params={"params": self.search_params},
        )
        place_of = np.full(len(self._stored), -1)
        place_of[self._numbers] = np.arange(self.num_places)
        near, places = np.zeros((len(queries), k), np.float32), np.full((len(queries), k), -1)
        for row, hits in enumerate(found):
            near[row, : len(hits)] = [hit["distance"] for hit in hits]
            places[row, : len(hits)] = place_of[[hit["place"] for hit in hits]]
        return near, places


def _rows(vectors: np.ndarray, numbers: np.ndarray) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of a collection, one message at a time."""
    codes = codes_of(torch.from_numpy(vectors)).view(np.int64)
    for start in range(0, len(vectors), SENT_AT_ONCE):
        here = slice(start, start + SENT_AT_ONCE)
        rows = zip(numbers[here].tolist(), codes[here].tolist(), vectors[here], strict=True)
        yield [{"place": number, "code": code, "vector": vector} for number, code, vector in rows]


class MilvusIndex(ApproximateIndex):
    """A label index that Milvus searches: a cluster, or a file that ``milvus-lite`` opens in this process.

    Args:
        embeddings: ``(L, D)``, as in :class:`hf_xmc.LabelIndex`. They rank the candidates that Milvus finds.
        uri: Address of the server, such as ``"http://host:19530"``, or path of a file, such as ``"labels.db"``.
        collection_name: Name of the collection to create.
        token: Credentials, ``"user:password"`` or an API key.
        keep: Whether the collection stays after :meth:`close`. An existing collection is then used again, if it holds
            exactly these embeddings and was made with these settings.
        index_type, index_params: The index that Milvus builds, such as ``"HNSW"`` and
            ``{"M": 32, "efConstruction": 200}``.
        search_params: Search parameters of that index, such as ``{"ef": 128}``.
        refine: Number of candidates per requested label.

    Raises:
        ValueError: if the collection exists and ``keep`` is false, or if it holds other embeddings or was made with
            other settings.

    >>> with MilvusIndex(model.index.embeddings, "labels.db") as index:  # doctest: +SKIP
    ...     index.search(model.embed(["a small boat with a sail"]), 5)
    """

    candidates: MilvusCandidates

    def __init__(
        self,
        embeddings: np.ndarray | Tensor,
        uri: str,
        collection_name: str = "labels",
        *,
        token: str = "",
        keep: bool = False,
        index_type: str = "AUTOINDEX",
        index_params: dict[str, Any] | None = None,
        search_params: dict[str, Any] | None = None,
        refine: int = 4,
    ) -> None:
        client = MilvusClient(uri, token=token)
        try:
            if not keep and client.has_collection(collection_name):
                raise ValueError(
                    f"{uri} already has a collection {collection_name!r}. Choose another name or drop it, or pass "
                    "keep=True if an index of these labels left it."
                )
            candidates = MilvusCandidates(
                client, collection_name, keep, index_type, index_params or {}, search_params or {}
            )
            super().__init__(embeddings, candidates, refine=refine)
        except BaseException:
            client.close()
            raise

    @property
    def keep(self) -> bool:
        """Whether the collection stays after :meth:`close`."""
        return self.candidates.keep

    @keep.setter
    def keep(self, keep: bool) -> None:
        self.candidates.keep_collection(keep, self.embeddings)

    def close(self) -> None:
        """Disconnect, and drop the collection unless it is to be kept."""
        if not self.keep:
            self.candidates.client.drop_collection(self.candidates.collection_name)
        self.candidates.client.close()

    def __enter__(self) -> MilvusIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
