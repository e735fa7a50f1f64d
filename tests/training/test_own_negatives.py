"""Users can write a class of negatives of their own."""

import pytest
import torch
from helpers.tiny import LABELS, make_static_encoder
from helpers.training import tiny_arguments

from hf_xmc import HardNegativeMiner, XMCTrainer, losses
from hf_xmc.losses import functional
from hf_xmc.training.negatives import LabelColumns, ScoredLabels, StepWork, embed_labels


class PositivesAndFirst:
    """The positives of the batch and the first labels."""

    sample_fraction = saving_rank = None

    def __init__(self, table, number):
        self.table, self.number = table, number

    def select(self, encoder, batch):
        positives = batch.positives[batch.positives >= 0]
        label_ids = torch.cat([positives, torch.arange(self.number)]).unique().numpy()
        columns = LabelColumns(label_ids, self.table.device)
        return ScoredLabels(label_ids, columns(batch.positives), columns.shard)

    def embed(self, encoder, selected):
        return embed_labels(encoder, self.table, selected.label_ids)

    def work(self, batch_size, num_positives):
        return StepWork(scored=batch_size * num_positives + self.number, embedded=7)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def trainer_of(queries, folder, **settings):
    return XMCTrainer(
        make_static_encoder(),
        tiny_arguments(folder, **{"per_device_train_batch_size": 2, **settings}),
        queries,
        labels=LABELS,
        loss=losses.SoftmaxLoss(),
        negatives=lambda table: PositivesAndFirst(table, 1),
    )


def test_own_negatives_are_the_labels_of_the_loss(queries, tmp_path):
    trainer = trainer_of(queries, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    (features,), positives = trainer.collect_features(batch)
    chosen = sorted({0, *positives[positives >= 0].tolist()})
    assert len(chosen) < len(LABELS)
    columns = torch.tensor([[chosen.index(i) if i >= 0 else -100 for i in row] for row in positives.tolist()])
    labels = trainer.model.encode_document([LABELS[i] for i in chosen], convert_to_tensor=True).clone()
    scores = trainer.model(features)["sentence_embedding"] @ labels.T
    expected = functional.softmax_loss(scores, columns)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)


def test_own_negatives_train_and_resume(queries, tmp_path):
    ends = []
    for checkpoint in (None, str(tmp_path / "a" / "checkpoint-2")):
        folder = tmp_path / ("a" if checkpoint is None else "b")
        trainer = trainer_of(queries, folder, max_steps=4, save_strategy="steps", save_steps=2)
        before = trainer.model[0].embedding.weight.detach().clone()
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append(trainer.model[0].embedding.weight.detach().clone())
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], before)
    assert (
        "scores 2 queries on 1 process against 4 of 11 labels, about 3 negatives per query" in trainer.describe_step()
    )
    assert "embeds 7 label texts per step" in trainer.describe_step()


def test_own_negatives_exclude_a_label_mode(queries, tmp_path):
    with pytest.raises(ValueError, match="label_mode must be None if `negatives` are given, got 'exact'"):
        trainer_of(queries, tmp_path, label_mode="exact")


def test_the_miner_refuses_negatives_without_a_shortlist(queries, tmp_path):
    with pytest.raises(ValueError, match="must have a shortlist of hard negatives, got PositivesAndFirst"):
        HardNegativeMiner(trainer_of(queries, tmp_path))
