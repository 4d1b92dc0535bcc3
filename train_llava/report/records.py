"""Records of a dataset drawn by a seed: a few of many, each found without reading those before it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO

import numpy as np

from convert.plan import DatasetOnDisk
from oxe_mix.errors import UserError
from oxe_mix.rlds import INFO_FILE
from oxe_mix.tfrecord import RecordPlace, find_records, read_payload
from train_llava.report.sampling import MOST_EPISODES

_MOST_BYTES = 128_000_000  # of a dataset's records


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record lies; shard and number count from 0."""

    split: str
    shard: int
    number: int


def drawn_records(own: DatasetOnDisk, least: int, seed: int) -> Iterator[tuple[Place, bytes | UserError]]:
    """Payloads of a dataset's records in the order in which they were drawn, or what is wrong with one: all,
    or as many as are read in a second or so, but `least` of them in any case.
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


def _records(own: DatasetOnDisk, drawn: list[Place]) -> Iterator[tuple[Place, bytes | UserError]]:
    """The same in the order of files."""
    numbers: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for place in drawn:
        numbers[place.split, place.shard].append(place.number)
    for (split, shard), wanted in numbers.items():
        file = own.folder / own.info.shard_file(split, shard, len(own.info.splits[split].shard_lengths))
        name = str(file.relative_to(own.data.path))
        try:
            with file.open("rb") as stream:
                for number, payload in _payloads(stream, name, wanted):
                    yield Place(split, shard, number), payload
        except OSError as error:
            wrong = UserError(f"{name}: cannot be read ({error.strerror}), though {INFO_FILE} lists it")
            yield from ((Place(split, shard, number), wrong) for number in wanted)


def _payloads(stream: BinaryIO, name: str, wanted: list[int]) -> Iterator[tuple[int, bytes | UserError]]:
    places, end = list[RecordPlace](), UserError(f"{name}: holds fewer records than {INFO_FILE} says")
    try:
        places.extend(islice(find_records(stream, name), max(wanted) + 1))
    except UserError as error:  # nothing behind it can be found
        end = error
    for number in wanted:
        try:
            yield number, read_payload(stream, places[number], name) if number < len(places) else end
        except UserError as error:
            yield number, error
