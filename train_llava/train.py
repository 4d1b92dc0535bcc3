"""One training run, top to bottom, as each rank executes it. Started by `make train` through
`train_llava.launch`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import dataclass
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

from convert.action_codec import CODEC_FILE, ActionCodec, read_codec
from convert.manifest import MANIFEST_FILE
from convert.reader import ConversationReader
from oxe_mix.errors import UserError
from oxe_mix.files import write_json
from oxe_mix.text import say
from train_llava.config import ERROR_FILE, METRICS_FILE, RunConfig, deepspeed_json, load_config
from train_llava.data import MixSampler, SampleDataset, collate
from train_llava.decode import ActionDecoder
from train_llava.evaluate import evaluate
from train_llava.metrics import summary
from train_llava.model import OneViewLlava, load_or_build, save_checkpoint
from train_llava.preflight import preflight, rehearse_save
from train_llava.processor import OneViewProcessor

REPORT_FILE = "evaluation.json"
# Questions that a tiny model's tokenizer is trained on, spread over the data: enough to meet every word.
_TOKENIZER_SAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that a run needs, proved before step 1."""

    config: RunConfig
    llava: Path
    codec: ActionCodec
    reader: ConversationReader
    model: OneViewLlava
    processor: OneViewProcessor
    dataset: SampleDataset


def prepare(config: RunConfig, llava: Path) -> Prepared:
    """Load data and model, and prove that they fit each other; every rank comes to the same result.

    Raises: UserError for what the user can mend.
    """
    set_seed(config.seed)
    codec, reader = read_codec(llava), ConversationReader(llava, "train")
    spread = range(0, len(reader), max(1, len(reader) // _TOKENIZER_SAMPLES))
    model, processor = load_or_build(config.model, [reader[i].question for i in spread], config.seed)
    dataset = SampleDataset(reader, processor, cache=config.train.cache_frames)
    for line in preflight(config, model, processor, dataset, _world_size()):
        _tell(line)
    return Prepared(config, llava, codec, reader, model, processor, dataset)


def train(prepared: Prepared, run: Path) -> None:
    """Train, evaluate, and leave the model in `run` with its codec, its metrics and its report.

    Raises: UserError for a sample that cannot be read, and for a loss that is no number.
    """
    config, reader = prepared.config, prepared.reader
    if _rank() == 0:
        # One rank is enough; the others wait for it at their first common step.
        first = collate([prepared.dataset[0]], prepared.processor)
        rehearse_save(prepared.model, prepared.processor, run, first)
        _tell("a checkpoint that is saved and loaded again gives the same logits")
    trainer = _MixTrainer(
        model=prepared.model,
        args=_arguments(config, run, _world_size()),
        train_dataset=prepared.dataset,
        data_collator=partial(collate, processor=prepared.processor),
        callbacks=[_Metrics(run)],
    )
    trainer.order = MixSampler(reader.ranges, reader.weights, config.seed)
    trainer.remove_callback(PrinterCallback)
    start = time.monotonic()
    result = trainer.train()
    seconds = time.monotonic() - start
    _tell(f"trained {config.train.max_steps:,} steps of {config.train.global_batch} in {seconds:.0f} s")

    report: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "ranks": _world_size(),
        "zero_stage": _zero_stage(trainer.model_wrapped),
        "train_seconds": round(seconds, 1),
        "samples": len(reader),
        "mean_loss": result.training_loss,
        "final_loss": trainer.last_loss,
    }
    if _rank() == 0:
        # Saved before it is scored: whatever happens there, the trained model is on disk.
        _save(run, prepared)
    report["held_out"] = _held_out(prepared)
    if _rank() == 0:
        write_json(run / REPORT_FILE, report)
    _tell(
        f"result: {run}\nnext: python inference_action.py --checkpoint {run} --image IMG --instruction TEXT"
    )


def _held_out(prepared: Prepared) -> dict[str, Any] | None:
    """The scores on held-out episodes, None when the data holds none."""
    reader = ConversationReader(prepared.llava, "val")
    if len(reader) == 0:
        return None
    _tell(f"evaluating on {len(reader):,} held-out samples")
    decoder = ActionDecoder(prepared.model, prepared.processor, prepared.codec)
    report = evaluate(decoder, prepared.processor, prepared.codec, reader, prepared.config.seed)
    _tell(summary(report))
    return report


class _MixTrainer(Trainer):
    """transformers' Trainer, drawing in our order."""

    order: MixSampler
    last_loss: float | None = None

    def _get_train_sampler(self, *_: Any) -> Sampler[int]:
        return self.order

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own loss; one that is no number stops the run before it reaches the weights."""
        out = super().compute_loss(*args, **kwargs)
        loss = out[0] if isinstance(out, tuple) else out
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {self.state.global_step}; lower train.learning_rate"
            )
        return out

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.last_loss = logs.get("loss", self.last_loss)
        super().log(logs, *args, **kwargs)


class _Metrics(TrainerCallback):
    """Every logged line goes to metrics.jsonl and to the screen."""

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


def _save(run: Path, prepared: Prepared) -> None:
    """Put the model into the run's folder, config.json last: with it the folder is a checkpoint."""
    scratch = run / ".saving"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    save_checkpoint(scratch, prepared.model, prepared.processor)
    shutil.copy(prepared.llava / CODEC_FILE, scratch / CODEC_FILE)
    shutil.copy(prepared.llava / MANIFEST_FILE, scratch / f"data_{MANIFEST_FILE}")
    for file in sorted(scratch.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(run / file.name)
    scratch.rmdir()


def _zero_stage(engine: Any) -> int:
    """As DeepSpeed itself reports it."""
    return int(engine.zero_optimization_stage())


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _tell(text: str) -> None:
    """Said once, by the first rank."""
    if _rank() == 0:
        say(text)


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
        prepared = prepare(load_config(args.config), args.llava)
    except UserError as error:
        # All ranks come to this alike and end in peace; the launcher reads the note and exits 2.
        write_json(args.into / ERROR_FILE, {"error": str(error)})
        return
    try:
        train(prepared, args.into)
    except UserError as error:
        # Perhaps only this rank: exit 1, so that the others, which wait for it, are ended too.
        write_json(args.into / ERROR_FILE, {"error": str(error)})
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
