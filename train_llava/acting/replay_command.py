"""`oxe-mix replay`: one recorded episode through the path that a robot is served by, as figures, picture and
JSON.
"""

from __future__ import annotations

import difflib
import os
import shlex
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from convert.action_codec import ActionCodec, read_codec
from convert.manifest import read_manifest
from convert.reader import ConversationReader, Sample
from oxe_mix import __version__
from oxe_mix.cards import load_card
from oxe_mix.errors import UserError, did_you_mean
from oxe_mix.files import write_json
from oxe_mix.text import count, say, table, warn
from train_llava.acting.episodes import find_episode, stretches
from train_llava.acting.load import Loading, codec_of, load_policy
from train_llava.acting.validator import OnViolation, validator_of
from train_llava.dimensions import dimension_names
from train_llava.recorded import Translation, other_statistics, refuse_other_dataset, refuse_other_tokens

if TYPE_CHECKING:
    from train_llava.acting.replay import Replayed
    from train_llava.acting.replay_picture import Drawing

Part = Literal["val", "train"]
_PARTS: dict[Part, str] = {"val": "held-out", "train": "training"}
_SUGGESTED, _LOOKED_AT = 3, 500  # ids in a message, and among how many they are looked for


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What a user asked for."""

    checkpoint: Path
    data: Path
    episode: str | None = None  # as in the conversations' ids; None: the first
    part: str = "val"
    out: Path | None = None  # a folder
    unnorm_key: str | None = None  # None: what the episode's dataset is called
    limits: Path | None = None
    on_violation: OnViolation = "clamp"
    loading: Loading = field(default_factory=Loading)


@dataclass(frozen=True, slots=True)
class _Task:
    """What was asked for, proved to fit together."""

    options: ReplayOptions
    part: Part
    samples: list[Sample]
    translation: Translation
    codec: ActionCodec  # of the checkpoint
    out: Path  # without .json and .png

    @property
    def episode(self) -> str:
        """NAME/SPLIT/SHARD/EPISODE."""
        return self.samples[0].episode

    @property
    def instruction(self) -> str:
        """What the robot was told to do, at first."""
        return self.translation.instruction(self.samples[0])

    @property
    def dataset(self) -> str:
        """Whose it is."""
        return self.samples[0].dataset


def run_replay(options: ReplayOptions) -> int:
    """Replay an episode, print the figures, write picture and JSON.

    Returns: the exit code.
    Raises: UserError for what the user can mend.
    """
    task = _prove(options)
    told = count(len(task.samples), f"{_PARTS[task.part]} sample")
    say(f'{options.checkpoint} on {task.episode}, {told}: "{task.instruction}"')
    validator = validator_of(task.codec, options.limits, options.on_violation)
    policy = load_policy(options.checkpoint, options.loading)
    from train_llava.acting.replay import figures, replay
    from train_llava.acting.replay_picture import draw_replay

    replayed = replay(policy, validator, task.translation, task.samples)
    report = figures(replayed, task.dataset, task.codec.binning)
    names = _names(task)
    draw_replay(_drawing(task, replayed, names), Path(f"{task.out}.png"))
    write_json(Path(f"{task.out}.json"), _document(task, replayed, names) | {"report": report})
    for line in _told(task, replayed, names, report):
        say(line)
    return 0


def _prove(options: ReplayOptions) -> _Task:
    """Before the weights are read: is there such an episode, and can the checkpoint be asked about it?"""
    if options.part not in _PARTS:
        raise UserError(f"--part {options.part}: give val (held-out episodes) or train")
    codec, measured = codec_of(options.checkpoint), read_codec(options.data)
    refuse_other_tokens((options.data, measured), (options.checkpoint, codec))
    part: Part = "val" if options.part == "val" else "train"
    reader = ConversationReader(options.data, part)
    found = find_episode(reader, options.episode)
    if not found:
        raise UserError(_no_such(options, part, reader))
    samples = [reader[index] for index in found]
    name = samples[0].dataset
    key = options.unnorm_key or name
    codec.stats(key)  # says which there are
    refuse_other_dataset(measured, name, codec, key)
    translation = Translation(measured, name, codec, key)
    warn(other_statistics(measured, name, codec, key))
    return _Task(options, part, samples, translation, codec, _out(options, samples[0].episode))


def _no_such(options: ReplayOptions, part: Part, reader: ConversationReader) -> str:
    """Why there is no such episode, and which there are."""
    wanted = options.episode
    if wanted is None or not len(reader):
        mend = "convert with --val-fraction, or use --part train" if part == "val" else "convert again"
        return f"{options.data}: holds no {_PARTS[part]} sample; {mend}"
    name = wanted.strip("/").split("/")[0]
    if name not in reader.ranges:
        known = did_you_mean(name, [known for known, own in reader.ranges.items() if own])
        return f"--episode {wanted}: the data has no dataset {name!r}{known}"
    other: Part = "train" if part == "val" else "val"
    if find_episode(ConversationReader(options.data, other), wanted):
        return f"--episode {wanted}: is a {_PARTS[other]} episode; add --part {other}"
    ids = [own for own, _ in islice(stretches(reader, reader.ranges[name]), _LOOKED_AT)]
    near = difflib.get_close_matches(wanted, ids, n=_SUGGESTED, cutoff=0.0)
    there = f"there are {', '.join(near)}" if near else f"{name} has none"
    return f"--episode {wanted}: no such {_PARTS[part]} episode; {there}"


def _out(options: ReplayOptions, episode: str) -> Path:
    """Where picture and JSON go, and that they can; said now and not after the work."""
    folder = options.out or options.checkpoint / "replay"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: is no folder to write into ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: cannot be written into; choose another --out")
    return folder / episode.replace("/", "-")


def _names(task: _Task) -> tuple[str, ...]:
    """What the dimensions are called: an arm's have names, where the data's card says that it is one."""
    from convert.finish import CARDS

    file = task.options.data / CARDS / f"{task.dataset}.yaml"
    recipes = {own.name: own.recipe for own in read_manifest(task.options.data).datasets}
    card = load_card(file).with_recipe(recipes[task.dataset]) if file.exists() else None
    return dimension_names(card, task.codec.action_dim)


def _drawing(task: _Task, replayed: Replayed, names: tuple[str, ...]) -> Drawing:
    from train_llava.acting.replay_picture import MOST_FRAMES, Drawing, Seen
    from train_llava.processor import open_frame

    shown = np.linspace(0, len(task.samples) - 1, min(MOST_FRAMES, len(task.samples))).round().astype(int)
    return Drawing(
        title=f"“{task.instruction}”",
        subtitle=f"{task.episode} ({_PARTS[task.part]}) by {task.options.checkpoint.resolve().name}",
        names=names,
        steps=replayed.steps,
        asked=np.unique(replayed.asked),
        recorded=replayed.recorded,
        predicted=replayed.predicted,
        mean=np.array(task.translation.measured.mean),
        seen={
            camera: [
                Seen(task.samples[i].step, np.asarray(open_frame(task.samples[i].frames[place])))
                for i in shown
            ]
            for place, camera in enumerate(task.translation.asking.cameras)
        },
    )


def _document(task: _Task, replayed: Replayed, names: tuple[str, ...]) -> dict[str, Any]:
    """All that was seen and said, step by step."""
    from train_llava.acting.replay import records

    asked = {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(task.options).items()
    }
    return {
        "oxe_mix": __version__,
        "asked": asked,
        "episode": task.episode,
        "instruction": task.instruction,
        "unnorm_key": task.translation.key,
        "cameras": list(task.translation.asking.cameras),
        "chunk": task.codec.chunk,
        "dimensions": list(names),
        "clamped": [one.as_record() for one in replayed.clamped],
        "latency_ms": [asdict(one.answer.latency) for one in replayed.answered],
        "steps": records(replayed),
    }


def _told(task: _Task, replayed: Replayed, names: tuple[str, ...], report: dict[str, Any]) -> list[str]:
    """What the user reads at the end."""
    from train_llava.metrics import summary

    units = report["datasets"][task.dataset]["l1_robot_units"]
    lines = [(name.replace("_", " "), *(f"{value:.4g}" for value in own)) for name, own in units.items()]
    agreement = report["gripper_agreement"]
    gripper = [] if agreement is None else [f"gripper as recorded at {agreement:.1%} of the steps"]
    p50, p95 = np.percentile([one.answer.latency.total for one in replayed.answered], [50, 95])
    said = [
        *gripper,
        f"{count(len(replayed.clamped), 'value')} clamped",
        f"{count(len(replayed.answered), 'answer')}, p50 {p50:.0f} ms, p95 {p95:.0f} ms",
    ]
    folder, data = shlex.quote(str(task.options.checkpoint)), shlex.quote(str(task.options.data))
    return [
        f"{summary(report, 'step')}\n",
        f"{table(('L1 in robot units', *names), lines)}\n",
        "; ".join(said),
        f"result: {task.out}.png, and all values in {task.out}.json",
        f"next: oxe-mix eval --checkpoint {folder} --data {data} for all episodes,"
        f" oxe-mix serve --checkpoint {folder} for a robot",
    ]
