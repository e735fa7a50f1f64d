"""The in-batch losses on two real processes have the gradient of the formula in float64."""

import pytest
import torch
from helpers import distributed_in_batch
from helpers.in_batch import assert_same_weights, one_step_after
from helpers.processes import launch
from helpers.tiny import HELPERS, make_bert_encoder
from sentence_transformers.util import cos_sim

WORLD_SIZE = 2
STEPS = HELPERS / "distributed_in_batch.py"


@pytest.fixture(scope="module")
def together(still_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    launch(WORLD_SIZE, STEPS, still_bert, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("case", distributed_in_batch.CASES)
def test_step_has_the_gradient_of_the_formula_on_two_processes(case, together, still_bert):
    name, settings, accumulation = distributed_in_batch.CASES[case]
    results = [result[case] for result in together]
    assert [result["world_size"] for result in results] == [WORLD_SIZE] * WORLD_SIZE
    assert [len(result["batches"]) for result in results] == [accumulation] * WORLD_SIZE
    accumulated = list(zip(*(result["batches"] for result in results), strict=True))
    labels = {tuple(row) for processes in accumulated for _, label in processes for row in label.tolist()}
    assert len(labels) > 3 * accumulation, "the processes were given the same rows"
    gathered = settings.get("gather_across_devices", False)
    expected, largest = one_step_after(make_bert_encoder(still_bert), name, accumulated, cos_sim, gathered)
    assert largest > 0.01
    for result in results:
        assert_same_weights(result["weights"], expected)


def test_evaluation_on_two_processes_equals_that_on_one(together):
    (logged,) = together[0]["decoupled, apart"]["metrics"]
    alone = together[0]["decoupled, apart"]["metrics_here"]
    assert {name: logged[f"eval_{name}"] for name in alone} == alone
