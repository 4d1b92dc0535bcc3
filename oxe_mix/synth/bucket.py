"""`oxe-mix synth`: an Open-X bucket of our own, written with TFDS's own features, the same bytes for the same
seed.
"""

from __future__ import annotations

import json
import shlex
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oxe_mix.errors import UserError
from oxe_mix.files import atomic_write, write_json
from oxe_mix.rlds import FEATURES_FILE, INFO_FILE, DatasetInfo, Split
from oxe_mix.synth.episodes import world_episode
from oxe_mix.synth.features import Node, save_features, serialize
from oxe_mix.synth.generic import random_episode
from oxe_mix.synth.plan import BucketPlan, DatasetPlan, SynthOptions, plan_bucket
from oxe_mix.synth.robots import ROBOTS
from oxe_mix.text import count, say, size
from oxe_mix.tfrecord import FRAME_BYTES, frame
from oxe_mix.writing import writing

_NOTE = "synth.json"  # the settings, from the start; how much it came to, when all is made


@dataclass(frozen=True, slots=True)
class _Shard:
    dataset: DatasetPlan
    split: str
    index: int
    num_shards: int
    episodes: range
    seed: int
    out: Path


@dataclass(frozen=True, slots=True)
class _Written:
    """What came of a shard: bytes without the records' frames."""

    payload_bytes: int
    steps: int


def run_synth(options: SynthOptions) -> int:
    """Make a bucket of six datasets that can be learnt, or of every dataset of a mix; returns the exit code.

    Raises: UserError when the folder holds something else, the same with other settings, or cannot be
        written; or for a mix that cannot be made.
    """
    plan, out = plan_bucket(options), options.out
    with writing(str(out)):
        if _is_made(plan, out):
            say(f"{out}: already made with these settings; nothing to do")
            return 0
        write_json(out / _NOTE, {"settings": plan.settings})
        shards = [shard for dataset in plan.datasets for shard in _shards(dataset, options.seed, out)]
        with ProcessPoolExecutor(options.workers) as pool:
            written = dict(zip(shards, pool.map(_write_shard, shards), strict=True))
        for dataset in plan.datasets:
            _write_metadata(dataset, {s: done for s, done in written.items() if s.dataset == dataset}, out)
        _finish(plan, written, out)
    return 0


def _is_made(plan: BucketPlan, out: Path) -> bool:
    """Whether this bucket lies in `out`. Raises: UserError when something else does, or a part of it."""
    if not out.exists() or not any(out.iterdir()):
        return False
    note = _note(out / _NOTE)
    if note.get("settings") != plan.settings:
        raise UserError(f"{out}: not empty, and not this bucket; delete it or choose another --out")
    if "steps" not in note:
        raise UserError(f"{out}: this bucket, but not finished: a run was cut short; delete it and run again")
    return True


def _note(file: Path) -> dict[str, Any]:
    try:
        note = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _finish(plan: BucketPlan, written: dict[_Shard, _Written], out: Path) -> None:
    steps = sum(done.steps for done in written.values())
    num_bytes = sum(done.payload_bytes for done in written.values())
    write_json(out / _NOTE, {"settings": plan.settings, "steps": steps, "bytes": num_bytes})
    made = sum(len(shard.episodes) for shard in written)
    say(
        f"asked {plan.asked}, made {made:,} in all of {count(len(plan.datasets), 'dataset')}: "
        f"{count(steps, 'step')}, {size(num_bytes)}\n"
        f"result: {out}\n"
        f"next: oxe-mix download --mix {shlex.quote(str(plan.mix))} --source {shlex.quote(str(out))}"
    )


def _shards(dataset: DatasetPlan, seed: int, out: Path) -> list[_Shard]:
    return [
        _Shard(dataset, split.name, index, len(split.shards), episodes, seed, out)
        for split in dataset.splits
        for index, episodes in enumerate(split.shards)
    ]


def _write_shard(shard: _Shard) -> _Written:
    dataset, num_bytes, num_steps = shard.dataset, 0, 0
    name = _info(dataset).shard_file(shard.split, shard.index, shard.num_shards)
    with atomic_write(_folder(dataset, shard.out) / name) as stream:
        for number in shard.episodes:
            example = _example(dataset, shard.seed, number)
            payload = serialize(dataset.tree, example)
            stream.write(frame(payload))
            num_bytes += len(payload)
            num_steps += len(example["steps"])
    return _Written(num_bytes, num_steps)


def _example(dataset: DatasetPlan, seed: int, number: int) -> Node:
    """One episode; it depends on the dataset, the seed and its number, not on what else is in the bucket."""
    robot = dataset.robot
    if robot:
        return world_episode(robot, np.random.default_rng([seed, ROBOTS.index(robot), number]), number)
    key = zlib.crc32(dataset.name.encode())
    return random_episode(dataset.card, np.random.default_rng([seed, key, number]), number)


def _write_metadata(dataset: DatasetPlan, written: dict[_Shard, _Written], out: Path) -> None:
    splits = []
    for split in dataset.splits:
        num_bytes = sum(done.payload_bytes for shard, done in written.items() if shard.split == split.name)
        splits.append(Split(split.name, tuple(map(len, split.shards)), num_bytes))
    folder = _folder(dataset, out)
    save_features(dataset.tree, folder)
    assert (folder / FEATURES_FILE).exists()
    write_json(folder / INFO_FILE, _info(dataset).with_splits(splits))
    num_frames = sum(split.num_episodes for split in dataset.splits)
    file_bytes = sum(split.num_bytes for split in splits) + FRAME_BYTES * num_frames
    assert file_bytes == sum(file.stat().st_size for file in folder.glob("*.tfrecord-*"))


def _info(dataset: DatasetPlan) -> DatasetInfo:
    shows = "A synthetic world" if dataset.robot else "Random values"
    raw = {
        "citation": "",
        "description": f"{shows} in the true layout of this dataset, made by oxe-mix synth.",
        "fileFormat": "tfrecord",
        "moduleName": "oxe_mix.synth",
        "name": dataset.release_name,
        "releaseNotes": {dataset.version: "Synthetic."},
        "version": dataset.version,
    }
    return DatasetInfo(dataset.release_name, dataset.version, {}, raw)


def _folder(dataset: DatasetPlan, out: Path) -> Path:
    return out / dataset.release_name / dataset.version
