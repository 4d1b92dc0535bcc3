"""From a conversation and its frames to token ids and pixels: the one path that training, evaluation and
acting share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.processing_utils import ProcessorMixin

from convert.frames import Frame
from convert.prompt import IMAGE
from oxe_mix.errors import UserError
from oxe_mix.images import opened

IGNORE = -100  # the label of a token that is not supervised, as PyTorch's cross entropy has it
_ANYRES = "anyres_max_9"
_LONGEST = 4  # sides of the view: a thin picture makes a square of a million times its pixels
_ROLES = {"human": "user", "gpt": "assistant"}

Size = tuple[int, int]  # height and width, pixels
Turns = Sequence[tuple[str, str]]  # (human or gpt, text), alternating, the human's first


@dataclass(frozen=True, slots=True)
class View:
    """A frame as the vision tower takes it, before scaling.

    patches: uint8 [P, S, S, 3]; P is 1, but for anyres. size: of the frame that it was made from.
    """

    patches: NDArray[np.uint8]
    size: Size


class OneViewProcessor(LlavaOnevisionProcessor):
    """LLaVA-OneVision's processor without its video half, which needs torchvision, and with a choice of what
    a frame becomes.

    image_mode single: one view, stretched to a square, (image_size / patch_size)² tokens and a newline; what
    LLaVA-OneVision itself makes as the base view of a picture. pad: the same, padded to a square before.
    anyres_max_9: the base view and up to nine tiles, as the stock processor has it; of a 256x256 frame twice
    the tokens.
    """

    def __init__(  # noqa: PLR0913, PLR0917 (the names that processor_config.json has)
        self,
        image_processor: LlavaOnevisionImageProcessorPil,
        tokenizer: PreTrainedTokenizerBase,
        num_image_tokens: int,
        vision_feature_select_strategy: str = "full",
        chat_template: str | None = None,
        image_mode: str = "single",
        **_: Any,
    ) -> None:
        """Put the parts together; what a stock processor file says of anyres is not used."""
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.vision_aspect_ratio = _ANYRES
        self.image_mode = image_mode
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @property
    def end_of_turn(self) -> int:
        """The token that closes an answer."""
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def needs_sizes(self) -> bool:
        """Whether a frame's size decides on its number of tokens."""
        return self.image_mode == _ANYRES

    def num_view_tokens(self, size: Size) -> int:
        """Tokens of a frame of that size, newlines included."""
        side = self.image_processor.size["height"]
        tokens: int = self.num_image_tokens + 1
        if self.needs_sizes:
            tokens = self._get_number_of_features(*size, side, side)
        return tokens

    def prompt_ids(self, question: str, tokens: Sequence[int]) -> list[int]:
        """The ids of a human turn with the answer's opening, each <image> as the tokens of its frame.

        Args:
            tokens: of each image, `num_view_tokens`.

        Raises: ValueError when question, tokens and the chat template do not speak of the same images.
        """
        return self._prompt(question, self._rendered([("human", question)], opens_answer=True), tokens)

    def answer_ids(self, answer: str) -> list[int]:
        """The ids of an answer and of the end of its turn: exactly what is supervised."""
        ids: list[int] = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*ids, self.end_of_turn]

    def conversation_ids(self, turns: Turns, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids and labels of a whole conversation; the labels are IGNORE but for the answers and their ends.

        Raises: ValueError as `prompt_ids`, and for a template that writes earlier turns anew.
        """
        ids: list[int] = []
        labels: list[int] = []
        used = 0
        for i in range(0, len(turns), 2):
            question, answer = turns[i][1], turns[i + 1][1]
            images = question.count(IMAGE)
            prompt = self._prompt(question, self._next_turn(turns[: i + 1]), tokens[used : used + images])
            used += images
            answered = self.answer_ids(answer)
            ids += prompt + answered
            labels += [IGNORE] * len(prompt) + answered
        if used != len(tokens):
            raise ValueError(f"{len(tokens)} images, but {used} times {IMAGE} in the turns")
        return ids, labels

    def view(self, image: Image.Image) -> View:
        """A frame as the model sees it before scaling."""
        image = image.convert("RGB")
        size, square = (image.height, image.width), self.image_processor.size
        side = (square["height"], square["width"])
        if self.needs_sizes:
            own = self.image_processor
            planes = np.asarray(image).transpose(2, 0, 1)
            patches = own.get_image_patches(
                planes, own.image_grid_pinpoints, side, side[0], Image.Resampling.BICUBIC
            )
            return View(np.stack(patches).transpose(0, 2, 3, 1).astype(np.uint8), size)
        if self.image_mode == "pad":
            image.thumbnail((_LONGEST * side[0],) * 2, Image.Resampling.BICUBIC)
            image = _padded(image, tuple(int(value * 255) for value in self.image_processor.image_mean))
        return View(np.asarray(image.resize(side[::-1], Image.Resampling.BICUBIC))[None], size)

    def frames(self, views: Iterable[View]) -> dict[str, NDArray[Any]]:
        """The model's inputs from views: pixel_values float32 [sum of P, 3, S, S], scaled by the tower's mean
        and deviation, and for anyres image_sizes int64 [N, 2]; nothing when there are no views.
        """
        views = list(views)
        if not views:
            return {}
        mean = np.array(self.image_processor.image_mean, np.float32) * 255
        std = np.array(self.image_processor.image_std, np.float32) * 255
        levels = (np.arange(256, dtype=np.float32) - mean[:, None]) / std[:, None]
        patches = np.concatenate([view.patches for view in views])
        pixels = np.empty((len(patches), 3, *patches.shape[1:3]), np.float32)
        for channel in range(3):  # looking 256 values up takes a seventh of the time of scaling each pixel
            np.take(levels[channel], patches[..., channel], out=pixels[:, channel], mode="clip")
        sizes = {"image_sizes": np.array([view.size for view in views])} if self.needs_sizes else {}
        return {"pixel_values": pixels} | sizes

    def _rendered(self, turns: Turns, *, opens_answer: bool) -> str:
        """Turns as the template writes them."""
        messages: list[Any] = []
        for role, text in turns:
            parts: list[Any] = [{"type": "image"}] * text.count(IMAGE)
            parts.append({"type": "text", "text": text.replace(IMAGE, "").strip()})
            messages.append({"role": _ROLES[role], "content": parts})
        text = self.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens_answer)
        assert isinstance(text, str)
        return text

    def _next_turn(self, turns: Turns) -> str:
        """What the last turn adds to those before it, from the end of the last answer on."""
        whole = self._rendered(turns, opens_answer=True)
        if len(turns) == 1:
            return whole
        before = self._rendered(turns[:-1], opens_answer=False)
        if not whole.startswith(before):
            raise ValueError("the chat template writes earlier turns anew; only one question can be asked")
        return before.rpartition(self.tokenizer.eos_token)[2] + whole.removeprefix(before)

    def _prompt(self, question: str, text: str, tokens: Sequence[int]) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        asked, found = question.count(IMAGE), ids.count(self.image_token_id)
        if not asked == found == len(tokens):
            raise ValueError(f"{asked} images in the question, {found} in the prompt, {len(tokens)} given")
        left = iter(tokens)
        return [
            token for id_ in ids for token in ([id_] * next(left) if id_ == self.image_token_id else (id_,))
        ]


def _padded(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """An image in the middle of the smallest square around it."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def open_image(file: Path) -> Image.Image:
    """Decode an image file, RGB. Raises: UserError when it is missing or no image."""
    return open_frame(Frame(file))


def open_frame(frame: Frame) -> Image.Image:
    """Decode a frame of a converted folder, RGB. Raises: UserError when it is missing or no image."""
    encoded = frame.read()
    try:
        with opened(encoded) as image:
            return image.convert("RGB")
    except ValueError as error:
        raise UserError(f"{frame}: not an image that can be decoded ({error})") from error
