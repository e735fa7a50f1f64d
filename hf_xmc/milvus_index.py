"""Labels in a Milvus database: it proposes labels, and the stored embeddings rank them in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from hf_xmc.proposals import ProposingIndex

try:
    from pymilvus import DataType, MilvusClient
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("MilvusIndex needs pymilvus: pip install 'hf_xmc[milvus]'.") from error

SENT_AT_ONCE = 4096  # vectors of one message


class MilvusIndex(ProposingIndex):
    """A label index whose search is done by Milvus: a cluster, or a file that `milvus-lite` opens in this process.

    Args:
        embeddings: as in :class:`hf_xmc.LabelIndex`; they rank what Milvus proposes, so that scores are exact.
        uri: ``"http://host:19530"``, or the path of a file, ``"labels.db"``.
        collection_name: of the collection that is made.
        token: ``"user:password"`` or an API key.
        keep: the collection stays after :meth:`close`, and one that such an index left is used again, not filled anew.
        index_type, index_params: what Milvus builds, such as ``"HNSW"``, ``{"M": 32, "efConstruction": 200}``.
        search_params: of that index, such as ``{"ef": 128}``.
        refine: labels proposed for each that is wanted.

    Raises:
        ValueError: the collection is there already, and is not to be kept or not of these embeddings.

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
        self._client = MilvusClient(uri, token=token)
        self._reuse = self._client.has_collection(collection_name)
        if self._reuse and not keep:
            raise ValueError(
                f"{uri} has a collection {collection_name!r} already: choose another name or drop it, or say keep=True "
                "if an index of these labels left it."
            )
        super().__init__(embeddings, refine)

    def close(self) -> None:
        """Drop the collection, unless it is to be kept, and leave the database."""
        if not self.keep:
            self._client.drop_collection(self.collection_name)
        self._client.close()

    def __enter__(self) -> MilvusIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self, vectors: np.ndarray) -> None:
        if self._reuse:
            self._check(vectors)
            self._reuse = False
            return
        self._client.drop_collection(self.collection_name)
        schema = self._client.create_schema(auto_id=False)
        schema.add_field("place", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=vectors.shape[1])
        index, metric = self._client.prepare_index_params(), "IP" if self._by_product else "L2"
        index.add_index("vector", index_type=self.index_type, metric_type=metric, params=self.index_params)
        self._client.create_collection(
            self.collection_name, schema=schema, index_params=index, consistency_level="Strong"
        )
        self._insert(vectors, self._label_of)

    @property
    def _by_product(self) -> bool:
        return "IVF" not in self.index_type

    def _check(self, vectors: np.ndarray) -> None:
        """That a collection is of these vectors: there are as many, and three of them are the same."""
        (count,) = self._client.query(self.collection_name, filter="", output_fields=["count(*)"])
        places = sorted({0, len(vectors) // 2, len(vectors) - 1})
        rows = self._client.get(self.collection_name, places, output_fields=["place", "vector"])
        stored = {row["place"]: np.asarray(row["vector"], np.float32) for row in rows}
        same = sorted(stored) == places and all(np.array_equal(stored[place], vectors[place]) for place in places)
        if count["count(*)"] != len(vectors) or not same:
            raise ValueError(
                f"the collection {self.collection_name!r} is not of these {len(vectors)} embeddings, or labels of it "
                "were removed: drop it, or choose another name."
            )

    def _insert(self, vectors: np.ndarray, places: np.ndarray) -> None:
        for at in range(0, len(vectors), SENT_AT_ONCE):
            here = slice(at, at + SENT_AT_ONCE)
            rows = zip(places[here].tolist(), vectors[here], strict=True)
            self._client.insert(self.collection_name, [{"place": place, "vector": vector} for place, vector in rows])

    def _forget(self, places: np.ndarray) -> None:
        if len(places):
            self._client.delete(self.collection_name, ids=places.tolist())

    def _propose(self, vectors: np.ndarray, k: int, shown: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        among = ""
        if shown is not None and (hidden := ~shown & (self._label_of >= 0)).any():
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
