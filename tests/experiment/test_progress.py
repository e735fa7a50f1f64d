import pytest
from transformers import TrainerControl, TrainerState

from hf_xmc.experiment.progress import Lines


@pytest.mark.parametrize(
    ("state", "line"),
    [
        # transformers counts a part of an epoch as one: num_train_epochs is 2 for 1.5 epochs, and 1 for 30 steps
        (TrainerState(epoch=0.5, global_step=7, max_steps=21, num_train_epochs=2), "epoch 0.5 of 1.5, step 7 of 21: "),
        (TrainerState(epoch=0.2, global_step=20, max_steps=30, num_train_epochs=1), "epoch 0.2 of 0.3, step 20 of 30"),
        (TrainerState(epoch=3.0, global_step=63, max_steps=168, num_train_epochs=8), "epoch 3 of 8, step 63 of 168: "),
        (TrainerState(epoch=0, global_step=0, max_steps=168, num_train_epochs=8), "epoch 0 of 8, step 0 of 168: "),
    ],
)
def test_a_line_shows_parts_of_epochs(capsys, state, line):
    Lines().on_log(None, state, TrainerControl(), {"eval_P@1": 0.768})
    err = capsys.readouterr().err
    assert line in err
    assert err.endswith(": P@1 76.8\n")
