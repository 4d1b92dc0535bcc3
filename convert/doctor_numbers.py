"""Checks of a dataset's actions: are they numbers, do their dimensions move, are they scaled, is the robot
often idle?
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from convert.action_codec import NUM_BINS, ActionStats
from convert.doctor_mends import CARD, CONVERT, LEAVE_OUT, LOOK, OWN_CARD, skip
from convert.doctor_summary import DatasetSummary, EpisodeSummary, Outcome, some
from convert.steps import still
from oxe_mix.cards import Card, FillTerm
from oxe_mix.text import count
from oxe_mix.verdicts import worst

# Of the widest dimension of its group: below that, noise fills the 256 bins.
_TINY = 1e-3
# Beyond the quantiles, in their distance: a few lengths are a rare fast movement, a hundred another unit.
_OUTLIERS, _GARBAGE = 10.0, 100.0
_FEW_EPISODES = 4  # below, a dimension may rest by chance
_MUCH_IDLE = 0.5
_OTHER_SCALE = 5.0  # times narrower or wider than what is known
# In decoded actions a zero stands up to half a bin away; so here it may always.
_STILL = 1.001 / NUM_BINS


def finite(data: DatasetSummary) -> Outcome:
    """No NaN and no infinity, in actions and states."""
    bad = [
        episode.step(int(t))
        for episode in data.episodes
        for t in np.flatnonzero(~np.isfinite(episode.actions).all(axis=1))
    ]
    states = sum(episode.bad_states for episode in data.episodes)
    if not bad and not states:
        return Outcome("ok", "every action and state is a number")
    text = f"{count(len(bad), 'action')} and {count(states, 'value')} of states are NaN or infinite"
    broken = [e.id for e in data.episodes if e.bad_states or not e.is_finite]
    mend = f"leave these episodes out: {skip(len(broken), data)}"
    if not bad:
        mend = f"only --state reads them; leave these episodes out: {skip(len(broken), data, '--state')}"
    return Outcome("error", text, some(bad or broken), mend)


def width(data: DatasetSummary) -> Outcome:
    """All actions of a folder are of one width."""
    if data.width == data.usual_width:
        return Outcome("ok", f"{data.width}")
    text = f"{data.width}, the folder's other datasets have {data.usual_width}"
    return Outcome("error", text, mend=f"convert it alone: {CONVERT} --only NAME")


def action_range(data: DatasetSummary) -> Outcome:
    """Each movement fills its range: neither constant, nor a hair's breadth, nor ruled by outliers."""
    if data.stats is None:
        return Outcome(
            "error", "no finite action was found", mend="take NAME out of the mix, or pack it again"
        )
    stats = data.stats
    movement = np.flatnonzero(np.array(stats.mask)).tolist()
    said = [_one_range(stats, a, _group(movement, a)) for a in movement]
    constant = [a for a in movement if stats.min[a] == stats.max[a]]
    problems = [one for one in said if one is not None]
    enough = stats.num_trajectories >= _FEW_EPISODES
    # Arms that work in a plane record zeros, and poses may share a height; a movement that is always the same
    # one is none.
    stuck = [a for a in constant if stats.min[a] != 0] if _is_delta(data.card) else []
    if enough and len(stuck) > _filled(data.card):
        names = ", ".join(map(str, stuck))
        problems.append(Outcome("warning", f"dimension {names}: never changes; its bins say nothing"))
    if enough and movement and len(constant) == len(movement):
        problems.append(Outcome("error", "nothing ever moves"))
    if not problems:
        spread = f"{count(len(movement) - len(constant), 'dimension')} well spread"
        return Outcome("ok", f"{spread}, {len(constant)} never change" if constant else spread)
    mend = f"see it: {LOOK}; the recipe that makes it: {CARD}{_corrected(data)}"
    text = "; ".join(problem.text for problem in problems)
    return Outcome(worst([problem.level for problem in problems]), text, _farthest(data, problems), mend)


def _is_delta(card: Card | None) -> bool:
    return card is None or card.action_kind == "delta"


def _filled(card: Card | None) -> int:
    """Columns that the recipe fills with a number other than 0."""
    terms = card.action.recipe if card else ()
    return sum(term.dims for term in terms if isinstance(term, FillTerm) and term.fill != 0)


def _corrected(data: DatasetSummary) -> str:
    """What a mix can ask for, where OpenVLA's recipe is known to be wrong."""
    known = (
        data.card is not None and data.card.corrected is not None and data.card.corrected.action is not None
    )
    return "; a mix may ask for recipe: corrected" if known else ""


def _one_range(stats: ActionStats, a: int, group: list[int]) -> Outcome | None:
    """What is wrong with dimension `a`; `group`: the dimensions of its unit."""
    if stats.min[a] == stats.max[a]:
        return None
    spread = stats.q99[a] - stats.q01[a]
    if spread <= 0:
        text = f"dimension {a}: moves in less than 2 % of the steps; its quantiles are equal"
        return Outcome("warning", text)
    beyond = max(stats.max[a] - stats.q99[a], stats.q01[a] - stats.min[a]) / spread
    if beyond > _OUTLIERS:
        low, high = f"{stats.min[a]:.3g}", f"{stats.max[a]:.3g}"
        text = f"dimension {a}: {low} to {high}, but 98 % in {stats.q01[a]:.3g} to {stats.q99[a]:.3g}"
        return Outcome("error" if beyond > _GARBAGE else "warning", text)
    widest = max(stats.q99[b] - stats.q01[b] for b in group)
    if spread < _TINY * widest:
        text = f"dimension {a}: its range is {spread:.2g}, a neighbour's {widest:.2g}: near-constant"
        return Outcome("warning", text)
    return None


def _group(movement: list[int], a: int) -> list[int]:
    """The dimensions that have the unit of `a`: of six the first three are positions, the others angles."""
    return [b for b in movement if b // 3 == a // 3] if len(movement) == 6 else movement


def _farthest(data: DatasetSummary, problems: list[Outcome]) -> tuple[str, ...]:
    """Where the largest of the outliers stand."""
    if data.stats is None or not any("98 %" in problem.text for problem in problems):
        return ()
    low, high = np.array(data.stats.q01), np.array(data.stats.q99)
    spread, mask = np.maximum(high - low, 1e-12), np.array(data.stats.mask)
    found: list[tuple[float, str]] = []
    for episode in data.episodes:
        if len(episode.actions) and episode.is_finite:
            beyond = np.maximum(episode.actions - high, low - episode.actions) / spread
            reach = np.where(mask & (high > low), beyond, 0).max(axis=1)
            found.append((float(reach.max()), episode.step(int(reach.argmax()))))
    return some([place for reach, place in sorted(found, reverse=True) if reach > _OUTLIERS])


def idle_steps(data: DatasetSummary) -> Outcome:
    """Steps that tell the robot to stay as it is, and episodes that are nothing else."""
    if data.stats is None or data.card is None:
        return Outcome("ok", "not looked at: no card, so whether actions are deltas is not known")
    steps, idle, whole, longest = 0, 0, list[str](), (0, "")
    for episode in data.episodes:
        rest = at_rest(episode, data)
        if not len(rest):
            continue
        steps, idle = steps + len(rest), idle + int(rest.sum())
        if rest.all():
            whole.append(episode.id)
        run, start = max(runs_of(rest), default=(0, 0))
        longest = max(longest, (run, episode.step(start)))
    text = f"{idle:,} of {steps:,} steps, at most {longest[0]} in a row"
    mends, examples = list[str](), some(whole)
    if idle > _MUCH_IDLE * steps:
        mends.append(f"leave idle steps out: {CONVERT} --drop-idle")
        examples = examples or (longest[1],)
    if whole:
        text += f"; {count(len(whole), 'episode')} without any movement"
        mends.append(f"--drop-idle keeps an episode that never moves; {LEAVE_OUT}")
    return Outcome("warning" if mends else "ok", text, examples, "; ".join(mends))


def at_rest(episode: EpisodeSummary, data: DatasetSummary) -> NDArray[np.bool_]:
    """Which steps say not to move, [T]; [0] where that cannot be said."""
    if data.stats is None or data.card is None or not episode.is_finite or not len(episode.actions):
        return np.zeros(0, np.bool_)
    delta = data.card.action_kind == "delta"
    return still(episode.actions, data.stats, delta=delta, tolerance=_STILL)


def runs_of(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Length and start of each run of true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8))).tolist()
    return [(end - start, start) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def known_figures(data: DatasetSummary) -> Outcome:
    """Episodes and quantiles beside those that the card gives."""
    if data.card is None:
        return Outcome("ok", "not looked at: no card")
    listed = data.card.episodes
    more = [
        f"{num:,} in {split}, the card lists {listed[split]:,}"
        for split, num in data.splits.items()
        if num > listed.get(split, num)
    ]
    if more:
        return Outcome(
            "warning",
            f"more episodes than there are: {', '.join(more)}",
            mend=f"if it is another build, give it {OWN_CARD}",
        )
    drop = data.card.action.drop_zero
    if drop is None or data.stats is None:
        return Outcome("ok", "no more episodes than the card lists" if listed else "the card gives none")
    known = np.array(drop.q99) - np.array(drop.q01)
    have = (np.array(data.stats.q99) - np.array(data.stats.q01))[: len(known)]
    ratio = np.maximum(have, 1e-12) / known
    odd = np.flatnonzero((ratio > _OTHER_SCALE) | (ratio < 1 / _OTHER_SCALE)).tolist()
    if odd:
        text = ", ".join(f"dimension {a}: {have[a]:.3g} wide, the card says {known[a]:.3g}" for a in odd)
        return Outcome("warning", text, mend=f"another unit? the recipe: {CARD}; {OWN_CARD} may read it so")
    return Outcome("ok", "ranges as the card gives them")
