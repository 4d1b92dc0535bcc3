"""From a question and its frames to token ids and pixels: the one path that training, evaluation and acting
share.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from transformers import PreTrainedTokenizerBase
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.processing_utils import ProcessorMixin

from convert.frames import Frame
from convert.prompt import IMAGE
from oxe_mix.errors import UserError

IGNORE = -100  # the label of a token that is not supervised, as PyTorch's cross entropy has it


class OneViewProcessor(LlavaOnevisionProcessor):
    """LLaVA-OneVision's processor without its video half, which needs torchvision, and with one view per
    frame.

    A robot frame is one square view: (image_size / patch_size)² tokens and a newline, where anyres_max_9
    would cut a 256x256 frame into 1,485. The view is what LLaVA-OneVision itself makes as the base view of a
    picture.
    """

    def __init__(
        self,
        image_processor: LlavaOnevisionImageProcessorPil,
        tokenizer: PreTrainedTokenizerBase,
        num_image_tokens: int,
        vision_feature_select_strategy: str = "full",
        chat_template: str | None = None,
        **_: Any,
    ) -> None:
        """Put the parts together; what a stock processor file says of anyres is not used."""
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @property
    def end_of_turn(self) -> int:
        """The token that closes an answer."""
        return int(self.tokenizer.eos_token_id)

    def prompt_ids(self, question: str) -> list[int]:
        """The ids of a human turn with the answer's opening, each <image> as the tokens of one view.

        Raises: ValueError when the chat template loses or invents an image.
        """
        num_images = question.count(IMAGE)
        parts: list[Any] = [{"type": "image"}] * num_images
        parts.append({"type": "text", "text": question.replace(IMAGE, "").strip()})
        turns: list[Any] = [{"role": "user", "content": parts}]
        text = self.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids.count(self.image_token_id) != num_images:
            raise ValueError(
                f"{num_images} images in the question, {ids.count(self.image_token_id)} in the prompt"
            )
        view = [self.image_token_id] * (self.num_image_tokens + 1)
        return [token for id_ in ids for token in (view if id_ == self.image_token_id else [id_])]

    def answer_ids(self, answer: str) -> list[int]:
        """The ids of an answer and of the end of its turn: exactly what is supervised."""
        ids: list[int] = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*ids, self.end_of_turn]

    def view(self, image: Image.Image) -> NDArray[np.uint8]:
        """A frame as the model sees it before scaling: uint8 [S, S, 3], resized without keeping the
        aspect.
        """
        size = self.image_processor.size
        square = (size["width"], size["height"])
        return np.asarray(image.convert("RGB").resize(square, Image.Resampling.BICUBIC))

    def pixels(self, views: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Views [N, S, S, 3] to the vision tower's input, float32 [N, 3, S, S], scaled by its mean and
        deviation.
        """
        mean = np.array(self.image_processor.image_mean, np.float32) * 255
        std = np.array(self.image_processor.image_std, np.float32) * 255
        return np.ascontiguousarray(((views.astype(np.float32) - mean) / std).transpose(0, 3, 1, 2))


def open_image(file: Path) -> Image.Image:
    """Decode an image file, RGB. Raises: UserError when it is missing or no image."""
    return open_frame(Frame(file))


def open_frame(frame: Frame) -> Image.Image:
    """Decode a frame of a converted folder, RGB. Raises: UserError when it is missing or no image."""
    encoded = frame.read()
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{frame}: not an image that can be decoded ({error})") from error
