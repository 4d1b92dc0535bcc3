"""What a model is asked. The prompt has its one home here: converter, trainer, decoder and server all ask
with these words, and a checkpoint carries them in its codec.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

IMAGE = "<image>"
_SLOT = "{instruction}"
_STATE = "State: "

CameraRole = Literal["primary", "secondary", "wrist"]
CAMERA_ROLES: tuple[CameraRole, ...] = get_args(CameraRole)


@functools.lru_cache(maxsize=4096)
def clean_instruction(text: str) -> str:
    """An instruction as it stands in a prompt: one line, lower case, no closing full stop.

    Empty when nothing is left, and when the text holds the image marker, which would break the prompt.
    """
    line = " ".join(text.split()).lower().rstrip(". ")
    return "" if IMAGE in line else line


class Asking(BaseModel):
    """How a human turn is made: one image marker per frame, the robot's state where asked for, the
    instruction.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    template: str = f"What action should the robot take to {_SLOT}?"
    cameras: tuple[CameraRole, ...] = Field(default=("primary",), min_length=1)
    state: bool = False

    @field_validator("template")
    @classmethod
    def _has_one_slot(cls, template: str) -> str:
        if template.count(_SLOT) != 1:
            raise ValueError(f"{template!r} must hold {_SLOT} exactly once")
        if IMAGE in template or "\n" in template or template != template.strip():
            raise ValueError(f"{template!r} must be one line without {IMAGE} or spaces around it")
        return template

    @field_validator("cameras")
    @classmethod
    def _each_once(cls, cameras: tuple[CameraRole, ...]) -> tuple[CameraRole, ...]:
        if len(set(cameras)) != len(cameras):
            raise ValueError(f"{', '.join(cameras)}: a camera stands here twice")
        return cameras

    def question(self, instruction: str, num_images: int = 1, state: Sequence[int] | None = None) -> str:
        """The human turn.

        Args:
            instruction: in words.
            num_images: one image marker each.
            state: bins of the robot's own state, [S], 0 to 255; written as numbers.

        Raises: ValueError for an instruction that is empty or holds the image marker, and for a state that is
            missing or was not asked for.
        """
        text = clean_instruction(instruction)
        if not text:
            raise ValueError(f"the instruction {instruction!r} is empty or holds the marker {IMAGE}")
        if self.state != (state is not None):
            raise ValueError(f"the robot's state is {'missing' if self.state else 'not part of the prompt'}")
        numbers = "" if state is None else f"{_STATE}{' '.join(map(str, state))}\n"
        return f"{IMAGE}\n" * num_images + numbers + self.template.replace(_SLOT, text)

    def state_bins(self, human: str) -> list[int]:
        """The bins of the state inside a human turn, [S]; none where the prompt holds no state.

        Raises: ValueError for a turn without the state that it should hold.
        """
        if not self.state:
            return []
        line = next((line for line in human.split("\n") if line.startswith(_STATE)), None)
        if line is None:
            raise ValueError(f"{human[:80]!r} does not say the robot's state")
        return [int(number) for number in line.removeprefix(_STATE).split()]

    def instruction(self, human: str) -> str:
        """The instruction inside a human turn: the inverse of `question`."""
        before, after = self.template.split(_SLOT)
        return human.rsplit("\n", 1)[-1].removeprefix(before).removesuffix(after)


def question(instruction: str) -> str:
    """The human turn of one camera in the words that are used unless others are asked for.

    Raises: ValueError for an instruction that is empty or holds the marker of an image.
    """
    return Asking().question(instruction)
