"""Episodes of a converted folder for `oxe-mix doctor`: a seeded sample of them, actions from their tokens.

What bins cannot say is not found here: actions stand at the centres of their bins, cut off at the quantiles.
The exact statistics of all steps are in the folder's codec.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from convert.action_codec import ActionCodec, decode, text_to_bins
from convert.doctor_frames import track
from convert.doctor_gripper import gripper_column
from convert.doctor_rlds import Sampling
from convert.doctor_summary import DatasetSummary, EpisodeSummary
from convert.finish import CARDS
from convert.llava import CONVERSATIONS
from convert.manifest import MANIFEST_FILE, ConvertedDataset, Manifest, codec_of, read_manifest
from convert.reader import ConversationReader, Sample
from convert.samples import NO_INSTRUCTION
from oxe_mix.cards import Card, load_card
from oxe_mix.errors import UserError

_TRIES = 20  # draws for each episode wanted: long ones are drawn again and again


class ConvertedFolder:
    """A converted folder, opened: its datasets, and what was looked at in them."""

    def __init__(self, folder: Path) -> None:
        """Raises: UserError when the folder is no finished conversion."""
        self._folder = folder
        self._readers = (ConversationReader(folder, "train"), ConversationReader(folder, "val"))
        self._manifest: Manifest = read_manifest(folder)
        self._codec: ActionCodec = codec_of(folder, self._manifest)

    @property
    def datasets(self) -> tuple[ConvertedDataset, ...]:
        """Its datasets, in the manifest's order."""
        return self._manifest.datasets

    def summarize(
        self, dataset: ConvertedDataset, sampling: Sampling, seen: Callable[[], None]
    ) -> DatasetSummary:
        """Look at a sample of a dataset's episodes; `seen` is called after each.

        A line that is no sample, and a frame that is not there, are listed.
        """
        card = self._card(dataset)
        episodes, unreadable = list[EpisodeSummary](), list[tuple[str, str]]()
        try:
            for reader, place in self._episodes(dataset, sampling):
                id_ = dataset.name
                try:
                    samples = [reader[i] for i in place]
                    id_ = samples[0].episode
                    episodes.append(self._episode(samples, dataset, card))
                except (UserError, ValueError) as error:
                    unreadable.append((id_, str(error)))
                seen()
        except UserError as error:  # where an episode ends cannot be read
            unreadable.append((dataset.name, str(error)))
        return DatasetSummary(
            name=dataset.name,
            card=card,
            width=self._codec.action_dim,
            usual_width=self._codec.action_dim,
            of_episodes=dataset.episodes.written + dataset.episodes.held_out,
            splits={},
            episodes=tuple(episodes),
            stats=self._codec.datasets[dataset.name],
            converted=True,
            left_out=dataset.episodes.dropped.get(NO_INSTRUCTION, 0),
            unreadable=tuple(unreadable),
        )

    def _card(self, dataset: ConvertedDataset) -> Card | None:
        """The card that it was converted by: convert left it in the folder."""
        file = self._folder / CARDS / f"{dataset.name}.yaml"
        return load_card(file).with_recipe(dataset.recipe) if file.exists() else None

    def _episodes(
        self, dataset: ConvertedDataset, sampling: Sampling
    ) -> Iterator[tuple[ConversationReader, range]]:
        """The readers and places of the episodes to look at, each once."""
        of_episodes = dataset.episodes.written + dataset.episodes.held_out
        if sampling.episodes is None or sampling.episodes >= of_episodes:
            for reader in self._readers:
                at = reader.ranges[dataset.name].start
                while at < reader.ranges[dataset.name].stop:
                    yield reader, (place := _around(reader, dataset.name, at))
                    at = place.stop
            return
        ranges = [reader.ranges[dataset.name] for reader in self._readers]
        draws, seen = random.Random(f"{sampling.seed} {dataset.name}"), set[tuple[int, int]]()
        for _ in range(sampling.episodes * _TRIES):
            i = draws.randrange(sum(map(len, ranges)))
            part = int(i >= len(ranges[0]))
            at = ranges[part][i - part * len(ranges[0])]
            place = _around(self._readers[part], dataset.name, at)
            if (part, place.start) not in seen:
                seen.add((part, place.start))
                yield self._readers[part], place
            if len(seen) == sampling.episodes:
                return

    def _episode(self, samples: list[Sample], dataset: ConvertedDataset, card: Card | None) -> EpisodeSummary:
        """Raises: ValueError for a sample that this codec does not read."""
        codec, stats = self._codec, self._codec.datasets[dataset.name]
        actions, states = [], []
        for sample in samples:
            bins = text_to_bins(sample.answer, codec.action_dim)
            # Of a chunk the first action is the step's own.
            actions.append(decode(bins[:1], stats, codec.binning)[0])
            if dataset.name in codec.states:
                states.append(codec.asking.state_bins(sample.question))
        column = gripper_column(card) if card and states else None
        gripper = [row[column] for row in states] if column is not None else []
        frames = zip(*(sample.frames for sample in samples), strict=True)
        return EpisodeSummary(
            id=samples[0].episode,
            steps=np.array([sample.step for sample in samples], np.int64),
            actions=np.array(actions, np.float32),
            gripper_state=np.array(gripper, np.float32),
            bad_states=0,
            texts=tuple(codec.asking.instruction(sample.question) for sample in samples),
            cameras=tuple(
                track(role, [frame.read for frame in column])
                for role, column in zip(dataset.cameras, frames, strict=True)
            ),
        )


def _around(reader: ConversationReader, name: str, at: int) -> range:
    """The places of an episode's samples, of which one stands at `at`: they follow each other."""
    limits, episode = reader.ranges[name], reader[at].episode
    start, stop = at, at + 1
    while start > limits.start and reader[start - 1].episode == episode:
        start -= 1
    while stop < limits.stop and reader[stop].episode == episode:
        stop += 1
    return range(start, stop)


def is_converted(folder: Path) -> bool:
    """Whether a folder is what convert wrote, or is writing."""
    return any((folder / name).exists() for name in (MANIFEST_FILE, CONVERSATIONS))
