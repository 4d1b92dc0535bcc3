"""The pages of a folder that convert wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from convert.action_codec import ActionCodec, Bins, decode, text_to_bins
from convert.finish import CARDS
from convert.manifest import MANIFEST_FILE, ConvertedDataset, Manifest, Tally, codec_of, read_manifest
from convert.reader import ConversationReader, Sample
from oxe_mix.cards import Card, load_card
from oxe_mix.errors import UserError
from oxe_mix.rlds import SAFE_NAME
from oxe_mix.text import count, size
from train_llava.dimensions import dimension_names
from train_llava.report.facts import card_facts, motion_of
from train_llava.report.figures import action_dimensions, length_histogram, reach, shortest_to_longest
from train_llava.report.pictures import Room, strips_of
from train_llava.report.sampling import MOST_EPISODES, MOST_STEPS, MOST_STRIPES, drawn_episodes
from train_llava.report.values import DatasetPage, Dimension, Overview, Recorded, Row, Share, Told

_STATISTICS = {"all": "all its episodes", "train": "its training episodes"}
# By the quantiles 2 % of a movement lie outside; more comes of a gripper outside [0, 1], or of statistics of
# the training episodes alone.
_MUCH_CLIPPED = 0.03


@dataclass(frozen=True, slots=True)
class ConvertedFolder:
    """A converted folder, opened."""

    path: Path
    manifest: Manifest
    codec: ActionCodec
    reader: ConversationReader
    seed: int

    def card(self, dataset: ConvertedDataset) -> Card | None:
        """The dataset's card as convert left it."""
        file = self.path / CARDS / f"{dataset.name}.yaml"
        return load_card(file) if file.exists() else None


def open_converted(path: Path, seed: int) -> ConvertedFolder:
    """Raises: UserError when it is no finished conversion, or one that names files outside of it."""
    manifest = read_manifest(path)
    for dataset in manifest.datasets:
        _refuse_strangers(path, dataset)
    return ConvertedFolder(path, manifest, codec_of(path, manifest), ConversationReader(path, "train"), seed)


def _refuse_strangers(path: Path, dataset: ConvertedDataset) -> None:
    """A folder may come from anybody, and a page shows what was read."""
    if not SAFE_NAME.fullmatch(dataset.name):
        raise UserError(f"{path / MANIFEST_FILE}: {dataset.name!r} is no name for a dataset")
    for file in (*dataset.files, *dataset.validation_files):
        if not os.path.normpath(path / file.path).startswith(f"{os.path.normpath(path)}{os.sep}"):
            raise UserError(f"{path / MANIFEST_FILE}: {file.path} lies outside the folder")


def overview(folder: ConvertedFolder, pages: list[DatasetPage]) -> Overview:
    """The first page: exact counts, all from the manifest."""
    manifest, datasets = folder.manifest, folder.manifest.datasets
    asked = manifest.asked
    held_out = sum(own.steps.held_out for own in datasets)
    tiles = (
        Row("datasets", f"{len(datasets):,}", "datasets"),
        Row("episodes", f"{sum(own.episodes.written for own in datasets):,}", "episodes"),
        Row("training samples", f"{manifest.num_samples:,}", "samples"),
        Row("held-out samples", f"{held_out:,}", "held_out"),
        Row("images", f"{sum(own.images for own in datasets):,}", "images"),
        Row("of images", size(sum(own.image_bytes for own in datasets)), "image_bytes"),
    )
    mix = "no mix, weight 1 each" if manifest.mix is None else f"mix {manifest.mix}"
    notes = (
        f"Converted by oxe-mix {manifest.oxe_mix}: {mix}, seed {manifest.seed}, layout {asked.layout}, "
        f"answers of {count(asked.chunk, 'action')}, {asked.val_fraction:.1%} of the episodes held out.",
        "All counts and shares are exact, from the manifest; charts of actions, lengths and bins are of the "
        f"training episodes that were read: of each dataset at most {MOST_EPISODES}, none begun beyond "
        f"{MOST_STEPS:,} samples, drawn with seed {folder.seed}.",
    )
    header = ("dataset", "robot", "episodes", "samples", "held out", "steps dropped", "asked", "drawn")
    rows = tuple(_row(own, page) for own, page in zip(datasets, pages, strict=True))
    return Overview(tiles, (*header, "clipped", "told"), rows, notes, manifest.missing)


def _row(own: ConvertedDataset, page: DatasetPage) -> tuple[str, ...]:
    return (
        own.name,
        page.robot,
        f"{own.episodes.written:,}",
        f"{own.steps.written:,}",
        f"{own.steps.held_out:,}",
        f"{sum(own.steps.dropped.values()):,}",
        f"{own.weight_share:.1%}",
        f"{own.share:.1%}",
        f"{max(own.clipped):.1%}",
        f"{own.instructions.distinct:,}",
    )


def dataset_page(
    folder: ConvertedFolder, dataset: ConvertedDataset, episodes: int, room: Room
) -> DatasetPage:
    """The page of one dataset; so many of its episodes are shown, each in its room of the page.

    A sample or a frame that cannot be read is not raised: it is listed.
    """
    card, codec = folder.card(dataset), folder.codec
    damage = dict[str, None]()  # a line for each, in order
    read, bins = _read(folder, dataset, episodes, damage)
    names, stats = dimension_names(card, codec.action_dim), codec.datasets[dataset.name]
    dimensions = _dimensions((read, bins), folder, dataset, names) if read else ()
    motion = motion_of(None if card is None else card.with_recipe(dataset.recipe), codec.action_dim)
    samples = dataset.steps.written + dataset.steps.held_out
    lengths = [len(one.steps) for one in read]
    return DatasetPage(
        name=dataset.name,
        robot="" if card is None else card.robot,
        read=_read_words(folder, dataset, read),
        counts=_counts(dataset),
        shares=_shares(dataset),
        dropped=(*_dropped("episodes", dataset.episodes), *_dropped("steps", dataset.steps)),
        dimensions=dimensions,
        statistics=f"Quantiles of {_STATISTICS[folder.manifest.asked.statistics]}, as the codec has them; "
        f"the clipped share is of all {samples:,} samples. A movement outside the quantiles now stands at "
        "them, a gripper outside 0 and 1 at these: bins cannot say it.",
        grippers=() if stats.mask[-1] else tuple((one.id, one.actions[:, -1]) for one in read[:MOST_STRIPES]),
        lengths=length_histogram(lengths),
        length_words=f"Samples of {count(len(read), 'training episode')}{shortest_to_longest(lengths)}.",
        told=Told(
            dataset.instructions.distinct,
            tuple(dataset.instructions.most_repeated.items()),
            dataset.episodes.written + dataset.episodes.held_out,
            is_exact=True,
        ),
        strips=tuple(strips_of(read[:episodes], motion, room, damage)),
        motion=motion,
        reach=reach(read, motion),
        facts=None if card is None else card_facts(card, dataset.recipe),
        problems=tuple(_problems(dataset, names)),
        damage=tuple(damage),
    )


def _read(
    folder: ConvertedFolder, dataset: ConvertedDataset, least: int, damage: dict[str, None]
) -> tuple[list[Recorded], Bins]:
    """The episodes that are read, and the bins of all of them, [N, A]: made of robot units anew, not each
    would be itself.
    """
    read, bins = list[Recorded](), [np.zeros((0, folder.codec.action_dim), np.int64)]
    try:
        for samples in drawn_episodes(folder.reader, folder.reader.ranges[dataset.name], folder.seed):
            num_steps = sum(len(one.steps) for one in read)
            if len(read) >= least and (len(read) >= MOST_EPISODES or num_steps >= MOST_STEPS):
                break
            try:
                one, own = recorded(folder.codec, dataset.name, [folder.reader[index] for index in samples])
            except UserError as error:
                damage[str(error)] = None
                continue
            read.append(one)
            bins.append(own)
    except UserError as error:  # where the next episode begins cannot be read
        damage[str(error)] = None
    return read, np.concatenate(bins)


def recorded(codec: ActionCodec, name: str, samples: list[Sample]) -> tuple[Recorded, Bins]:
    """An episode and its bins from its samples; of answers of several actions the first one counts.

    Raises: UserError for a sample that is no answer of this codec.
    """
    try:
        bins = np.concatenate([text_to_bins(sample.answer, codec.action_dim)[:1] for sample in samples])
        actions = decode(bins, codec.datasets[name], codec.binning)
    except ValueError as error:
        raise UserError(f"{samples[0].episode}: {error}; run oxe-mix check on the folder") from error
    one = Recorded(
        id=samples[0].episode,
        instruction=codec.asking.instruction(samples[0].question),
        steps=np.array([sample.step for sample in samples]),
        actions=actions,
        frames=tuple(partial(_frames, sample) for sample in samples),
    )
    return one, bins


def _frames(sample: Sample) -> tuple[bytes, ...]:
    return tuple(frame.read() for frame in sample.frames)


def _dimensions(
    read: tuple[list[Recorded], Bins],
    folder: ConvertedFolder,
    dataset: ConvertedDataset,
    names: tuple[str, ...],
) -> tuple[Dimension, ...]:
    codec, (episodes, bins) = folder.codec, read
    actions = np.concatenate([one.actions for one in episodes])
    found = action_dimensions(actions, bins, codec.datasets[dataset.name], names, codec.binning)
    # What was clipped is gone from the answers; convert counted it.
    return tuple(replace(own, clipped=lost) for own, lost in zip(found, dataset.clipped, strict=True))


def _read_words(folder: ConvertedFolder, dataset: ConvertedDataset, read: list[Recorded]) -> str:
    samples = sum(len(one.steps) for one in read)
    if not dataset.episodes.written:
        return f"No training episode; {count(dataset.episodes.held_out, 'episode')} held out."
    if len(read) == dataset.episodes.written:
        return f"All {count(len(read), 'training episode')} read, {count(samples, 'sample')}."
    return (
        f"{len(read):,} of {count(dataset.episodes.written, 'training episode')} read, {samples:,} of "
        f"{count(dataset.steps.written, 'sample')}, drawn with seed {folder.seed}."
    )


def _counts(own: ConvertedDataset) -> tuple[Row, ...]:
    return (
        Row("Episodes in", f"{own.episodes.total:,}", "episodes_total"),
        Row("Episodes to train on", f"{own.episodes.written:,}", "episodes_written"),
        Row("Episodes held out", f"{own.episodes.held_out:,}", "episodes_held_out"),
        Row("Steps in", f"{own.steps.total:,}", "steps_total"),
        Row("Samples to train on", f"{own.steps.written:,}", "steps_written"),
        Row("Samples held out", f"{own.steps.held_out:,}", "steps_held_out"),
        Row("Images", f"{own.images:,}, {size(own.image_bytes)}", "images"),
        Row("Cameras, left to right", ", ".join(own.cameras)),
        Row("From", f"{own.folder}, split {', '.join(own.splits)}"),
    )


def _shares(own: ConvertedDataset) -> tuple[Share, ...]:
    return (
        Share(f"asked: weight {own.weight:g}", own.weight_share, f"{own.weight_share:.1%} of the weights"),
        Share("came of it: weight x samples", own.share, f"{own.share:.1%} of the draws in training"),
    )


def _dropped(what: str, tally: Tally) -> Iterator[Share]:
    for reason, number in sorted(tally.dropped.items(), key=lambda item: -item[1]):
        part = number / tally.total
        yield Share(f"{what}: {reason}", part, f"{number:,} of {tally.total:,} ({part:.1%})")


def _problems(own: ConvertedDataset, names: tuple[str, ...]) -> Iterator[str]:
    if not own.steps.written:
        yield "No sample to train on."
    if own.near_constant:
        yield f"Hardly ever changing: {', '.join(names[a] for a in own.near_constant)} (99 % in one bin)."
    for name, clipped in zip(names, own.clipped, strict=True):
        if clipped > _MUCH_CLIPPED:
            yield f"{clipped:.1%} of {name} lie outside what bins can say."
    if own.instructions.unlabelled_samples:
        yield (
            f"{count(own.instructions.unlabelled_samples, 'sample')} without an instruction of its own got "
            "its episode's first."
        )
    for bad in own.bad_records:
        yield f"Bad record {bad.record}: {bad.error}"
