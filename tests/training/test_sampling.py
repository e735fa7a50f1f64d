"""Inclusion probabilities sum to the sample size, and samples follow them."""

import pytest
import torch

from hf_xmc.training.sampling import inclusion_probabilities, systematic_sample


def test_probabilities_follow_importance_up_to_one():
    importance = torch.tensor([4.0, 40.0, 0.0, 2.0, 2.0])
    # 40 is drawn for sure; what is left of 3 are 2 draws for 4 + 2 + 2, of which 4 would get 2 * 4 / 8 = 1.
    assert inclusion_probabilities(importance, 3).tolist() == [1, 1, 0, 0.5, 0.5]
    assert inclusion_probabilities(importance, 1).tolist() == pytest.approx([4 / 48, 40 / 48, 0, 2 / 48, 2 / 48])


@pytest.mark.parametrize("size", [1, 3, 50, 101, 102])
def test_probabilities_sum_to_the_sample_size(size):
    importance = torch.distributions.Pareto(1.0, 0.5).sample((101,))
    probabilities = inclusion_probabilities(importance, size)
    assert float(probabilities.sum()) == pytest.approx(min(size, 101))
    assert probabilities.max() <= 1
    inside = probabilities < 1
    ratio = probabilities[inside] / importance[inside]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_label_with_importance_nan_is_always_sampled():
    importance = torch.tensor([1.0, torch.inf, 1.0, torch.nan, 1.0])
    assert inclusion_probabilities(importance, 2)[[1, 3]].tolist() == [1, 1]
    assert inclusion_probabilities(torch.zeros(3), 2).tolist() == [0, 0, 0]


def test_sample_has_its_size_and_follows_its_probabilities():
    torch.manual_seed(0)
    probabilities = inclusion_probabilities(torch.rand(37) ** 3, 9)
    draws = torch.zeros(4000, 37)
    for i in range(len(draws)):
        drawn = systematic_sample(probabilities)
        assert len(drawn) == 9
        draws[i, drawn] = 1
    spread = (probabilities * (1 - probabilities) / len(draws)).sqrt()
    assert ((draws.mean(0) - probabilities).abs() <= 5 * spread).all()
    assert draws[:, probabilities == 1].all()
