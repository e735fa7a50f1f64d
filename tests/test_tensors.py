"""Rows are scaled to unit norm, and rows of unit norm stay as they are."""

import pytest
import torch

from hf_xmc.tensors import unit_rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_only_rows_of_another_norm_are_scaled(dtype):
    rows = torch.tensor([[3, 4], [0.6, 0.8], [0, 0]], dtype=dtype)
    scaled = unit_rows(rows)
    assert scaled.dtype == dtype
    assert torch.equal(scaled, torch.tensor([[0.6, 0.8], [0.6, 0.8], [0, 0]], dtype=dtype))
    assert rows[0].tolist() == [3, 4]


def test_rows_of_unit_norm_are_not_copied():
    rows = torch.eye(3).half()
    assert unit_rows(rows).data_ptr() == rows.data_ptr()


def test_rows_that_are_not_finite_stay_so():
    assert unit_rows(torch.tensor([[float("nan"), 1.0]])).isnan().any()
