"""oxe-mix.lock.json: what a download asked for, where every record came from, and the checksums of what is on
disk.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from oxe_mix.errors import UserError
from oxe_mix.files import read_model, write_json
from oxe_mix.mix import Mix

LOCK_FILE = "oxe-mix.lock.json"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LockedShard(_Model):
    """One shard on disk and the source shard whose first records it holds."""

    file: str
    source_file: str
    source_shard: int
    episodes: int
    of_episodes: int
    num_bytes: int
    crc32c: str  # of the whole file, hexadecimal


class LockedSplit(_Model):
    """One split on disk, with how many episodes the source has."""

    split: str
    episodes: int
    of_episodes: int
    shards: tuple[LockedShard, ...]


class LockedDataset(_Model):
    """One dataset on disk."""

    name: str
    version: str
    folder: str  # below the data folder
    source: str
    splits: tuple[LockedSplit, ...]


class Lock(_Model):
    """The whole of a data folder. `complete` is false from the first byte fetched until the last one is in
    place.
    """

    format: int = 1
    complete: bool
    mix: Mix
    datasets: tuple[LockedDataset, ...] = ()

    def source_shards(self, name: str, split: str) -> list[int] | None:
        """The source shard of each shard on disk, or None when the lock does not know the split."""
        for dataset in self.datasets:
            for locked in dataset.splits:
                if (dataset.name, locked.split) == (name, split):
                    return [shard.source_shard for shard in locked.shards]
        return None


def read_lock(data: Path) -> Lock | None:
    """The lock of a data folder, None when it has none. Raises: UserError when it is not readable."""
    file = data / LOCK_FILE
    if not file.exists():
        return None
    return read_model(Lock, file, "the lock that oxe-mix download writes")


def write_lock(data: Path, lock: Lock) -> None:
    """Write the lock of a data folder."""
    write_json(data / LOCK_FILE, lock.model_dump(mode="json"))


def refuse_other_mix(data: Path, lock: Lock, mix: Mix) -> None:
    """Let a mix into a folder that holds another one only if it grows that one.

    Growing: same seed and sources, every dataset still there with a fraction at least as large. Names and
    weights are free: they do not change what is on disk.

    Raises: UserError naming the first difference.
    """
    new = {(spec.name, spec.split): spec for spec in mix.datasets}
    problem = f"seed {mix.seed} instead of {lock.mix.seed}" if mix.seed != lock.mix.seed else ""
    for old in lock.mix.datasets:
        spec = new.get((old.name, old.split))
        if spec is None:
            problem = problem or f"{old.name} ({old.split}) is no longer in the mix"
        elif (spec.version, mix.source_of(spec)) != (old.version, lock.mix.source_of(old)):
            problem = problem or f"{old.name} comes from another version or source"
        elif spec.fraction < old.fraction:
            problem = problem or f"{old.name} shrinks from {old.fraction:g} to {spec.fraction:g}"
    if problem:
        raise UserError(
            f"{data}: holds mix {lock.mix.name!r}, which this one does not grow: {problem}; use another --out"
        )
