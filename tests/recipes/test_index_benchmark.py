"""The embeddings that the benchmark of indexes compares."""

import numpy as np
import pytest


@pytest.mark.parametrize("norms", ["free", "unit", "augmented"])
def test_norms_of_labels(script, norms):
    rng = np.random.default_rng(0)
    labels, queries = (rng.standard_normal((number, 5)).astype(np.float32) for number in (40, 7))
    labels[3] = 0  # a title without a known word
    changed, asked = script("index").with_norms(labels, queries, norms)
    scores, sizes = asked @ changed.T, np.linalg.norm(changed, axis=1)
    if norms == "unit":
        assert sizes == pytest.approx([1.0] * 3 + [0.0] + [1.0] * 36)
        assert scores * np.linalg.norm(labels, axis=1) == pytest.approx(queries @ labels.T, abs=1e-5)
    else:
        assert scores == pytest.approx(queries @ labels.T, abs=1e-5)
    if norms == "augmented":
        assert sizes == pytest.approx([np.linalg.norm(labels, axis=1).max()] * 40)
        distances = np.linalg.norm(asked[:, None] - changed, axis=2)
        assert (distances.argmin(1) == scores.argmax(1)).all()
    assert changed is not labels
