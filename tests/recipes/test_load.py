"""The benchmark of loading measures a load of its own model."""

import pytest


@pytest.mark.parametrize("verify", [True, False])
def test_a_load_is_measured_in_time_and_memory(script, tmp_path, verify):
    load = script("load")
    load.make_model(5000, 64).save_pretrained(tmp_path / "model")
    found = load.measure(tmp_path / "model", verify)
    assert set(found) == {"cpu_seconds", "private_mib", "mapped_mib", "peak_mib"}
    assert found["cpu_seconds"] > 0
    assert (found["mapped_mib"] > 1) == verify  # of 1.2 MiB of embeddings, which are mapped, and read only to hash them
