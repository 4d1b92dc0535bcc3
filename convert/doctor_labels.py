"""Checks of a dataset's episodes as wholes: can they be read, do they come twice, are they told what to do,
and were the card's mods applied?
"""

from __future__ import annotations

import hashlib
from collections import Counter

from convert.doctor_summary import DatasetSummary, EpisodeSummary, Outcome, some
from oxe_mix.text import count

# Texts that stand where nobody wrote an instruction.
_DUMMIES = frozenset(
    {"none", "null", "nan", "n/a", "na", "dummy", "test", "todo", "placeholder"}
    | {"instruction", "task", "unknown", "language_instruction"}
)
_SEVERAL = 10  # episodes from which one text for all is worth a line


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
        return Outcome("error", text, mend="oxe-mix verify DATA, or oxe-mix check LLAVA, reads all of it")
    if not data.num_steps:
        return Outcome("error", f"no step is there: {looked}", mend="download or convert it again")
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
    if apart:
        text += f", {apart:,} of them in another split: no held-out data"
    return Outcome("warning", text, some(ids), "evaluate on other episodes; in training they count twice")


def instructions(data: DatasetSummary) -> Outcome:
    """Episodes without a text, with a placeholder, or all with the same one."""
    first = {episode.id: next((text for text in episode.texts if text), "") for episode in data.episodes}
    empty = [name for name, text in first.items() if not text]
    dummy = [name for name, text in first.items() if text in _DUMMIES or (text and not _has_letter(text))]
    distinct = Counter(text for text in first.values() if text)
    total = len(first)
    if total and len(empty) == total:
        return Outcome("error", f"none of {total:,} episodes has one", some(empty), "convert drops them all")
    if empty or dummy:
        text = f"{len(empty):,} of {total:,} episodes have none, {len(dummy):,} a placeholder"
        return Outcome("warning", text, some(empty + dummy), "convert drops those that have none")
    if len(distinct) == 1 and total >= _SEVERAL:
        only = next(iter(distinct))
        text = f"all {total:,} episodes say {only!r}; a model learns nothing from words here"
        return Outcome("warning", text, mend="right for a dataset of one task")
    return Outcome("ok", f"{len(distinct):,} different ones in {count(total, 'episode')}")


def advised_mods(data: DatasetSummary) -> Outcome:
    """The card's advice: channels to flip, failures to leave out."""
    if data.all_steps:
        return Outcome("ok", "not looked at: a conversion does not tell of them; look at the RLDS")
    if not data.advised_mods:
        return Outcome("ok", "none left")
    mods = ", ".join(data.advised_mods)
    text = f"not applied: {mods}"
    return Outcome("warning", text, mend=f"download with mods: [{mods}] in the mix, or leave it knowingly")


def _fingerprint(episode: EpisodeSummary) -> bytes:
    digest = hashlib.blake2b(episode.actions.tobytes(), digest_size=16)
    for camera in episode.cameras:
        digest.update(camera.marks.tobytes())
    return digest.digest()


def _split(place: str) -> str:
    return place.split("/")[1]


def _has_letter(text: str) -> bool:
    return any(letter.isalpha() for letter in text)
