"""LLaVA-OneVision of any size with random weights, asked in our way and in the usual one."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from benchmarks.gpu_model import SHAPES, Shape, Tower, config_of
from convert.action_codec import ActionCodec
from convert.prompt import IMAGE, question
from convert.statistics import action_stats
from train_llava.acting.policy import Latency
from train_llava.action_tokens import add_action_tokens
from train_llava.decode import ActionDecoder
from train_llava.model import OneViewLlava
from train_llava.processor import OneViewProcessor
from train_llava.tiny import CHAT_TEMPLATE, VIDEO, token_id, train_tokenizer

WIDTH = 7
_SIDE, _PATCH = 384, 14
_GRID = [[_SIDE * rows, _SIDE * columns] for rows in range(1, 7) for columns in range(1, 7)]
_ASKED = question("put the carrot on the plate")


# The 0.5B's depths, its vocabulary and its tied head, all widths divided by 5.6.
NARROW = Shape("narrow", 160, 24, 10, 2, 868, 151_936, tied=True, lora_rank=0, tower=Tower(208, 26, 8, 768))
# Few and wide layers, a small vocabulary.
WIDE = Shape("wide", 512, 8, 8, 8, 2048, 3840, tied=False, lora_rank=0, tower=Tower(384, 6, 6, 1536))
TRUE_7B = SHAPES["ov-7b"]


class Ours:
    """Our decoder over our processor; `chunk` above 1 with slots, in one pass."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, chunk: int = 1) -> None:
        torch.manual_seed(0)
        self.model, self.processor = _build(shape, device, dtype)
        self.chunk = chunk
        add_action_tokens(self.model, self.processor.tokenizer, WIDTH * chunk if chunk > 1 else 0)
        chance = np.random.default_rng(0)
        stats = action_stats(chance.normal(size=(50, WIDTH)).astype(np.float32), (True,) * WIDTH, 1)
        codec = ActionCodec(action_dim=WIDTH, chunk=chunk, datasets={"robot": stats})
        on_gpu = device.type == "cuda" and chunk == 1
        self._decoder = ActionDecoder(self.model, self.processor, codec, reuse=True, cuda_graph=on_gpu)

    def answer(self, image: Image.Image) -> Latency:
        """One control step."""
        start = time.perf_counter()
        view = self.processor.view(image)
        preprocess = (time.perf_counter() - start) * 1000
        found = self._decoder.predict([_ASKED], [view], ["robot"])
        return Latency(preprocess + found.prepare_ms, found.prefill_ms, found.decode_ms)


class Usual:
    """The stock classes over the same weights, as the replaced script asks them when it stops in time:
    `generate` with anyres_max_9, A + 1 tokens.
    """

    def __init__(self, ours: Ours) -> None:
        with torch.device("meta"):
            stock = LlavaOnevisionForConditionalGeneration(ours.model.config)
        stock.load_state_dict(ours.model.state_dict(), assign=True)
        self._model: Any = stock
        self._model.eval()
        self._share_buffers(ours)
        self._processor: Any = ours.processor
        self._starts: list[float] = []
        self._model.register_forward_pre_hook(self._note)

    def _share_buffers(self, ours: Ours) -> None:
        """Frequencies and positions are in no state dict, and on the meta device they hold nothing."""
        for name, value in ours.model.named_buffers():
            owner, _, leaf = name.rpartition(".")
            self._model.get_submodule(owner).register_buffer(leaf, value, persistent=False)

    def _note(self, *_: Any) -> None:
        self._starts.append(self._now())

    def _now(self) -> float:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def answer(self, image: Image.Image) -> Latency:
        """One control step."""
        start = time.perf_counter()
        inputs = self._inputs(image)
        began = self._now()
        self._starts.clear()
        with torch.inference_mode():
            self._model.generate(
                **inputs, min_new_tokens=WIDTH + 1, max_new_tokens=WIDTH + 1, do_sample=False
            )
        end = self._now()
        assert len(self._starts) == WIDTH + 1
        return Latency(
            (began - start) * 1000, (self._starts[1] - began) * 1000, (end - self._starts[1]) * 1000
        )

    def _inputs(self, image: Image.Image) -> dict[str, Any]:
        """What the stock processor makes, by its own code for the tiles and their number of tokens."""
        own = self._processor
        found = own.image_processor([image], return_tensors="pt")
        size = found["image_sizes"][0].tolist()
        tokens = own._get_number_of_features(*size, _SIDE, _SIDE)  # noqa: SLF001 (what the stock call does)
        ids = torch.tensor([own.prompt_ids(_ASKED, [tokens])], device=self._model.device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": found["pixel_values"].to(self._model.device, self._model.dtype),
            "image_sizes": found["image_sizes"],
        }


def _build(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[OneViewLlava, OneViewProcessor]:
    tokenizer = train_tokenizer([_ASKED], 512)
    images = LlavaOnevisionImageProcessorPil(
        size={"height": _SIDE, "width": _SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        image_grid_pinpoints=_GRID,
    )
    patches = (_SIDE // _PATCH) ** 2
    processor = OneViewProcessor(images, tokenizer, patches, chat_template=CHAT_TEMPLATE)
    config: Any = config_of(shape)
    config.image_token_id = token_id(tokenizer, IMAGE)
    config.video_token_id = token_id(tokenizer, VIDEO)
    config.image_grid_pinpoints = _GRID
    config.text_config.pad_token_id = tokenizer.pad_token_id
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = OneViewLlava(config)
    finally:
        torch.set_default_dtype(before)
    model.train(False)
    return model, processor
