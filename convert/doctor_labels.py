"""Checks of a dataset's episodes as wholes: can they be read, do they come twice, are they told what to do,
and were the card's mods applied?
"""

from __future__ import annotations

import hashlib
from collections import Counter

from convert.doctor_mends import CARD, CONVERT, skip
from convert.doctor_summary import DatasetSummary, EpisodeSummary, Outcome, some
from oxe_mix.text import count
from oxe_mix.verdicts import Level

# Texts that stand where nobody wrote an instruction.
_DUMMIES = frozenset(
    {"none", "null", "nan", "n/a", "na", "dummy", "test", "todo", "placeholder"}
    | {"instruction", "task", "unknown", "language_instruction"}
)
_SEVERAL = 10  # episodes from which one text for all is worth a line
_MOST_LOST = 0.5  # of the episodes; beyond it the dataset is another one than was meant
_NO_TEXT = (
    f"convert leaves out those that have none; does the card name the right language key? {CARD}; "
    "pack your own recordings again with an instruction.txt in each episode"
)


def readable(data: DatasetSummary) -> Outcome:
    """Every record and frame that was asked for."""
    bad = [f"{place}: {reason}" for place, reason in data.unreadable]
    bad += [
        f"{episode.step(t)}: {reason}"
        for episode in data.episodes
        for camera in episode.cameras
        for t, reason in camera.broken
    ]
    looked = (
        f"{len(data.episodes):,} of {count(data.of_episodes, 'episode')}, {count(data.num_steps, 'step')}"
    )
    if bad:
        text = f"{count(len(bad), 'problem')} in {looked}: {bad[0]}"
        if data.converted:
            mend = f"see all of it: oxe-mix check FOLDER --decode; convert it again: {CONVERT} --only NAME"
        else:
            mend = f"see all of it: oxe-mix verify FOLDER; leave broken records out: {skip(len(bad), data)}"
        return Outcome("error", text, mend=mend)
    if not data.num_steps:
        return Outcome("error", f"no step is there: {looked}", mend="download or pack it again")
    return Outcome("ok", f"{looked} looked at")


def repeated_episodes(data: DatasetSummary) -> Outcome:
    """Records with the same bytes, and episodes with the same actions and frames."""
    pairs = {second: first for first, second in data.twins}
    first_of: dict[bytes, str] = {}
    for episode in data.episodes:
        first = first_of.setdefault(_fingerprint(episode), episode.id)
        if first != episode.id:
            pairs.setdefault(episode.id, first)
    compared = max(data.num_compared, len(data.episodes))
    if not pairs:
        return Outcome("ok", f"none among {compared:,} compared")
    ids = [f"{second} = {first}" for second, first in pairs.items()]
    apart = sum(_split(second) != _split(first) for second, first in pairs.items())
    text = f"{len(pairs):,} of {compared:,} compared are there before"
    mend = "in training they count twice; pack your own recordings without the copies"
    if apart:
        text += f", {apart:,} of them in another split: no held-out data"
        mend = f"hold out episodes of train in the place of that split: {CONVERT} --val-fraction 0.05"
    return Outcome("warning", text, some(ids), mend)


def instructions(data: DatasetSummary) -> Outcome:
    """Episodes without a text, with a placeholder, or all with the same one."""
    first = {episode.id: next((text for text in episode.texts if text), "") for episode in data.episodes}
    empty = [name for name, text in first.items() if not text]
    dummy = [name for name, text in first.items() if text in _DUMMIES or (text and not _has_letter(text))]
    distinct = Counter(text for text in first.values() if text)
    lost, total = data.left_out + len(empty), len(first)
    if data.left_out:  # of all its episodes, not only of those that were looked at
        total = data.of_episodes + data.left_out
    if lost or dummy:
        text = f"{lost:,} of {total:,} episodes have none, {len(dummy):,} a placeholder"
        level: Level = "error" if lost > _MOST_LOST * total else "warning"
        return Outcome(level, text, some(empty + dummy), _NO_TEXT)
    if len(distinct) == 1 and total >= _SEVERAL:
        only = next(iter(distinct))
        text = f"all {total:,} episodes say {only!r}; a model learns nothing from words here"
        return Outcome(
            "warning", text, mend=f"right if it has one task; else see the card's language key: {CARD}"
        )
    return Outcome("ok", f"{len(distinct):,} different ones in {count(total, 'episode')}")


def advised_mods(data: DatasetSummary) -> Outcome:
    """The card's advice: channels to flip, failures to leave out."""
    if data.converted:
        return Outcome("ok", "not looked at: a conversion does not tell of them; look at the RLDS")
    if not data.advised_mods:
        return Outcome("ok", "none left")
    mods = ", ".join(data.advised_mods)
    text = f"not applied: {mods}"
    mend = f"give NAME mods: [{mods}] in a mix, say my-mix.yaml: {CONVERT} --mix my-mix.yaml"
    return Outcome("warning", text, mend=mend)


def _fingerprint(episode: EpisodeSummary) -> bytes:
    digest = hashlib.blake2b(episode.actions.tobytes(), digest_size=16)
    for camera in episode.cameras:
        digest.update(camera.marks.tobytes())
    return digest.digest()


def _split(place: str) -> str:
    return place.split("/")[1]


def _has_letter(text: str) -> bool:
    return any(letter.isalpha() for letter in text)
