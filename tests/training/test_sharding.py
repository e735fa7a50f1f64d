"""One, two and three real processes train the same model."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from helpers import distributed_steps
from helpers.processes import launch, path
from helpers.tiny import HELPERS, LABELS, best_of_texts, make_bert_encoder, several_texts
from helpers.votes import mean_of_votes

from hf_xmc.losses import functional
from hf_xmc.padding import pad

STEPS = HELPERS / "distributed_steps.py"


@pytest.fixture(scope="module")
def alone(still_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return {
        name: distributed_steps.train(still_bert, folder, loss, settings, 1)
        for name, (loss, settings) in distributed_steps.CASES.items()
    }


@pytest.fixture(scope="module", params=[2, 3])
def together(request, still_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    launch(request.param, STEPS, still_bert, folder)
    results = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(request.param)]
    assert len(list(folder.glob("rank*.pt"))) == request.param
    return results


FORMULAS = {
    "DecoupledSoftmaxLoss": functional.decoupled_softmax_loss,
    "SoftmaxLoss": functional.softmax_loss,
    "SoftTopKLoss": lambda scores, positives, weights: functional.soft_top_k_loss(
        scores, positives, 5, weights=weights
    ),
    "BCELoss": lambda scores, positives, weights: functional.bce_loss(scores, positives, weights, bias=-10.0),
}


def exact_gradients(still_bert, loss, settings, batches):
    """Of the formula on the whole score matrix, in float64: the mean over the accumulated batches."""
    encoder = distributed_steps.make_encoder(still_bert, settings).double()
    for batch in batches:
        features = {name.removeprefix("text_"): x for name, x in batch.items() if name.startswith("text_")}
        queries = encoder({**features, "task": "query"})["sentence_embedding"]
        table, label_of = several_texts()
        texts = list(table["text"]) if "labels" in settings else LABELS
        labels = encoder({**encoder.preprocess(texts, task="document"), "task": "document"})["sentence_embedding"]
        scores = best_of_texts(queries @ labels.T, label_of[: len(texts)])
        weights = batch["label_weights"].double()
        value = FORMULAS[loss.__name__](scores, batch["label"], weights)
        value = value + settings.get("vote_loss", 0) * mean_of_votes(queries, batch["label"], weights)
        (value / len(batches)).backward()
    return {f"model.{name}": p.grad for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", distributed_steps.CASES)
def test_first_update_has_the_gradient_of_the_formula(case, alone, together, still_bert):
    loss, settings = distributed_steps.CASES[case]
    batches = alone[case]["batches"][: settings.get("gradient_accumulation_steps", 1)]
    expected = exact_gradients(still_bert, loss, settings, batches)
    assert max(float(gradient.norm()) for gradient in expected.values()) > 0.01
    for result in [alone, *together]:
        got = {name: g for name, g in result[case]["gradients"].items() if name.startswith("model.")}
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(
                got[name].double(), gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("case", distributed_steps.CASES)
def test_processes_train_the_weights_of_one_process(case, alone, together):
    """At every step."""
    expected = alone[case]
    assert expected["world_size"] == 1
    _, settings = distributed_steps.CASES[case]
    assert len(expected["losses"]) == distributed_steps.STEPS * settings.get("gradient_accumulation_steps", 1)
    for result in together:
        got = result[case]
        assert got["world_size"] == len(together)
        assert got["losses"] == pytest.approx(expected["losses"], rel=1e-3)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(
                got["weights"][name], weight, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
            assert torch.equal(got["weights"][name], together[0][case]["weights"][name]), "the processes differ"


WITH_VECTORS = [case for case, (_, settings) in distributed_steps.CASES.items() if "label_vectors" in settings]


@pytest.mark.parametrize("case", WITH_VECTORS)
def test_processes_train_the_label_vectors_of_one_process(case, alone, together):
    expected = alone[case]["vectors"]
    assert expected.norm(dim=1).min() > 0.001
    for result in together:
        assert result[case]["world_size"] == len(together)
        torch.testing.assert_close(result[case]["vectors"], expected, rtol=1e-3, atol=1e-4)


def test_norm_of_the_gradient_covers_the_vectors_of_all_processes(together, still_bert, tmp_path):
    alone = distributed_steps.clipped_vectors(still_bert, tmp_path, 1)
    assert min(alone["norms"]) > 0.05, "nothing was clipped"
    for result in together:
        got = result["clipped vectors"]
        assert got["world_size"] == len(together)
        assert got["norms"] == pytest.approx(alone["norms"], rel=1e-3)
        torch.testing.assert_close(got["vectors"], alone["vectors"], rtol=1e-3, atol=1e-4)


def test_banks_of_all_processes_together_correct_the_query_gradient(together):
    parts = [torch.stack(result["query gradients"]) for result in together]
    exact, of_sample, corrected = torch.stack(parts).sum(0)
    assert (of_sample - exact).norm() > 0.05 * exact.norm(), "the sample missed nothing"
    assert (corrected - exact).norm() < 0.01 * exact.norm()  # the bank is in bfloat16


def test_two_nodes_train_like_one_process(alone, still_bert, tmp_path):
    """A launcher on each of two nodes, both on this machine, which meet as those of a cluster do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    case = "decoupled in chunks"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path()}
    where = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    launcher = [sys.executable, "-m", "torch.distributed.run", *where]
    nodes = [
        subprocess.Popen(
            [*launcher, "--node_rank", str(node), str(STEPS), str(still_bert), str(tmp_path), case],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    errors = [node.communicate(timeout=250)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    for rank in range(2):
        got = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)[case]
        assert got["world_size"] == 2
        assert got["losses"] == pytest.approx(alone[case]["losses"], rel=1e-3)


def test_incomplete_last_batch_takes_part(together):
    for result in together:
        assert result["ragged"]["losses"] == pytest.approx(together[0]["ragged"]["losses"], rel=1e-6)
        for name, weight in result["ragged"]["weights"].items():
            assert torch.equal(weight, together[0]["ragged"]["weights"][name]), name
    batches_an_epoch = -(-13 // distributed_steps.GLOBAL_BATCH)
    assert len(together[0]["ragged"]["losses"]) == distributed_steps.STEPS
    assert batches_an_epoch == 3


def test_process_without_a_label_takes_part(together, still_bert, tmp_path):
    alone = distributed_steps.one_label(still_bert, tmp_path, 1)
    assert alone["losses"][-1] < alone["losses"][0]
    for result in together:
        got = result["one label"]
        assert got["losses"] == pytest.approx(alone["losses"], rel=1e-3)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(got["weights"][name], weight, rtol=1e-3, atol=1e-4)


def test_evaluation_loss_equals_that_of_one_process(together, still_bert):
    """13 queries on 2 and 3 processes: those that fill up a batch count once."""
    encoder, rows = make_bert_encoder(still_bert), distributed_steps.queries()
    scores = encoder.encode(rows["text"], convert_to_tensor=True) @ encoder.encode(LABELS, convert_to_tensor=True).T
    positives, weights = pad(rows["label_ids"]), pad(rows["label_scores"], fill=0.0)
    expected = float(functional.decoupled_softmax_loss(scores.double(), positives, weights))
    for result in together:
        assert result["evaluations"] == pytest.approx(dict.fromkeys(result["evaluations"], expected), rel=1e-5)
        assert len(result["evaluations"]) == 4


def test_second_run_with_model_init_equals_the_first_on_several_processes(together):
    for result in together:
        assert result["second run"]["moved"] > 0.001
        assert result["second run"]["apart"] == 0
        first, second = result["second run"]["runs"]
        assert [first, second] == together[0]["second run"]["runs"], "the processes do not agree on the run"
        assert first != second


def test_steps_of_every_case_move_the_weights(alone, still_bert):
    for case, result in alone.items():
        encoder = distributed_steps.make_encoder(still_bert, distributed_steps.CASES[case][1])
        start = dict(encoder.named_parameters())
        moved = sum(float((result["weights"][f"model.{name}"] - p.detach()).norm()) for name, p in start.items())
        assert moved > 0.01, case
    assert alone["bce"]["weights"]["bias"] != -10


def test_ragged_rows_are_gathered_in_rank_order(together):
    size = len(together)
    for rank, result in enumerate(together):
        found = result["collectives"]
        assert found["size"] == size
        expected = [[float(r)] * (r + 2) + [-1.0] * (size - 1 - r) for r in range(size) for _ in range(r + 1)]
        assert found["rows"].tolist() == expected
        first = sum(range(1, rank + 1))  # its queries' place among all
        share = sum(range(1, size + 1))  # each process has added its rank + 1
        assert found["gradient"][:, 0].tolist() == [share * (first + i) for i in range(rank + 1)]
