"""Checks of a dataset's frames: do they show something, do they move with the robot, are they red where they
should be?
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from convert.doctor_frames import CameraTrack, swapped
from convert.doctor_mends import CONVERT, LEAVE_OUT, LOOK
from convert.doctor_numbers import at_rest, runs_of
from convert.doctor_summary import DatasetSummary, EpisodeSummary, Outcome, some
from oxe_mix.cards import Card
from oxe_mix.text import count
from oxe_mix.verdicts import Level, worst

_BLACK = 12.0  # mean level of 255
_MANY = 0.2  # share of the frames of the first camera from which a fault is an error
# A frozen picture that was encoded anew; a live camera's noise and a moving arm are above.
_SAME_MEAN, _SAME_MOST = 0.75, 10.0
_FROZEN_RUN = 5  # steps
_TRAVEL = 1.0  # over the run, in half the range of one action: a clear movement
_REPEATED = 0.2
_EPISODES_WITH_IT = 3
# Of hues: how one-sided a histogram must be, how alike two of them, and how many episodes it takes.
_ONE_SIDED, _ALIKE, _FEW_EPISODES = 0.25, 0.6, 4
_COLOURED = 0.01  # mean chroma of a picture below which its hues say nothing
_WARM, _COOL = slice(0, 4), slice(12, 16)  # 0 to 60 degrees: wood, skin, cardboard; the same, exchanged
_COOL_SHARE = 0.85
_GUESS = f"a guess by hues, so look: {LOOK}"

Tracks = list[tuple[EpisodeSummary, CameraTrack]]


def by_camera(data: DatasetSummary) -> dict[str, Tracks]:
    """The cameras of a dataset, the first one first."""
    found: dict[str, Tracks] = defaultdict(list)
    for episode in data.episodes:
        for camera in episode.cameras:
            found[camera.role].append((episode, camera))
    return dict(found)


def blank_frames(data: DatasetSummary) -> Outcome:
    """Frames of a single colour: black ones stand in for a camera that was not there."""
    said: list[Outcome] = []
    for i, (role, tracks) in enumerate(by_camera(data).items()):
        total = sum(len(camera.looked) for _, camera in tracks)
        places = [(e, c, int(f)) for e, c in tracks for f in np.flatnonzero(c.flat)]
        if not places:
            continue
        black = sum(bool(c.level[f] < _BLACK) for _, c, f in places)
        what = "black" if black == len(places) else f"one colour, {black:,} of them black"
        level: Level = "error" if i == 0 and len(places) > _MANY * total else "warning"
        ids = [episode.step(int(camera.looked[f])) for episode, camera, f in places]
        text = f"{role}: {len(places):,} of {total:,} frames are {what}"
        mend = f"convert leaves it out unless --cameras names it: {CONVERT} --cameras primary"
        said.append(Outcome(level, text, some(ids), mend if i else _other_cameras(data)))
    return _joined(said, data, "none")


def _other_cameras(data: DatasetSummary) -> str:
    """What to convert with when the first is blank: cameras that are not, or that were not looked at."""
    blank = [
        role
        for role, tracks in by_camera(data).items()
        if sum(int(c.flat.sum()) for _, c in tracks) > _MANY * sum(len(c.looked) for _, c in tracks)
    ]
    roles = data.card.cameras.model_dump() if data.card else {}
    live = [role for role, name in roles.items() if name and role not in blank]
    if not blank:
        return LEAVE_OUT
    if not live:
        return "it has no camera that sees: take NAME out of the mix"
    return f"convert with cameras that see: {CONVERT} --only NAME --cameras {','.join(live)}"


def frozen_frames(data: DatasetSummary) -> Outcome:
    """The robot moves and the picture stays as it was, bytes or pixels, over many steps."""
    said: list[Outcome] = []
    for i, (role, tracks) in enumerate(by_camera(data).items()):
        total = sum(len(camera.marks) for _, camera in tracks)
        runs = [(run, e.step(start)) for e, c in tracks for run, start in _frozen_runs(e, c, data)]
        if not runs:
            continue
        steps = sum(run for run, _ in runs)
        level: Level = "error" if i == 0 and steps > _MANY * total else "warning"
        episodes = sum(any(_frozen_runs(e, c, data)) for e, c in tracks)
        most = f"in {count(episodes, 'episode')}, at most {max(runs)[0]} in a row"
        text = f"{role}: {steps:,} of {total:,} steps {most}"
        ids = [place for _, place in sorted(runs, reverse=True)]
        said.append(Outcome(level, text, some(ids), LEAVE_OUT))
    return _joined(said, data, "none while the robot moves")


def _frozen_runs(
    episode: EpisodeSummary, camera: CameraTrack, data: DatasetSummary
) -> Iterator[tuple[int, int]]:
    """Steps and start of each stretch without a change of the picture in which the robot moves."""
    same = (camera.change[:, 0] <= _SAME_MEAN) & (camera.change[:, 1] <= _SAME_MOST) & ~camera.flat
    for run, first in runs_of(same):
        start, end = int(camera.looked[first - 1]), int(camera.looked[first + run - 1])
        if end - start >= _FROZEN_RUN and travel(episode, data, start, end) >= _TRAVEL:
            yield end - start, start


def travel(episode: EpisodeSummary, data: DatasetSummary, start: int, end: int) -> float:
    """How far the robot is told to go from step `start` to `end`, of the T: in half the range of an action,
    in the dimension that goes farthest; 0 where that cannot be said.
    """
    rest = at_rest(episode, data)
    if not len(rest) or data.stats is None or data.card is None:
        return 0.0
    spread = (np.array(data.stats.q99) - np.array(data.stats.q01)) / 2
    moving = np.array(data.stats.mask) & (spread > 0)
    if not moving.any():
        return 0.0
    actions = episode.actions[:, moving].astype(np.float64) / spread[moving]
    if data.card.action_kind == "delta":
        way = np.where(rest[start:end, None], 0.0, actions[start:end]).sum(axis=0)
    else:
        way = actions[end] - actions[start]
    return float(np.abs(way).max())


def repeated_frames(data: DatasetSummary) -> Outcome:
    """The very same bytes at the step before, or in several episodes."""
    said: list[Outcome] = []
    for role, tracks in by_camera(data).items():
        # A single colour is the same whenever it comes, and has its own line.
        live = [(episode, camera) for episode, camera in tracks if not camera.flat.all()]
        pairs = sum(max(0, len(camera.marks) - 1) for _, camera in live)
        again = [(e, int(t) + 1) for e, c in live for t in np.flatnonzero(c.marks[1:] == c.marks[:-1])]
        if pairs and len(again) > _REPEATED * pairs:
            text = f"{role}: {len(again):,} of {pairs:,} frames are the one before, byte for byte"
            mend = f"is the camera slower than the robot? {CONVERT} --only NAME --stride 2"
            said.append(Outcome("warning", text, some([episode.step(t) for episode, t in again]), mend))
        shared = Counter(mark for _, camera in live for mark in set(camera.marks.tolist()))
        many = {mark for mark, num in shared.items() if num >= _EPISODES_WITH_IT}
        ids = [e.step(int(t)) for e, c in live for t in _first_of(c, many)]
        if ids:
            text = f"{role}: {count(len(many), 'picture')} in {_EPISODES_WITH_IT} episodes or more"
            mend = f"a camera that was not live, or one scene copied? {LOOK}; {LEAVE_OUT}"
            said.append(Outcome("warning", text, some(ids), mend))
    return _joined(said, data, "few or none")


def _first_of(camera: CameraTrack, marks: set[int]) -> Sequence[int]:
    return [t for t, mark in enumerate(camera.marks.tolist()) if mark in marks][:1]


def colour_channels(data: DatasetSummary) -> Outcome:
    """A guess, never an error: are red and blue exchanged? Three signs, in order of their worth.

    Some episodes against the others of their camera, one camera against another, all of a camera against the
    hues that robots' tables have. The first two compare the one-sided part of hue histograms (what is left
    when the exchanged histogram is taken off): an exchange turns its sign round and changes nothing else.
    A dataset whose cameras are all exchanged shows itself by the third sign alone, and only if it has little
    blue of its own.
    """
    cameras = by_camera(data)
    said = [one for role, tracks in cameras.items() for one in _odd_episodes(role, tracks)]
    enough = {role: _hues(tracks) for role, tracks in cameras.items() if len(tracks) >= _FEW_EPISODES}
    said += _odd_cameras(enough, data.card)
    if not said:
        said += [one for role, tracks in cameras.items() for one in _cool(role, tracks, data.card)]
    return _joined(said, data, "no sign of an exchange (a guess by hues)")


def _odd_episodes(role: str, tracks: Tracks) -> list[Outcome]:
    """Episodes whose hues are those of the others after an exchange."""
    sides = {e.id: side for e, c in tracks if (side := _side(c.hues, len(c.looked))) is not None}
    if len(sides) < _FEW_EPISODES:
        return []
    matrix = np.array(list(sides.values()))
    # Each beside the median of all, which a minority does not turn.
    middle = np.median(matrix, axis=0)
    length = float(np.linalg.norm(middle))
    if length < _ONE_SIDED:
        return []
    alike = matrix @ (middle / length)
    odd = [name for name, cosine in zip(sides, alike.tolist(), strict=True) if cosine < -_ALIKE]
    if not odd or float((alike > _ALIKE).mean()) < 0.5:
        return []
    text = f"{role}: {len(odd)} of {len(sides)} episodes look like the others with red and blue exchanged"
    return [Outcome("warning", text, some(odd), f"{_GUESS}; mods turn all episodes round; {LEAVE_OUT}")]


def _odd_cameras(hues: dict[str, tuple[NDArray[np.float64], int]], card: Card | None) -> list[Outcome]:
    """Cameras of one scene whose hues agree only after an exchange of one."""
    sides = {role: side for role, (sums, num) in hues.items() if (side := _side(sums, num)) is not None}
    roles = list(sides)
    return [
        Outcome(
            "warning",
            f"{a} and {b} agree in their hues only if red and blue of one are exchanged",
            mend=_flip(card, b),
        )
        for i, a in enumerate(roles)
        for b in roles[i + 1 :]
        if float(sides[a] @ sides[b]) < -_ALIKE
    ]


def _cool(role: str, tracks: Tracks, card: Card | None) -> list[Outcome]:
    """A camera that sees hardly anything warm: no wood, no skin, no cardboard, but their mirror images."""
    sums, num = _hues(tracks)
    warm, cool = float(sums[_WARM].sum()), float(sums[_COOL].sum())
    enough = max(_COLOURED * num, 0.3 * float(sums.sum()))
    if len(tracks) < _FEW_EPISODES or not num or warm + cool < enough:
        return []
    share = cool / (warm + cool)
    if share < _COOL_SHARE:
        return []
    text = f"{role}: {share:.0%} of its warm or cool colours are cool"
    return [Outcome("warning", text, mend=_flip(card, role))]


def _flip(card: Card | None, role: str) -> str:
    """How a mix turns a camera's channels round."""
    name = card.cameras.model_dump()[role] if card else role
    mods = f"mods: [{{flip_channels: [{name}]}}]"
    return f"{_GUESS}; if it is so, give NAME {mods} in a mix, say my-mix.yaml: {CONVERT} --mix my-mix.yaml"


def _hues(tracks: Tracks) -> tuple[NDArray[np.float64], int]:
    """Of all episodes of a camera together, and of how many pictures."""
    return np.sum([camera.hues for _, camera in tracks], axis=0), sum(len(c.looked) for _, c in tracks)


def _side(hues: NDArray[np.float64], num_pictures: int) -> NDArray[np.float64] | None:
    """The one-sided part of a histogram, of length 1; None where the pictures have too little colour, or as
    much of each hue as of its mirror image.
    """
    total = float(hues.sum())
    if num_pictures == 0 or total < _COLOURED * num_pictures:
        return None
    # Neighbouring bins share: a lamp shifts hues by a few degrees.
    smooth = (np.roll(hues, 1) + 2 * hues + np.roll(hues, -1)) / 4
    side = smooth - swapped(smooth)
    length = float(np.linalg.norm(side))
    if length < _ONE_SIDED * float(np.linalg.norm(smooth)):
        return None
    return np.asarray(side / length)


def _joined(said: list[Outcome], data: DatasetSummary, fine: str) -> Outcome:
    """The findings of all cameras in one line."""
    if not by_camera(data):
        return Outcome("ok", "not looked at: no camera")
    if not said:
        return Outcome("ok", fine)
    examples = some([one for outcome in said for one in outcome.examples])
    mend = "; ".join(dict.fromkeys(one.mend for one in said))
    return Outcome(worst([one.level for one in said]), "; ".join(one.text for one in said), examples, mend)
