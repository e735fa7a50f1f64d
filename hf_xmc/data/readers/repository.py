"""Download data sets from the Hub to the cache."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import yaml
from datasets.data_files import sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import metadata_load

from hf_xmc.storage.snapshots import Snapshot

CARD, CARD_TOO = "README.md", ".huggingface.yaml"  # the second overrides the first
CONFIGS = ("default", "labels", "filter_pairs")


def download(name: str, **settings: Any) -> Path:
    """Return the cache folder with the tables of a data set on the Hub, all from one commit.

    Only the files of the required configs are downloaded, and those that ``datasets`` always reads: the files of the
    first config, and of configs without ``data_files``.

    Args:
        name: ``org/name``.
        settings: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and ``force_download``, as in
            :class:`hf_xmc.storage.snapshots.Snapshot`.

    Raises:
        ValueError: if the data set or the revision does not exist, if its card cannot be read, or if a file can be
            neither downloaded nor found in the cache. A file that the cache does not know may still exist.
    """
    # `datasets` can be offline when the Hub's client is not.
    settings["local_files_only"] = settings.get("local_files_only", False) or datasets.config.HF_HUB_OFFLINE
    place = Snapshot(name, repo_type="dataset", **settings)
    folder = place.download([CARD, CARD_TOO, "dataset_infos.json"])
    place.check_known([CARD, CARD_TOO])
    if patterns := list(_patterns(configs_of(folder, str(place)))):
        place.download(patterns)
        if place.files is None:  # the cache may have only some of the files that match a pattern
            place.check_known(patterns)
    return folder


def configs_of(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Return the configs in the card of a folder, with their settings.

    Raises:
        ValueError: if the card cannot be read. The message calls the data set ``name``.
    """
    try:
        card: dict[str, Any] = metadata_load(folder / CARD) or {} if (folder / CARD).exists() else {}
        if (folder / CARD_TOO).exists():
            card |= yaml.safe_load((folder / CARD_TOO).read_text(encoding="utf-8")) or {}
        configs = MetadataConfigs.from_dataset_card_data(card)
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"{name}: the configs in its {CARD} cannot be read ({error}).") from error
    return dict(configs)


def _patterns(configs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield patterns for the Hub's client that match the files of the configs, and possibly more files."""
    for number, (name, config) in enumerate(configs.items()):
        files, data_dir = config.get("data_files"), config.get("data_dir")
        if data_dir or not files:
            yield (PurePosixPath(str(data_dir or "")) / "*").as_posix()
        elif number == 0 or name in CONFIGS:
            for pattern in chain.from_iterable(sanitize_patterns(files).values()):
                inner = pattern.rpartition("::")[2]  # an archive
                if "://" not in inner:
                    yield PurePosixPath(inner).as_posix().replace("**/", "*")
