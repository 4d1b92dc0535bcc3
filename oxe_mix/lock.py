"""oxe-mix.lock.json: what a download asked for, where every record came from, and the checksums of what is on
disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from oxe_mix.errors import UserError
from oxe_mix.files import json_bytes, parse_model, read_model
from oxe_mix.mix import DatasetSpec, Mix
from oxe_mix.mods import Mod
from oxe_mix.rlds import INFO_FILE

LOCK_FILE = "oxe-mix.lock.json"


def holds_rlds(folder: Path) -> bool:
    """Whether a folder is one of datasets, downloaded by us or not: NAME/VERSION, or a lock."""
    return (folder / LOCK_FILE).exists() or any(folder.glob(f"*/*/{INFO_FILE}"))


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LockedShard(_Model):
    """One shard on disk and the source shard whose first records it holds."""

    file: str
    source_file: str
    source_shard: int
    source_bytes: int | None  # of the whole file at the source; None where it was not said
    source_check: str | None  # `crc32c:…` or `etag:…` of the same
    of_episodes: int  # records of the source shard
    taken: int  # the first so many of them were taken
    episodes: int  # and this many are left after the mods
    num_bytes: int
    crc32c: str  # of the file on disk, hexadecimal


class LockedSplit(_Model):
    """One split on disk: of the source's episodes so many were taken, and so many left by the mods."""

    split: str
    of_episodes: int
    taken: int
    episodes: int
    shards: tuple[LockedShard, ...]


class LockedDataset(_Model):
    """One dataset on disk."""

    name: str
    version: str
    folder: str  # below the data folder
    source: str
    mods: tuple[Mod, ...]  # applied to what is on disk
    splits: tuple[LockedSplit, ...]


class Lock(_Model):
    """The whole of a data folder. `complete` is false from the first byte fetched until the last one is in
    place; `datasets` is then what an earlier, smaller mix left there.
    """

    format: Literal[2] = 2
    complete: bool
    mix: Mix  # with the fractions that its budgets left
    datasets: tuple[LockedDataset, ...] = ()

    def source_shards(self, name: str, split: str) -> list[int] | None:
        """The source shard of each shard on disk, or None when the lock does not know the split."""
        for dataset in self.datasets:
            for locked in dataset.splits:
                if (dataset.name, locked.split) == (name, split):
                    return [shard.source_shard for shard in locked.shards]
        return None

    def mods_of(self, name: str) -> tuple[Mod, ...]:
        """The mods that were applied to a dataset on disk; none when the lock does not know it."""
        return next((dataset.mods for dataset in self.datasets if dataset.name == name), ())


def read_lock(data: Path) -> Lock | None:
    """The lock of a data folder, None when it has none. Raises: UserError when it is not readable."""
    file = data / LOCK_FILE
    if not file.exists():
        return None
    return read_model(Lock, file, "the lock that oxe-mix download writes")


def parse_lock(text: bytes | None, where: str) -> Lock | None:
    """The lock of a target, None when it has none. Raises: UserError when it is not readable."""
    return None if text is None else parse_model(Lock, text, where, "the lock that oxe-mix download writes")


def lock_bytes(lock: Lock) -> bytes:
    """A lock as it stands in its file."""
    return json_bytes(lock.model_dump(mode="json"))


def refuse_other_mix(data: str, lock: Lock, mix: Mix) -> None:
    """Let a mix into a folder that holds another one only if it grows that one.

    Growing: same seed, mods and a source in common, every dataset still there with a fraction at least as
    large. Names and weights are free: they do not change what is on disk.

    Raises: UserError naming the first difference.
    """
    new = {(spec.name, spec.split): spec for spec in mix.datasets}
    problem = f"seed {mix.seed} instead of {lock.mix.seed}" if mix.seed != lock.mix.seed else ""
    for old in lock.mix.datasets:
        spec = new.get((old.name, old.split))
        problem = problem or (
            _difference(spec, mix, old, lock.mix)
            if spec is not None
            else f"{old.name} ({old.split}) is no longer in the mix"
        )
    if problem:
        raise UserError(
            f"{data}: holds mix {lock.mix.name!r}, which this one does not grow: {problem}; use another --out"
        )


def _difference(spec: DatasetSpec, mix: Mix, old: DatasetSpec, old_mix: Mix) -> str:
    if spec.version != old.version or not set(mix.sources_of(spec)) & set(old_mix.sources_of(old)):
        return f"{old.name} comes from another version or source"
    if spec.mods != old.mods:
        return f"{old.name} has other mods"
    # A fraction that a budget left is a share of whole episodes: equal ones may differ in the last digit.
    if spec.fraction < old.fraction * (1 - 1e-12):
        return f"{old.name} shrinks from {old.fraction:g} to {spec.fraction:g}"
    return ""
