"""Answer held-out samples with the decoder that a robot would use, and score the answers. The ranks share the
work.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from convert.action_codec import ActionCodec, Bins, text_to_bins
from convert.reader import ConversationReader
from train_llava.decode import ActionDecoder
from train_llava.metrics import Scored, score
from train_llava.processor import OneViewProcessor, open_frame

_BATCH = 64


def evaluate(
    decoder: ActionDecoder,
    processor: OneViewProcessor,
    codec: ActionCodec,
    reader: ConversationReader,
    seed: int,
) -> dict[str, Any]:
    """Score a reader's samples; every rank gets the same report.

    With shuffled images each question is asked about a frame of another sample of its dataset: a model that
    looks at its frames must then do worse.
    """
    swapped = _shuffled(reader.ranges, seed)
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = list(range(rank, len(reader), num_ranks))
    predicted: dict[int, tuple[Bins, Bins]] = {}
    for start in range(0, len(mine), _BATCH):
        batch = mine[start : start + _BATCH]
        own = _answers(decoder, processor, reader, batch, batch)
        other = _answers(decoder, processor, reader, batch, [int(swapped[i]) for i in batch])
        predicted |= {index: (own[i], other[i]) for i, index in enumerate(batch)}
    if num_ranks > 1:
        parts: list[dict[int, tuple[Bins, Bins]]] = [{} for _ in range(num_ranks)]
        dist.all_gather_object(parts, predicted)
        predicted = {index: bins for part in parts for index, bins in part.items()}
    return score(
        codec,
        [
            _scored(name, samples, reader, codec, predicted)
            for name, samples in reader.ranges.items()
            if samples
        ],
    )


def _answers(
    decoder: ActionDecoder,
    processor: OneViewProcessor,
    reader: ConversationReader,
    asked: list[int],
    shown: list[int],
) -> Bins:
    questions = [reader[index].question for index in asked]
    views = np.stack([processor.view(open_frame(frame)) for index in shown for frame in reader[index].frames])
    # The first action of a chunk is what is scored.
    return decoder.predict(questions, views, [reader[index].dataset for index in asked]).bins[:, 0]


def _scored(
    name: str,
    samples: range,
    reader: ConversationReader,
    codec: ActionCodec,
    predicted: dict[int, tuple[Bins, Bins]],
) -> Scored:
    rows = [reader[index] for index in samples]
    return Scored(
        dataset=name,
        episode=[row.episode for row in rows],
        target=np.stack([text_to_bins(row.answer, codec.action_dim)[0] for row in rows]),
        predicted=np.stack([predicted[index][0] for index in samples]),
        shuffled=np.stack([predicted[index][1] for index in samples]),
    )


def _shuffled(ranges: dict[str, range], seed: int) -> NDArray[np.int64]:
    """For each sample another one of its dataset: a seeded permutation, turned by one place."""
    rng, out = np.random.default_rng(seed), [np.zeros(0, np.int64)]
    for samples in ranges.values():
        order = rng.permutation(len(samples))
        turned = np.empty_like(order)
        turned[order] = np.roll(order, 1)
        out.append(turned + samples.start)
    return np.concatenate(out)
