"""Propensities follow their formula, and metrics by frequency add up to those of all labels."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp

from hf_xmc.metrics.frequency import PROPENSITY_PRESETS, by_frequency_decile, inverse_propensity, label_counts
from hf_xmc.metrics.ranking import precision_at_k


def test_inverse_propensity_equals_the_formula_and_is_finite_for_unseen_labels():
    for a, b in PROPENSITY_PRESETS.values():
        got = inverse_propensity([0, 1, 10], num_train=1000, a=a, b=b)
        expected = [1 + (math.log(1000) - 1) * (b + 1) ** a * math.exp(-a * math.log(n + b)) for n in (0, 1, 10)]
        assert got == pytest.approx(expected)


def test_deciles_have_equal_size_and_their_precision_adds_up():
    rng = np.random.default_rng(1)
    truth = sp.csr_array((rng.random((83, 57)) < 0.2).astype(float))
    predicted = np.stack([rng.permutation(57)[:9] for _ in range(83)])
    counts = rng.integers(0, 5, 57)
    deciles = by_frequency_decile(predicted, truth, counts, precision_at=5, recall_at=9)
    assert sum(d.num_labels for d in deciles) == np.count_nonzero(label_counts(truth))
    assert max(d.num_labels for d in deciles) - min(d.num_labels for d in deciles) <= 1
    assert sum(d.precision for d in deciles) == pytest.approx(precision_at_k(predicted, truth, 5))
    assert all(a.max_count <= b.min_count for a, b in pairwise(deciles))
    found = sum(d.recall * d.num_positives for d in deciles)
    assert found == pytest.approx(sum(truth[i, [j]].sum() for i in range(83) for j in predicted[i]))
