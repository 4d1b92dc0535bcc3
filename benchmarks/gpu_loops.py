"""The two loops: encoded frames that worker processes decode, random text around them, and the steps.

Ours sees a frame as one view; the stock loop as `anyres_max_9` does, a base view and one tile for a square.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.utils.import_utils import is_accelerate_available

from benchmarks.gpu_measure import Clock, Tokens
from benchmarks.gpu_model import (
    IGNORE,
    NUM_ACTION_TOKENS,
    Batch,
    MasterAdamW,
    Shape,
    checkpoint_layers,
    one_view_loss,
)

FRAME_SIDE, NUM_FRAMES, NUM_SAMPLES = 256, 64, 1_000_000
MEAN_PROMPT, SPREAD, ANSWER = 41, 6, 8  # prompts are 35 to 47 tokens; an answer is 7 bins and the end of turn
LEARNING_RATE = 1e-5
HAS_PILLOW = importlib.util.find_spec("PIL") is not None


def tokens_of(shape: Shape, *, stock: bool) -> Tokens:
    """A mean sample. Visual: 730, a view and a newline; stock 1,485, a view of 729 and a tile of 27 x 28."""
    patches = shape.tower.side**2
    views, visual = (2, 2 * patches + shape.tower.side) if stock else (1, patches + 1)
    return Tokens(views, patches, visual, MEAN_PROMPT + ANSWER, ANSWER)


@functools.cache
def make_frames(shape: Shape) -> list[Any]:
    """Encoded 256x256 frames, JPEG and PNG by turns; ready uint8 views where there is no Pillow."""
    dice = torch.Generator().manual_seed(0)
    blocks = [
        torch.randint(0, 256, (16, 16, 3), generator=dice, dtype=torch.uint8) for _ in range(NUM_FRAMES)
    ]
    if not HAS_PILLOW:
        side = shape.tower.image
        rows = torch.arange(side) * 16 // side
        return [block[rows][:, rows] for block in blocks]
    return [_encode(block, "JPEG" if i % 2 else "PNG") for i, block in enumerate(blocks)]


def _encode(block: Tensor, file_format: str) -> bytes:
    """Smooth colours, as a camera's: neither flat nor noise, which would decode faster or slower."""
    from PIL import Image

    picture = Image.frombytes("RGB", (16, 16), bytes(block.flatten().tolist()))
    stream = io.BytesIO()
    picture.resize((FRAME_SIDE, FRAME_SIDE), Image.Resampling.BICUBIC).save(stream, file_format, quality=95)
    return stream.getvalue()


def _view(frame: Any, side: int) -> Tensor:
    """Decode, resize and scale as train_llava's processor does: float32 [3, S, S] in [-1, 1]."""
    pixels = frame
    if HAS_PILLOW:
        from PIL import Image

        with Image.open(io.BytesIO(frame)) as image:
            square = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(side, side, 3)
    scaled: Tensor = pixels.permute(2, 0, 1).float().div(127.5).sub(1)
    return scaled.contiguous()


class Samples(Dataset[Batch]):
    """Samples by index, padded at the end to one length: the stock loop's collator only stacks."""

    def __init__(self, shape: Shape, frames: list[Any], *, stock: bool) -> None:
        """Keep encoded frames; nothing is decoded before a worker asks for it."""
        self._shape, self._frames, self._stock = shape, frames, stock
        self._tokens = tokens_of(shape, stock=stock)

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> Batch:
        """input_ids, attention_mask, labels [L], pixel_values [V, 3, S, S]; stock: the frame's size too."""
        ids, num_prompt = self._ids(index)
        length = self._tokens.visual + MEAN_PROMPT + SPREAD + ANSWER
        padding = torch.zeros(length - len(ids), dtype=torch.long)
        real = torch.arange(length) < len(ids)
        padded = torch.cat([ids, padding])
        supervised = real & (torch.arange(length) >= num_prompt)
        frame, side = self._frames[index % len(self._frames)], self._shape.tower.image
        item = {
            "input_ids": padded,
            "attention_mask": real.long(),
            "labels": padded.where(supervised, torch.tensor(IGNORE)),
            "pixel_values": torch.stack([_view(frame, side) for _ in range(self._tokens.views)]),
        }
        return item | {"image_sizes": torch.tensor([FRAME_SIDE] * 2)} if self._stock else item

    def _ids(self, index: int) -> tuple[Tensor, int]:
        """Ids of prompt and answer, and how many of them are the prompt's."""
        dice = torch.Generator().manual_seed(index)
        num_text = MEAN_PROMPT - SPREAD + index * 5 % (2 * SPREAD + 1)
        text = torch.randint(1, self._shape.image_token, (num_text,), generator=dice)
        frame = torch.full((self._tokens.visual,), self._shape.image_token)
        bins = torch.randint(0, NUM_ACTION_TOKENS, (ANSWER - 1,), generator=dice) + self._shape.vocabulary
        end = torch.tensor([self._shape.image_token - 1])
        ids = torch.cat([text[:5], frame, text[5:], bins, end])
        return ids, self._tokens.visual + num_text


class Collate:
    """Our batches: views flattened, and the places of frames and supervised tokens found on the CPU."""

    def __init__(self, shape: Shape) -> None:
        """Remember the image token."""
        self._image_token = shape.image_token

    def __call__(self, samples: list[Batch]) -> Batch:
        """Stack samples; `supervised` are the positions whose logits predict `targets`."""
        batch: Batch = default_collate(samples)
        labels = batch.pop("labels")
        next_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
        supervised = (next_labels != IGNORE).nonzero().squeeze(1)
        return batch | {
            "pixel_values": batch["pixel_values"].flatten(0, 1),
            "image_at": (batch["input_ids"].flatten() == self._image_token).nonzero().squeeze(1),
            "supervised": supervised,
            "targets": next_labels[supervised],
        }


@dataclass(frozen=True, slots=True)
class Settings:
    """One try of one run."""

    batch: int
    checkpointing: bool
    num_workers: int
    device: torch.device
    mask: bool = True  # ours alone: hand the padding mask to the language model


def train_ours(model: Any, samples: Samples, collate: Collate, clock: Clock, settings: Settings) -> float:
    """A plain loop on fp32 masters. Returns: the last loss."""
    if settings.checkpointing:
        checkpoint_layers(model)
    optimizer = MasterAdamW(model.parameters(), LEARNING_RATE)

    def step(batch: Batch) -> Tensor:
        loss = one_view_loss(model, _to_device(batch, settings.device), mask=settings.mask)
        loss.backward()
        optimizer.step()
        return loss.detach()

    loader = DataLoader(
        samples,
        batch_size=settings.batch,
        num_workers=settings.num_workers,
        collate_fn=collate,
        pin_memory=settings.device.type == "cuda",
        prefetch_factor=4,
    )
    return _run_steps(loader, step, clock)


def _to_device(batch: Batch, device: torch.device) -> Batch:
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    return moved | {"pixel_values": moved["pixel_values"].bfloat16()}


def _run_steps(batches: Iterable[Batch], step: Callable[[Batch], Tensor], clock: Clock) -> float:
    clock.start()
    for batch in batches:
        clock.have_data()
        loss = step(batch)
        if clock.done():
            break
    return float(loss)


def stock_loop_name() -> str:
    """Which stock loop this machine can run."""
    if is_accelerate_available():
        return "transformers' Trainer"
    return "a plain loop like the Trainer's: accelerate, which the Trainer needs, is not installed"


def train_stock(model: Any, samples: Samples, clock: Clock, settings: Settings) -> float:
    """The Trainer with its defaults where they matter for speed. Returns: the last loss."""
    if not is_accelerate_available():
        return _train_plain(model, samples, clock, settings)
    with tempfile.TemporaryDirectory(prefix="oxe-mix-bench-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=clock.warmup + clock.measured,
            per_device_train_batch_size=settings.batch,
            learning_rate=LEARNING_RATE,
            optim="adamw_torch_fused",
            bf16=settings.device.type == "cuda",
            use_cpu=settings.device.type == "cpu",
            gradient_checkpointing=settings.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if settings.checkpointing else None,
            dataloader_num_workers=settings.num_workers,
            dataloader_pin_memory=settings.device.type == "cuda",
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        follower = _Follower(clock)
        trainer = Trainer(model, arguments, train_dataset=samples, callbacks=[follower])
        return float(trainer.train().training_loss)


class _Follower(TrainerCallback):
    """The clock, held by the Trainer: between two steps it fetches data and does nothing else."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._clock.start()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._clock.have_data()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = self._clock.done()


def _train_plain(model: Any, samples: Samples, clock: Clock, settings: Settings) -> float:
    """What the Trainer does in a step, without accelerate around it."""
    if settings.checkpointing:
        checkpoint_layers(model)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(batch: Batch) -> Tensor:
        moved = {name: value.to(settings.device, non_blocking=True) for name, value in batch.items()}
        with torch.autocast(settings.device.type, dtype=torch.bfloat16):
            loss: Tensor = model(**moved, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    loader = DataLoader(
        samples,
        batch_size=settings.batch,
        num_workers=settings.num_workers,
        collate_fn=default_data_collator,
        pin_memory=settings.device.type == "cuda",
    )
    return _run_steps(loader, step, clock)
