"""Records of a dataset drawn by a seed: a few of many, each found without reading those before it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from convert.plan import DatasetOnDisk
from oxe_mix.errors import UserError
from oxe_mix.rlds import INFO_FILE
from oxe_mix.tfrecord import Record, pick_records
from train_llava.report.sampling import MOST_EPISODES

_MOST_BYTES = 128_000_000  # of a dataset's records


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record lies; shard and number count from 0."""

    split: str
    shard: int
    number: int


def drawn_records(own: DatasetOnDisk, least: int, seed: int) -> Iterator[tuple[Place, Record]]:
    """Records of a dataset in the order in which they were drawn: all, or as many as are read in a second or
    so, but `least` of them in any case.

    Raises: UserError for a shard that is not there; TFRecordError for a record that is damaged.
    """
    shards = [
        (name, shard, length)
        for name in own.splits
        for shard, length in enumerate(own.info.splits[name].shard_lengths)
    ]
    ends = np.cumsum([length for _, _, length in shards])
    total = int(ends[-1]) if shards else 0
    each = sum(own.info.splits[name].num_bytes for name in own.splits) / max(1, total)
    most = max(least, min(MOST_EPISODES, int(_MOST_BYTES / max(each, 1))))
    drawn = []
    for place in np.random.default_rng(seed).permutation(total)[:most].tolist():
        i = int(np.searchsorted(ends, place, side="right"))
        split, shard, length = shards[i]
        drawn.append(Place(split, shard, place - int(ends[i]) + length))
    found = dict(_records(own, drawn))
    yield from ((place, found.pop(place)) for place in drawn)


def _records(own: DatasetOnDisk, drawn: list[Place]) -> Iterator[tuple[Place, Record]]:
    """The same in the order of files."""
    numbers: defaultdict[tuple[str, int], set[int]] = defaultdict(set)
    for place in drawn:
        numbers[place.split, place.shard].add(place.number)
    for (split, shard), wanted in numbers.items():
        num_shards = len(own.info.splits[split].shard_lengths)
        file = own.folder / own.info.shard_file(split, shard, num_shards)
        try:
            with file.open("rb") as stream:
                for record in pick_records(stream, str(file), wanted):
                    yield Place(split, shard, record.number), record
        except FileNotFoundError as error:
            raise UserError(f"{file}: not there, though {INFO_FILE} lists it; download again") from error
