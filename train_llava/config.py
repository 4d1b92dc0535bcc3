"""One file per run. Every number of a training run has its one source here; DeepSpeed's JSON is made from
it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from oxe_mix.cards import FolderName
from oxe_mix.errors import UserError, did_you_mean
from oxe_mix.yaml_files import load_yaml

# Files of a run that the launcher and the ranks both know.
METRICS_FILE, ERROR_FILE, REHEARSAL = "metrics.jsonl", ".error.json", ".rehearsal-"

Positive = Annotated[int, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TinyModel(_Strict):
    """A LLaVA-OneVision of random weights and a tokenizer trained on the questions themselves, for CPUs and
    tests.
    """

    image_size: Positive = 64
    patch_size: Positive = 16
    hidden_size: Positive = 96
    vision_layers: Positive = 2
    text_layers: Positive = 3
    heads: Positive = 4
    vocabulary: Positive = 512  # of the base tokenizer, before the action tokens


class ModelConfig(_Strict):
    """Where training starts: a folder or hub id in transformers' LLaVA-OneVision format, or a tiny random
    model.
    """

    path: str | None = None
    tiny: TinyModel | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> ModelConfig:
        if (self.path is None) == (self.tiny is None):
            raise ValueError("give either path (a folder or hub id) or tiny")
        return self


class TrainConfig(_Strict):
    """How long, in what steps, and on what schedule."""

    max_steps: Positive
    global_batch: Positive  # samples per optimizer step, over all ranks: the same run whatever NPROC is
    micro_batch: Positive  # samples per rank and forward pass
    learning_rate: Annotated[float, Field(gt=0)]
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["fp32", "bf16"] = "bf16"
    max_length: Positive = 2048  # tokens of a sample, frames included; a longer one is refused before step 1
    logging_steps: Positive = 50
    cache_frames: bool = False  # keep decoded frames in memory at model size: for small data only


class RunConfig(_Strict):
    """A whole run."""

    name: FolderName
    seed: int = 0
    model: ModelConfig
    train: TrainConfig

    def accumulation(self, num_ranks: int) -> int:
        """Micro batches per optimizer step and rank. Raises: UserError when the product does not come out."""
        if num_ranks < 1:
            raise UserError(f"NPROC is {num_ranks}; at least one process must train")
        per_pass = self.train.micro_batch * num_ranks
        if self.train.global_batch % per_pass:
            raise UserError(
                f"train.global_batch {self.train.global_batch} is no multiple of train.micro_batch "
                f"{self.train.micro_batch} x {num_ranks} ranks; change one of them"
            )
        return self.train.global_batch // per_pass


def load_config(file: Path) -> RunConfig:
    """Read a run's config. Raises: UserError, one line per problem."""
    raw = load_yaml(file)
    if not isinstance(raw, dict):
        raise UserError(f"{file}: a config is a mapping with name, model and train")
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(
            "\n".join(f"{file}: {_in_our_words(problem)}" for problem in error.errors())
        ) from error


def _in_our_words(problem: Any) -> str:
    place = ".".join(map(str, problem["loc"])) or "config"
    if problem["type"] == "extra_forbidden":
        parts = (RunConfig, ModelConfig, TinyModel, TrainConfig)
        known = [name for part in parts for name in part.model_fields]
        return f"{place}: unknown key{did_you_mean(str(problem['loc'][-1]), known)}"
    return f"{place}: {problem['msg'].removeprefix('Value error, ').lower()}"


def deepspeed_json(config: RunConfig, num_ranks: int) -> dict[str, Any]:
    """DeepSpeed's own configuration: ZeRO stage 2, gradients and optimizer states split over the ranks."""
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.accumulation(num_ranks),
        "gradient_clipping": config.train.max_grad_norm,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "zero_optimization": {"stage": 2, "overlap_comm": False, "contiguous_gradients": True},
        # torch's AdamW: DeepSpeed's own CPU Adam would be compiled first, for nothing at this size.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
