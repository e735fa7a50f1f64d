"""Labels are divided among processes; `training/test_sharding.py` tests the collectives on real processes."""

import pytest
import torch

from hf_xmc.distributed import LabelShard


@pytest.mark.parametrize(("num_labels", "world_size"), [(11, 1), (11, 3), (2, 3), (100, 7)])
def test_every_label_is_in_exactly_one_shard(num_labels, world_size):
    shards = [LabelShard.of(num_labels, rank, world_size) for rank in range(world_size)]
    assert [label for shard in shards for label in range(shard.start, shard.stop)] == list(range(num_labels))
    sizes = [shard.stop - shard.start for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    assert LabelShard(3, 5).localize(torch.tensor([2, 3, 4, 5, -100])).tolist() == [-100, 0, 1, -100, -100]
