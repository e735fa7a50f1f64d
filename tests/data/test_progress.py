"""A progress bar is for those who wait."""

from datasets import Dataset, are_progress_bars_disabled
from helpers.tiny import LABELS

from hf_xmc import XMCData
from hf_xmc.data import progress


def test_saving_shows_a_progress_bar_only_for_many_rows(queries, tmp_path, capfd, monkeypatch):
    data = XMCData(train=queries, labels=Dataset.from_dict({"text": LABELS}))
    data.save(tmp_path / "small")
    assert capfd.readouterr() == ("", "")
    assert not are_progress_bars_disabled(), "the bars of others are hidden too"
    monkeypatch.setattr(progress, "MANY_ROWS", len(queries))
    data.save(tmp_path / "large")
    assert f"{len(queries)}/{len(queries)}" in capfd.readouterr().err
