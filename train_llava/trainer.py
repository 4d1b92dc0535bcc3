"""transformers' Trainer with our order of samples, our loss, a learning rate per part, and checkpoints that
are whole or absent.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from oxe_mix.errors import UserError
from train_llava import ranks
from train_llava.batch import BatchPlan, deepspeed_json
from train_llava.checkpoints import RESUME, About, Checkpoints, write_about
from train_llava.config import PARTS, Part, RunConfig
from train_llava.data import RankBatches, SampleDataset, collate
from train_llava.loss import AnswerLoss
from train_llava.metrics_log import Metrics, Window
from train_llava.model import OneViewLlava
from train_llava.processor import OneViewProcessor

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class NoLossError(UserError):
    """Training cannot go on; nothing of the step reached the weights."""


@dataclass(frozen=True, slots=True)
class Work:
    """What the trainer works with, proved before step 1."""

    config: RunConfig
    about: About  # what its checkpoints are of
    model: OneViewLlava
    processor: OneViewProcessor
    dataset: SampleDataset
    batches: RankBatches
    loss: AnswerLoss
    num_workers: int
    save: Callable[[Path, Any], None]  # the model into a folder, from DeepSpeed's engine; on every rank
    weights_only: bool  # going on, the optimizer starts anew
    keeps_nothing: bool  # no checkpoints


def part_of(name: str) -> Part:
    """The part of the model that a parameter belongs to, by its name."""
    if "vision_tower." in name:
        return "vision_tower"
    return "projector" if "multi_modal_projector." in name or "image_newline" in name else "language_model"


def freeze(model: nn.Module, config: RunConfig) -> None:
    """Leave trainable what has a learning rate; with LoRA, of the language model only what that left so."""
    for name, weight in model.named_parameters():
        part = part_of(name)
        by_lora = config.model.lora is not None and part == "language_model"
        if not by_lora:
            weight.requires_grad_(config.train.learning_rates[part] is not None)


def arguments(config: RunConfig, run: Path, batch: BatchPlan, num_steps: int) -> TrainingArguments:
    """The Trainer's own settings, each from its one place in our config."""
    own = config.train
    return TrainingArguments(
        output_dir=str(run),
        max_steps=num_steps,
        per_device_train_batch_size=batch.micro,
        gradient_accumulation_steps=batch.accumulate,
        learning_rate=max(rate for rate in own.learning_rates.values() if rate is not None),
        lr_scheduler_type=_SCHEDULES[own.schedule],
        warmup_steps=round(own.warmup_ratio * num_steps),
        max_grad_norm=own.max_grad_norm,
        bf16=own.precision == "bf16",
        gradient_checkpointing=own.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=not torch.cuda.is_available(),
        deepspeed=deepspeed_json(config, batch),
        seed=config.seed,
        logging_steps=config.logging.every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.checkpoints.every,
        report_to=list(config.logging.to),
        run_name=config.name,
        disable_tqdm=True,
        remove_unused_columns=False,
    )


class MixTrainer(Trainer):
    """What differs from the Trainer, and nothing else."""

    def __init__(
        self, work: Work, checkpoints: Checkpoints, args: TrainingArguments, metrics: Metrics
    ) -> None:
        self.work, self.checkpoints, self._metrics = work, checkpoints, metrics
        self._window = Window(time.monotonic())
        self._finite = torch.tensor(True)
        self._groups: list[Part] = []
        self.last_loss = math.nan
        self.best: float | None = None  # held-out L1 of this step, when it is the best so far
        super().__init__(
            model=work.model,
            args=args,
            train_dataset=work.dataset,
            data_collator=partial(collate, processor=work.processor),
        )

    @property
    def _keeps_frozen(self) -> bool:
        """Whether a resume point has frozen weights too; of adapters they would be most of it."""
        return self.work.config.model.lora is None

    @property
    def engine(self) -> Any:
        """DeepSpeed's, which wraps the model once training has begun."""
        return self.model_wrapped

    def zero_stage(self) -> int:
        """As DeepSpeed itself reports it."""
        return int(self.engine.zero_optimization_stage())

    def optimizer_bytes(self) -> dict[str, int]:
        """What DeepSpeed holds of AdamW's two moments on this rank, and what they would be unsplit."""
        states: Any = self.engine.optimizer.optimizer.state.values()
        moments = [value for state in states for value in state.values() if torch.is_tensor(value)]
        here = sum(value.nbytes for value in moments if value.dim())
        trained = sum(weight.numel() for weight in self.work.model.parameters() if weight.requires_grad)
        return {"this_rank": here, "unsplit": 2 * 4 * trained}

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's micro batches over the whole run; the Trainer leaves out those of the steps done."""
        workers = self.work.num_workers
        return DataLoader(
            self.work.dataset,
            batch_sampler=self.work.batches,
            collate_fn=self.data_collator,
            num_workers=workers,
            worker_init_fn=_leave_to_the_rank,
            prefetch_factor=4 if workers else None,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate for each part; biases, norms and the newline do not decay."""
        if self.optimizer is not None:  # the Trainer asks twice
            return self.optimizer
        own, groups = self.work.config.train, []
        decaying = set(self.get_decay_parameter_names(self.work.model))
        for part in PARTS:
            named = [
                (n, w)
                for n, w in self.work.model.named_parameters()
                if w.requires_grad and part_of(n) == part
            ]
            for decays in (True, False):
                if weights := [w for n, w in named if (n in decaying) == decays]:
                    decay = own.weight_decay if decays else 0.0
                    groups.append({"params": weights, "lr": own.learning_rates[part], "weight_decay": decay})
                    self._groups.append(part)
        self.optimizer = torch.optim.AdamW(
            groups, betas=(0.9, own.adam_beta2), fused=torch.cuda.is_available() or None
        )
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """A step's micro batches and how many tokens all ranks supervise in them.

        Raises: UserError for a sample that cannot be had.
        """
        start = time.monotonic()
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        for batch in batches:
            if "error" in batch:
                raise UserError(batch["error"])
        self._window.waited(time.monotonic() - start)
        tokens = sum(int(batch["input_ids"].numel()) for batch in batches)
        self._window.took(self.work.about.global_batch, tokens * ranks.num_ranks())
        count = torch.tensor(sum(len(batch["targets"]) for batch in batches), device=device)
        return batches, self.accelerator.gather(count).sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro batch's share of the step's mean loss over all ranks' supervised tokens.

        Raises: NoLossError before the step reaches the weights.
        """
        targets, dimensions = inputs.pop("targets"), inputs.pop("dimensions")
        outputs = model(**inputs)
        total = self.work.loss(outputs.logits, targets, dimensions)
        # DeepSpeed takes the mean over the ranks.
        loss = total * ranks.num_ranks() / num_items_in_batch
        # One look at a step's end: each would have the GPU wait for the CPU.
        self._finite = self._finite.to(loss.device) & torch.isfinite(loss.detach())
        if self.accelerator.sync_gradients and not self._finite:
            raise NoLossError(
                f"the loss is no number at step {self.state.global_step + 1}; the weights are those of step "
                f"{self.state.global_step}; lower train.learning_rates, or look at the data of that step"
            )
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Every logged line goes to metrics.jsonl and to the screen, too."""
        if "loss" in logs:
            assert self.lr_scheduler is not None
            self.last_loss = logs["loss"]
            base: list[Any] = self.lr_scheduler.base_lrs
            # The step's own, where the scheduler has gone on to the next: the Trainer kept the first group's.
            scale = logs["learning_rate"] / base[0]
            rates = {part: rate * scale for part, rate in zip(self._groups, base, strict=True)}
            line = {"loss": logs["loss"], "grad_norm": logs["grad_norm"], "learning_rate": rates}
            self._metrics.trained(self.state.global_step, line | self._window.figures(time.monotonic()))
            self._window = Window(time.monotonic())
            logs |= {f"learning_rate/{part}": rate for part, rate in rates.items()}
        super().log(logs, start_time)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        """The Trainer would insist on all weights in a resume point; frozen ones are not in ours."""
        buffers = {name: buffer.clone() for name, buffer in self.work.model.named_buffers()}
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        # DeepSpeed turns all to bf16, the frequencies of the rotary embedding too, which a loaded model has
        # in fp32: the model that was trained would not be the one that acts.
        for name, buffer in self.work.model.named_buffers():
            buffer.data = buffers[name].to(buffer.device)
        if resume_from_checkpoint is None:
            return prepared
        if not self.work.weights_only:
            self.engine.load_checkpoint(str(resume_from_checkpoint), load_module_strict=self._keeps_frozen)
        self._load_optimizer_and_scheduler(str(resume_from_checkpoint))
        assert self.lr_scheduler is not None
        assert self.optimizer is not None
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        return prepared

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint under a temporary name, by all ranks together; then it gets its own."""
        del model, trial
        if self.work.keeps_nothing:
            return
        step = self.state.global_step
        partial_folder = self.checkpoints.partial(step)
        resume = partial_folder / RESUME
        if ranks.rank() == 0:
            self.checkpoints.clean()
            resume.mkdir(parents=True)
        ranks.wait()
        self.work.save(partial_folder, self.engine)
        self.engine.save_checkpoint(str(resume), exclude_frozen_parameters=not self._keeps_frozen)
        self._save_rng_state(str(resume))
        if ranks.rank() == 0:
            torch.save(self.lr_scheduler.state_dict(), resume / "scheduler.pt")  # type: ignore[union-attr]
            self.state.log_history = []  # metrics.jsonl has it
            self.state.save_to_json(str(resume / "trainer_state.json"))
            write_about(partial_folder, self.work.about.model_copy(update={"step": step}))
        ranks.wait()
        if ranks.rank() == 0:
            self.checkpoints.publish(step, self.best)
        ranks.wait()
        self.best = None


def _leave_to_the_rank(_: int) -> None:
    """In a worker: SIGTERM goes to the rank's whole group, and the rank needs its data until it has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def compile_layers(model: OneViewLlava) -> None:
    """Compile layer by layer, in place: names of weights stay, and one layer's code serves all."""
    layers: Iterable[Any] = (*model.model.vision_tower.encoder.layers, *model.model.language_model.layers)
    for layer in layers:
        layer.compile()
