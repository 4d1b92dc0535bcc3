"""What a robot step looks like as a LLaVA conversation. The prompt has its one home here: converter, trainer,
decoder and server all ask with these words."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from convert.action_codec import Bins, bins_to_text

IMAGE = "<image>"
CONVERSATIONS, VALIDATION, IMAGES = "conversations", "val", "images"


_BEFORE, _AFTER = f"{IMAGE}\nWhat action should the robot take to ", "?"


def clean_instruction(text: str) -> str:
    """An instruction as it stands in a prompt: one line, lower case, no closing full stop.

    Empty when nothing is left, and when the text holds the image marker, which would break the prompt.
    """
    line = " ".join(text.split()).lower().rstrip(". ")
    return "" if IMAGE in line else line


def question(instruction: str) -> str:
    """The human turn of one camera.

    Raises: ValueError for an instruction that is empty or holds the image marker.
    """
    text = clean_instruction(instruction)
    if not text:
        raise ValueError(f"the instruction {instruction!r} is empty or holds the marker {IMAGE}")
    return f"{_BEFORE}{text}{_AFTER}"


def asked_instruction(human: str) -> str:
    """The instruction inside a human turn: the inverse of `question`."""
    return human.removeprefix(_BEFORE).removesuffix(_AFTER)


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
        """The frame's path below `images/`."""
        return f"{self.dataset}/{self.split}/{self.shard}/{self.episode}_{self.step}{suffix}"


def conversation(place: Place, image: str, instruction: str, bins: Bins) -> dict[str, Any]:
    """One sample as stock LLaVA reads it, with our own `dataset`, `episode` and `step` behind."""
    return {
        "id": place.id,
        "image": image,
        "conversations": [
            {"from": "human", "value": question(instruction)},
            {"from": "gpt", "value": bins_to_text(bins)},
        ],
        "dataset": place.dataset,
        "episode": place.episode,
        "step": place.step,
    }


def json_line(sample: dict[str, Any]) -> bytes:
    """One line of a .jsonl file."""
    return json.dumps(sample, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
