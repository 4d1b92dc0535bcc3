"""The arithmetic of batches and steps: global = micro x accumulate x ranks, each with its one source."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from oxe_mix.errors import UserError
from train_llava.config import RunConfig


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How many samples an optimizer step takes, and how they are shared out."""

    micro: int  # samples per rank and forward pass
    accumulate: int  # forward passes per optimizer step and rank
    num_ranks: int
    accumulate_is_given: bool

    @property
    def samples(self) -> int:
        """Samples of an optimizer step, over all ranks."""
        return self.micro * self.accumulate * self.num_ranks

    def __str__(self) -> str:
        """The product, with where each factor comes from."""
        whole, passes = ("worked out", "train.accumulate")
        if not self.accumulate_is_given:
            whole, passes = "train.global_batch", "worked out"
        return (
            f"{self.samples} ({whole}) = {self.micro} (train.micro_batch) "
            f"x {self.accumulate} ({passes}) x {self.num_ranks} ranks (NPROC x NNODES)"
        )


def plan_batch(config: RunConfig, num_ranks: int) -> BatchPlan:
    """Raises: UserError when the product does not come out."""
    if num_ranks < 1:
        raise UserError(f"NPROC is {num_ranks}; at least one process must train")
    own = config.train
    if own.accumulate is not None:
        return BatchPlan(own.micro_batch, own.accumulate, num_ranks, accumulate_is_given=True)
    assert own.global_batch is not None
    per_pass = own.micro_batch * num_ranks
    if own.global_batch % per_pass:
        raise UserError(
            f"train.global_batch {own.global_batch} is no multiple of train.micro_batch "
            f"{own.micro_batch} x {num_ranks} ranks; change one of them"
        )
    return BatchPlan(own.micro_batch, own.global_batch // per_pass, num_ranks, accumulate_is_given=False)


def num_steps(config: RunConfig, batch: BatchPlan, num_samples: int) -> int:
    """Optimizer steps of the run; of an epoch that no batch divides, the last one draws on into the next."""
    own = config.train
    if own.max_steps is not None:
        return own.max_steps
    assert own.epochs is not None
    return math.ceil(own.epochs * num_samples / batch.samples)


def deepspeed_json(config: RunConfig, batch: BatchPlan) -> dict[str, Any]:
    """DeepSpeed's own configuration: gradients and optimizer states, in stage 3 weights too, are split over
    the ranks.
    """
    own, zero = config.train, config.train.zero
    split: dict[str, Any] = {"stage": zero.stage, "overlap_comm": False, "contiguous_gradients": True}
    if zero.offload != "none":
        split["offload_optimizer"] = {"device": "cpu"}
    if zero.offload == "all":
        split["offload_param"] = {"device": "cpu"}
    if zero.stage == 3:
        split["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "train_batch_size": batch.samples,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulate,
        "gradient_clipping": own.max_grad_norm,
        "bf16": {"enabled": own.precision == "bf16"},
        "zero_optimization": split,
        # torch's AdamW: DeepSpeed's own CPU Adam would be compiled first, for nothing at this size.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
