"""What a robot step looks like as a LLaVA conversation, and how its files are called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from convert.action_codec import Bins, bins_to_text

CONVERSATIONS, VALIDATION, IMAGES = "conversations", "val", "images"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample comes from; shard and episode count from 0, step counts in the source episode."""

    dataset: str
    split: str
    shard: int
    episode: int
    step: int

    @property
    def id(self) -> str:
        """NAME/SPLIT/SHARD/EPISODE/STEP, unique in a converted folder."""
        return f"{self.dataset}/{self.split}/{self.shard}/{self.episode}/{self.step}"

    def image(self, suffix: str) -> str:
        """The frame's path below `images/`; the suffix begins with the camera where there are several."""
        return f"{self.dataset}/{self.split}/{self.shard}/{self.episode}_{self.step}{suffix}"


def conversation(place: Place, images: Sequence[str], question: str, bins: Bins) -> dict[str, Any]:
    """One sample as stock LLaVA reads it, with our own `dataset`, `episode` and `step` behind.

    Args:
        place: of the step.
        images: one path or several, in the order of the question's markers.
        question: the human turn.
        bins: [A], or [H, A] for a chunk.
    """
    return {
        "id": place.id,
        "image": images[0] if len(images) == 1 else list(images),
        "conversations": [
            {"from": "human", "value": question},
            {"from": "gpt", "value": bins_to_text(bins)},
        ],
        "dataset": place.dataset,
        "episode": place.episode,
        "step": place.step,
    }


def json_line(sample: dict[str, Any]) -> bytes:
    """One line of a .jsonl file."""
    return json.dumps(sample, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
