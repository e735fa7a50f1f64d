"""Hard negatives are the best labels without the positives of a query, and are refreshed during a run."""

import pytest
import torch
from helpers.tiny import LABELS, POSITIVES, make_static_encoder
from helpers.training import tiny_arguments

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
def test_mined_negatives_are_the_best_labels_without_the_positives(encoder, queries, depth, monkeypatch):
    monkeypatch.setattr("hf_xmc.training.mining.BLOCK", 5)  # 13 queries
    assert torch.equal(mine_hard_negatives(encoder, queries, LABELS, depth), best_by_hand(encoder, queries, depth))


def trainer_of(queries, folder, **settings):
    args = tiny_arguments(folder, label_mode="mined", learning_rate=0.5, num_train_epochs=5, **settings)
    return XMCTrainer(make_static_encoder(), args, queries, labels=LABELS, loss=losses.DecoupledSoftmaxLoss())


def test_miner_refreshes_the_shortlist_at_its_interval(queries, tmp_path, monkeypatch):
    trainer = trainer_of(queries, tmp_path, num_hard_negatives=2)
    trainer.add_callback(HardNegativeMiner(trainer, start=1, every=2, depth=4))
    mined, seen = [], []

    def mine(encoder, *args, **settings):
        mined.append(trainer.state.epoch)
        return mine_hard_negatives(encoder, *args, **settings)

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


def test_miner_is_refused_in_modes_that_draw_no_mined_negatives(queries, tmp_path):
    args = XMCTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    exact = XMCTrainer(make_static_encoder(), args, queries, labels=LABELS)
    with pytest.raises(ValueError, match=r"got AllLabels\. Set label_mode to `mined`"):
        HardNegativeMiner(exact)
    with pytest.raises(ValueError, match="`every` and `depth` at least 1, got 0, 0 and 100"):
        HardNegativeMiner(trainer_of(queries, tmp_path), every=0)
