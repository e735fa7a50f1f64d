"""Hard negatives are the best labels that are not a query's own, and a run draws them as it should."""

import pytest
import torch
from conftest import LABELS, POSITIVES, make_static_encoder

from hf_xmc import HardNegativeMiner, XMCTrainer, XMCTrainingArguments, losses, mine_hard_negatives


def best_by_hand(encoder, queries, depth):
    scores = (
        encoder.encode_query(queries["text"], convert_to_tensor=True)
        @ encoder.encode_document(LABELS, convert_to_tensor=True).T
    )
    for row, ids in enumerate(queries["label_ids"]):
        scores[row, ids] = -torch.inf
    best = scores.topk(depth, dim=1)
    return torch.where(best.values > -torch.inf, best.indices, -1).int()


@pytest.mark.parametrize("depth", [3, 9, 11])
def test_the_best_labels_that_are_not_a_querys_own(encoder, queries, depth, monkeypatch):
    monkeypatch.setattr("hf_xmc.training.mining.BLOCK", 5)  # 13 queries
    assert torch.equal(mine_hard_negatives(encoder, queries, LABELS, depth), best_by_hand(encoder, queries, depth))


def trainer_of(queries, folder, **settings):
    args = XMCTrainingArguments(
        str(folder),
        use_cpu=True,
        label_mode="mined",
        per_device_train_batch_size=5,
        learning_rate=0.5,
        num_train_epochs=5,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    return XMCTrainer(make_static_encoder(), args, queries, labels=LABELS, loss=losses.DecoupledSoftmaxLoss())


def test_the_list_is_renewed_when_it_should_be(queries, tmp_path, monkeypatch):
    trainer = trainer_of(queries, tmp_path, num_hard_negatives=2)
    trainer.add_callback(HardNegativeMiner(trainer, start=1, every=2, depth=4))
    mined, seen = [], []

    def mine(encoder, *args):
        mined.append(trainer.state.epoch)
        return mine_hard_negatives(encoder, *args)

    monkeypatch.setattr("hf_xmc.training.mining.mine_hard_negatives", mine)
    select = trainer.negatives.select

    def recorded(encoder, step):
        candidates = select(encoder, step)
        own = {label for ids in step.positives.tolist() for label in ids if label >= 0}
        extra = set(candidates.label_ids.tolist()) - own
        listed = set(trainer.negatives.shortlist[step.rows].flatten().tolist())
        assert own <= set(candidates.label_ids.tolist())
        assert extra <= listed
        seen.append(len(extra))
        return candidates

    trainer.negatives.select = recorded
    trainer.train()
    assert mined == [1, 3]
    assert sum(seen[:3]) == 0, "before the first mining there is no list"
    assert min(seen[3:]) > 0
    expected = max(len(ids) for ids in POSITIVES)
    assert trainer.negatives.shortlist.shape == (13, 4)
    assert expected == 3


def test_only_a_trainer_that_draws_them_has_them_mined(queries, tmp_path):
    args = XMCTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    exact = XMCTrainer(make_static_encoder(), args, queries, labels=LABELS)
    with pytest.raises(ValueError, match="only a trainer with label_mode `mined`"):
        HardNegativeMiner(exact)
    with pytest.raises(ValueError, match="got 0, 0 and 100"):
        HardNegativeMiner(trainer_of(queries, tmp_path), every=0)
