"""Labels in a Milvus database: it proposes labels, and the stored embeddings rank them in float32."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_xmc.search.approximate import ProposingIndex, vectors_of
from hf_xmc.search.equal_rows import Groups, codes_of, fingerprint

try:
    from pymilvus import DataType, MilvusClient
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("MilvusIndex needs pymilvus: pip install 'hf_xmc[milvus]'.") from error

logger = logging.getLogger(__name__)

SENT_AT_ONCE = 4096  # vectors of one message
SIGNATURE = "hf_xmc.made_of"  # property of a collection: the embeddings and settings that it was made of


class MilvusIndex(ProposingIndex):
    """A label index whose search is done by Milvus: a cluster, or a file that `milvus-lite` opens in this process.

    Args:
        embeddings: as in :class:`hf_xmc.LabelIndex`; they rank what Milvus proposes, so that scores are exact.
        uri: ``"http://host:19530"``, or the path of a file, ``"labels.db"``.
        collection_name: of the collection that is made.
        token: ``"user:password"`` or an API key.
        keep: the collection stays after :meth:`close`, and one that such an index left is used again if it is of these
            embeddings, in every row, and was made with these settings.
        index_type, index_params: what Milvus builds, such as ``"HNSW"``, ``{"M": 32, "efConstruction": 200}``.
        search_params: of that index, such as ``{"ef": 128}``.
        refine: labels proposed for each that is wanted.

    Raises:
        ValueError: if the collection is there already, and is not to be kept, or not of these embeddings or settings.

    >>> with MilvusIndex(model.index.embeddings, "labels.db") as index:  # doctest: +SKIP
    ...     index.search(model.embed(["a small boat with a sail"]), 5)
    """

    most_proposed = 16384  # the limit of Milvus

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
        self.collection_name, self.keep = collection_name, keep
        self.index_type, self.index_params, self.search_params = index_type, index_params or {}, search_params or {}
        self._stale = np.empty(0, dtype=np.int64)  # places of vectors that could not be deleted
        self._client = MilvusClient(uri, token=token)
        try:
            self._reuse = self._client.has_collection(collection_name)
            if self._reuse and not keep:
                raise ValueError(
                    f"{uri} has a collection {collection_name!r} already: choose another name or drop it, or say "
                    "keep=True if an index of these labels left it."
                )
            super().__init__(embeddings, refine)
        except BaseException:
            self._client.close()
            raise

    def close(self) -> None:
        """Drop the collection, unless it is to be kept, and leave the database."""
        if not self.keep:
            self._client.drop_collection(self.collection_name)
        self._client.close()

    def __enter__(self) -> MilvusIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _place(self, first: np.ndarray) -> None:
        if self._reuse:
            self._groups = self._reused(first)
        else:
            super()._place(first)

    def _fill(self, vectors: np.ndarray) -> None:
        schema = self._client.create_schema(auto_id=False)
        schema.add_field("place", DataType.INT64, is_primary=True)
        schema.add_field("code", DataType.INT64)  # of the row, by which the vectors of a kept collection are told apart
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=vectors.shape[1])
        index = self._client.prepare_index_params()
        index.add_index("vector", index_type=self.index_type, metric_type="IP", params=self.index_params)
        self._client.create_collection(
            self.collection_name, schema=schema, index_params=index, consistency_level="Strong"
        )
        try:
            self._insert(vectors, 0)
            self._sign(self.embeddings)
        except BaseException:
            self._client.drop_collection(self.collection_name)
            raise
        self._next = len(vectors)

    @property
    def _num_places(self) -> int:
        return self._next

    def _regrouped(self, embeddings: Tensor, first: np.ndarray, source: np.ndarray) -> Groups:
        self._becoming = embeddings
        return super()._regrouped(embeddings, first, source)

    def _update(self, vectors: np.ndarray, gone: np.ndarray) -> None:
        start = self._next
        self._next += len(vectors)  # places are not given again, whatever comes of this
        try:
            self._insert(vectors, start)
            self._sign(self._becoming)
            self._delete(gone)
        except BaseException:
            self._take_back(np.arange(start, self._next), gone)
            raise
        finally:
            del self._becoming

    def _take_back(self, places: np.ndarray, gone: np.ndarray) -> None:
        """Put back what a change that failed may have deleted, and delete what it inserted, if the database answers."""
        try:
            for row in self._rows(vectors_of(self.embeddings, self._groups.first[gone]), gone):
                self._client.upsert(self.collection_name, row)
            self._delete(places)
            self._sign(self.embeddings)
        except Exception as error:  # the one that is being handled is raised
            self._stale = np.append(self._stale, places)
            logger.warning("The collection %r may hold vectors without a label: %s", self.collection_name, error)

    def _insert(self, vectors: np.ndarray, start: int) -> None:
        for rows in self._rows(vectors, np.arange(start, start + len(vectors))):
            self._client.insert(self.collection_name, rows)

    @staticmethod
    def _rows(vectors: np.ndarray, places: np.ndarray) -> Iterator[list[dict[str, Any]]]:
        """Return the rows of a collection, as many at a time as are sent in one message."""
        codes = codes_of(torch.from_numpy(vectors)).view(np.int64)
        for at in range(0, len(vectors), SENT_AT_ONCE):
            here = slice(at, at + SENT_AT_ONCE)
            rows = zip(places[here].tolist(), codes[here].tolist(), vectors[here], strict=True)
            yield [{"place": place, "code": code, "vector": vector} for place, code, vector in rows]

    def _delete(self, places: np.ndarray) -> None:
        if len(places):
            self._client.delete(self.collection_name, ids=places.tolist())

    def _sign(self, embeddings: Tensor) -> None:
        """Note in a collection that is to be kept what it is of."""
        if self.keep:
            properties = {SIGNATURE: json.dumps(self._signature(embeddings))}
            self._client.alter_collection_properties(self.collection_name, properties=properties)

    def _signature(self, embeddings: Tensor) -> dict[str, Any]:
        settings = {"index_type": self.index_type, "index_params": self.index_params}
        return {"embeddings": fingerprint(embeddings.numpy()).hex(), **settings}

    def _reused(self, first: np.ndarray) -> Groups:
        """Return the places of labels in a collection that was kept.

        Raises:
            ValueError: if it is not one of all of these embeddings.
        """
        name, instead = self.collection_name, "drop it, or choose another name."
        properties = self._client.describe_collection(name).get("properties") or {}
        if SIGNATURE not in properties:
            raise ValueError(f"the collection {name!r} does not say which embeddings it is of: {instead}")
        said, expected = json.loads(properties[SIGNATURE]), self._signature(self.embeddings)
        if said["embeddings"] != expected["embeddings"]:
            raise ValueError(f"the collection {name!r} is not of these {self.num_labels} embeddings: {instead}")
        if said != expected:
            raise ValueError(f"the collection {name!r} was made with other settings, {said}: {instead}")
        rows = self._stored()
        stored = {row["code"]: row["place"] for row in rows}
        distinct = np.flatnonzero(first == np.arange(len(first)))
        codes = codes_of(self.embeddings[torch.from_numpy(distinct)].float()).view(np.int64).tolist()
        if len(set(codes)) < len(codes) or not stored.keys() >= set(codes):
            raise ValueError(f"the collection {name!r} does not hold all of these embeddings: {instead}")
        places = np.array([stored[code] for code in codes], dtype=np.int64)
        self._stale = np.setdiff1d(
            [row["place"] for row in rows], places
        )  # left by a change that did not come to its end
        return Groups(places[np.searchsorted(distinct, first)], self._next)

    def _stored(self) -> list[dict[str, int]]:
        """Return the place and the code of each vector in the collection."""
        stored: list[dict[str, int]] = []
        pages = self._client.query_iterator(
            self.collection_name, batch_size=SENT_AT_ONCE, output_fields=["place", "code"]
        )
        while page := pages.next():
            stored += page
        pages.close()
        self._next = max((row["place"] for row in stored), default=-1) + 1
        return stored

    def _propose(self, vectors: np.ndarray, k: int, shown: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        among = ""
        hidden = np.zeros(self._next, dtype=bool)
        if shown is not None:
            hidden[: len(self._groups)] = self._groups.size > 0
            hidden[self._stale] = True
            hidden &= ~shown
        if shown is not None and hidden.any():
            few, which = (hidden, "not in") if hidden.sum() < shown.sum() else (shown, "in")
            among = f"place {which} {np.flatnonzero(few).tolist()}"
        found = self._client.search(
            self.collection_name,
            list(vectors),
            limit=k,
            filter=among,
            search_params={"params": self.search_params},
        )
        near, places = np.zeros((len(vectors), k), np.float32), np.full((len(vectors), k), -1)
        for row, hits in enumerate(found):
            near[row, : len(hits)] = [hit["distance"] for hit in hits]
            places[row, : len(hits)] = [hit["place"] for hit in hits]
        return near, places
