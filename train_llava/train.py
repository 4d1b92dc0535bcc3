"""One training run, top to bottom, as each rank executes it. Started by `make train` through
`train_llava.launch`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from convert.action_codec import CODEC_FILE, read_codec
from convert.manifest import MANIFEST_FILE
from convert.reader import ConversationReader
from oxe_mix.errors import UserError
from oxe_mix.files import write_json
from oxe_mix.text import say
from train_llava.config import RunConfig, deepspeed_json, load_config
from train_llava.data import MixSampler, SampleDataset, check_lengths, collate, first_batch_text
from train_llava.decode import ActionDecoder
from train_llava.evaluate import evaluate
from train_llava.metrics import summary
from train_llava.model import OneViewLlava, load_or_build, save_checkpoint
from train_llava.processor import OneViewProcessor

METRICS_FILE, REPORT_FILE = "metrics.jsonl", "evaluation.json"
# Questions that a tiny model's tokenizer is trained on, spread over the data: enough to meet every word of
# it.
_TOKENIZER_SAMPLES = 2000


def train(config: RunConfig, llava: Path, run: Path) -> None:
    """Train a model on a converted folder and leave it in `run`, with its codec, its metrics and its
    report.
    """
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    tell = say if rank == 0 else _silent
    set_seed(config.seed)
    codec = read_codec(llava)
    reader = ConversationReader(llava, "train")
    spread = range(0, len(reader), max(1, len(reader) // _TOKENIZER_SAMPLES))
    model, processor = load_or_build(config.model, [reader[i].question for i in spread], config.seed)
    dataset = SampleDataset(reader, processor, cache=config.train.cache_frames)
    _preflight(config, model, processor, dataset, tell)

    trainer = _MixTrainer(
        model=model,
        args=_arguments(config, run, num_ranks),
        train_dataset=dataset,
        data_collator=partial(collate, processor=processor),
        callbacks=[_Metrics(run)],
    )
    trainer.order = MixSampler(reader.ranges, reader.weights, config.seed)
    trainer.remove_callback(PrinterCallback)
    start = time.monotonic()
    result = trainer.train()
    seconds = time.monotonic() - start
    tell(f"trained {config.train.max_steps:,} steps of {config.train.global_batch} in {seconds:.0f} s")

    report: dict[str, Any] = {"config": config.model_dump(mode="json"), "train_seconds": seconds}
    report |= {"final_loss": trainer.last_loss, "mean_loss": result.training_loss, "samples": len(reader)}
    held_out = ConversationReader(llava, "val")
    if len(held_out):
        tell(f"evaluating on {len(held_out):,} held-out samples")
        decoder = ActionDecoder(model, processor, codec)
        report["held_out"] = evaluate(decoder, processor, codec, held_out, config.seed)
        tell(summary(report["held_out"]))
    if rank == 0:
        _save(run, llava, model, processor, report)
    tell(f"result: {run}\nnext: python inference_action.py --checkpoint {run} --image IMG --instruction TEXT")


class _MixTrainer(Trainer):
    """transformers' Trainer, drawing in our order."""

    order: MixSampler
    last_loss: float | None = None

    def _get_train_sampler(self, *_: Any) -> Sampler[int]:
        return self.order

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.last_loss = logs.get("loss", self.last_loss)
        super().log(logs, *args, **kwargs)


class _Metrics(TrainerCallback):
    """Every logged line goes to metrics.jsonl and to the screen; a loss that is no number ends the run."""

    def __init__(self, run: Path) -> None:
        self._file = run / METRICS_FILE

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **_: Any,
    ) -> None:
        """Called with what the trainer has to say."""
        if not state.is_world_process_zero or "loss" not in logs:
            return
        line = {"step": state.global_step, **logs}
        with self._file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        say(
            f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.4f}  "
            f"lr {logs['learning_rate']:.2e}"
        )


def _arguments(config: RunConfig, run: Path, num_ranks: int) -> TrainingArguments:
    own = config.train
    return TrainingArguments(
        output_dir=str(run),
        max_steps=own.max_steps,
        per_device_train_batch_size=own.micro_batch,
        gradient_accumulation_steps=config.accumulation(num_ranks),
        learning_rate=own.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(own.warmup_ratio * own.max_steps),
        weight_decay=own.weight_decay,
        adam_beta2=own.adam_beta2,
        max_grad_norm=own.max_grad_norm,
        bf16=own.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        deepspeed=deepspeed_json(config, num_ranks),
        seed=config.seed,
        logging_steps=own.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
    )


def _preflight(
    config: RunConfig, model: OneViewLlava, processor: OneViewProcessor, dataset: SampleDataset, tell: Any
) -> None:
    """What must hold before step 1, said in a line each.

    Raises: UserError when a sample does not fit, nothing is supervised, or the frame does not reach the
    answer.
    """
    weights = sum(p.numel() for p in model.parameters())
    size = processor.image_processor.size["height"]
    tokens = processor.num_image_tokens + 1
    tell(f"model: {weights / 1e6:.2f} M weights; a frame is one {size}x{size} view of {tokens} tokens")
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    own = config.train
    accumulation = config.accumulation(num_ranks)
    tell(
        f"batch: {own.global_batch} = micro {own.micro_batch} x accumulate {accumulation} x ranks {num_ranks}"
    )
    probe = list(range(0, len(dataset), max(1, len(dataset) // 256)))
    tell(f"data: {len(dataset):,} samples; {check_lengths(dataset, probe, own.max_length)}")
    batch = collate([dataset[0]], processor)
    tell(f"first sample: {first_batch_text(batch, processor)}")
    change = _frame_effect(model, batch)
    if change == 0:
        raise UserError("a black and a white frame give the same logits: the model does not see its frames")
    tell(f"a black and a white frame change the logits by up to {change:.2g}")


def _frame_effect(model: OneViewLlava, batch: dict[str, torch.Tensor]) -> float:
    """The largest difference in logits between a black and a white frame."""
    model.eval()
    with torch.no_grad():
        black, white = (
            model(batch["input_ids"], torch.full_like(batch["pixel_values"], value)).logits
            for value in (-1.0, 1.0)
        )
    model.train()
    return float((black - white).abs().max())


def _save(
    run: Path, llava: Path, model: OneViewLlava, processor: OneViewProcessor, report: dict[str, Any]
) -> None:
    """Put the model into the run's folder, config.json last: with it the folder is a checkpoint."""
    scratch = run / ".saving"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    save_checkpoint(scratch, model, processor)
    shutil.copy(llava / CODEC_FILE, scratch / CODEC_FILE)
    shutil.copy(llava / MANIFEST_FILE, scratch / f"data_{MANIFEST_FILE}")
    write_json(scratch / REPORT_FILE, report)
    for file in sorted(scratch.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(run / file.name)
    scratch.rmdir()


def _silent(_: str) -> None:
    pass


def main() -> None:
    """The entry point of each rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--llava", type=Path, required=True)
    parser.add_argument("--into", type=Path, required=True)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        train(load_config(args.config), args.llava, args.into)
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            write_json(args.into / ".error.json", {"error": str(error)})
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
