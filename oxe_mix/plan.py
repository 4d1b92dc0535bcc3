"""What a mix asks of its sources: which records of which shards. Only metadata is read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from oxe_mix.card_check import check_fits
from oxe_mix.cards import Card, Cards
from oxe_mix.errors import UserError
from oxe_mix.mix import DatasetSpec, Mix
from oxe_mix.record_mods import RecordMods, is_colour, resolve
from oxe_mix.rlds import FEATURES_FILE, Split
from oxe_mix.selection import Pick, num_kept, select
from oxe_mix.source import SourceDataset, open_dataset
from oxe_mix.source_file import Patience, SourceFile

# Datasets whose metadata is read side by side: it is all waiting.
_AT_ONCE = 16
# Bytes a pixel costs, for the estimate of frames: fractal20220817_data's published size over its published
# steps comes to 0.39, language_table's to 0.26; PNG of camera pictures is about half of its 3 bytes.
_JPEG_BYTES_PER_PIXEL, _PNG_BYTES_PER_PIXEL = 0.3, 1.5


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """What a mix asks of one split, resolved against the source's metadata."""

    spec: DatasetSpec  # its fraction is what a budget left of the mix's
    card: Card
    source: SourceDataset
    mods: RecordMods
    picks: tuple[Pick, ...]

    @property
    def split(self) -> Split:
        """The split at the source."""
        return self.source.info.splits[self.spec.split]

    @property
    def episodes(self) -> int:
        """Episodes to take, before mods."""
        return sum(pick.num_episodes for pick in self.picks)

    @property
    def estimated_bytes(self) -> int:
        """Bytes to fetch: listed sizes of whole shards, of others a share by episodes."""
        return sum(map(self.pick_bytes, self.picks))

    @property
    def estimated_frames(self) -> int:
        """Steps to expect: by the card's count where it has one, else by what a step of this kind weighs."""
        if self.card.steps and self.card.episodes:
            return round(self.episodes * self.card.steps / sum(self.card.episodes.values()))
        return round(self.estimated_bytes / _step_bytes(self.source))

    @property
    def missing(self) -> list[str]:
        """Shards asked for that the source's listing does not have: it is not complete."""
        names = map(self.source_name, self.picks)
        return [name for name in names if self.source.files and name not in self.source.files]

    def pick_bytes(self, pick: Pick) -> int:
        """Bytes to expect of a pick."""
        listed = self.source_file(pick).size
        mean = self.split.num_bytes / self.split.num_episodes
        whole = mean * pick.of_episodes if listed is None else listed
        return round(whole * pick.num_episodes / pick.of_episodes)

    @property
    def folder(self) -> str:
        """Where the dataset lies in a target."""
        return f"{self.spec.name}/{self.spec.version}"

    def file(self, index: int, num_shards: int) -> str:
        """The name of output shard `index` when the split has `num_shards`."""
        return self.source.info.shard_file(self.spec.split, index, num_shards)

    def source_name(self, pick: Pick) -> str:
        """The name of a pick's shard at the source."""
        return self.source.info.shard_file(self.spec.split, pick.source_shard, len(self.split.shard_lengths))

    def source_file(self, pick: Pick) -> SourceFile:
        """What the source's listing says of a pick's shard."""
        return self.source.files.get(self.source_name(pick), SourceFile())


def plan_download(mix: Mix, cards: Cards, patience: Patience) -> list[SplitPlan]:
    """Read the metadata of every dataset of a mix and select its records, within the mix's budgets.

    Raises: UserError, a line each, for datasets, versions or splits that are not there, for cards and mods
        that do not fit the data, and for a budget that one episode of each dataset already breaks.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        names = list(dict.fromkeys(spec.name for spec in mix.datasets))
        first = {name: next(spec for spec in mix.datasets if spec.name == name) for name in names}
        found = list(pool.map(lambda name: _open(mix, first[name], cards, patience), names))
    problems = [str(one) for one in found if isinstance(one, UserError)]
    if problems:
        raise UserError("\n".join(problems))
    sources = {n: one for n, one in zip(names, found, strict=True) if isinstance(one, SourceDataset)}
    return _within_budget(mix, [_plan_split(mix, spec, cards, sources[spec.name]) for spec in mix.datasets])


def effective(mix: Mix, plans: list[SplitPlan]) -> Mix:
    """The mix with what its budgets left of the fractions, and without the budgets: what a lock holds."""
    specs = tuple(plan.spec.model_copy(update={"max_gb": None}) for plan in plans)
    return mix.model_copy(update={"datasets": specs, "max_gb": None})


def _open(mix: Mix, spec: DatasetSpec, cards: Cards, patience: Patience) -> SourceDataset | UserError:
    """All datasets are looked at before the first problem is told, so an error is a value here."""
    card = cards.get(spec.name)
    try:
        source = open_dataset(mix.sources_of(spec), card, spec.version, patience)
        check_fits(card, cards.file_of(card), source.features, f"{source.folder}/{FEATURES_FILE}")
    except UserError as error:
        return error
    return source


def _plan_split(mix: Mix, spec: DatasetSpec, cards: Cards, source: SourceDataset) -> SplitPlan:
    split = source.info.splits.get(spec.split)
    if split is None:
        known = ", ".join(source.info.splits)
        raise UserError(
            f"{spec.name} {spec.version}: no split {spec.split!r} at {source.folder}; it has: {known}"
        )
    mods = resolve(spec.mods, source.features, f"{source.folder}/{FEATURES_FILE}")
    try:
        picks = tuple(select(source.info, split, spec.fraction, mix.seed))
    except ValueError as error:
        raise UserError(str(error)) from error
    return SplitPlan(spec, cards.get(spec.name), source, mods, picks)


def _within_budget(mix: Mix, plans: list[SplitPlan]) -> list[SplitPlan]:
    plans = [_scaled([plan], plan.spec.max_gb, mix.seed)[0] if plan.spec.max_gb else plan for plan in plans]
    return _scaled(plans, mix.max_gb, mix.seed) if mix.max_gb else plans


def _scaled(plans: list[SplitPlan], max_gb: float, seed: int) -> list[SplitPlan]:
    """The plans with fractions scaled by one factor, the largest that fits into `max_gb`.

    A smaller fraction is the first part of a larger one, so the bytes grow with the factor and bisection
    finds it.
    """
    budget = max_gb * 1e9
    if _total(plans) <= budget:
        return plans
    low, high = 0.0, 1.0
    smallest = [_shrunk(plan, 0.0, seed) for plan in plans]
    if _total(smallest) > budget:
        names = ", ".join(dict.fromkeys(plan.spec.name for plan in plans))
        raise UserError(
            f"{names}: one episode of each is {_total(smallest) / 1e9:.3g} GB, more than max_gb {max_gb:g}"
        )
    best = smallest
    for _ in range(30):
        factor = (low + high) / 2
        tried = [_shrunk(plan, factor, seed) for plan in plans]
        if _total(tried) <= budget:
            low, best = factor, tried
        else:
            high = factor
    return best


def _shrunk(plan: SplitPlan, factor: float, seed: int) -> SplitPlan:
    """A plan with its fraction scaled; the fraction becomes the very share of episodes that is kept."""
    num_episodes = plan.split.num_episodes
    kept = max(1, int(factor * num_kept(num_episodes, plan.spec.fraction)))
    spec = plan.spec.model_copy(update={"fraction": kept / num_episodes})
    return replace(
        plan, spec=spec, picks=tuple(select(plan.source.info, plan.split, kept / num_episodes, seed))
    )


def _total(plans: list[SplitPlan]) -> int:
    return sum(plan.estimated_bytes for plan in plans)


def _step_bytes(source: SourceDataset) -> float:
    """About what a step weighs on disk: its colour frames by their pixels, its tensors by their width."""
    total = 0.0
    for key, leaf in source.features.step.items():
        if is_colour(key, leaf):
            height, width = (side or 256 for side in leaf.shape[:2])
            per_pixel = _JPEG_BYTES_PER_PIXEL if leaf.encoding == "jpeg" else _PNG_BYTES_PER_PIXEL
            total += height * width * per_pixel
        else:
            total += 4 * (leaf.width or 1)
    return max(total, 1.0)
