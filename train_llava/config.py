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
from train_llava.augment import Augment

# Files of a run that the launcher and the ranks both know.
METRICS_FILE, OVERFIT_FILE, CHECKPOINTS = "metrics.jsonl", "overfit.jsonl", "checkpoints"
CARD_FILE = "README.md"  # the last that a run writes
ERROR_FILE, STOPPED_FILE, REHEARSAL = ".error.json", ".stopped.json", ".rehearsal-"

Precision = Literal["fp32", "bf16"]
Bits = Literal["4bit", "8bit"]  # of weights that are loaded smaller than they lie
ImageMode = Literal["single", "pad", "anyres_max_9"]
Part = Literal["vision_tower", "projector", "language_model"]
PARTS: tuple[Part, ...] = ("vision_tower", "projector", "language_model")
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a model that can act: a whole one, or adapters; each file is the last of its
    kind to be written.
    """
    return any((folder / name).exists() for name in ("config.json", "adapter_config.json"))


def refuse_unended(checkpoint: Path) -> None:
    """Raises: UserError for the folder of a run that has not ended; its own checkpoints can act."""
    steps = sorted((checkpoint / CHECKPOINTS).glob("step-*"), key=lambda step: (len(step.name), step.name))
    if steps and not holds_model(checkpoint):
        raise UserError(f"{checkpoint}: the run has not ended; give one of its checkpoints, as {steps[-1]}")


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


class LoraConfig(_Strict):
    """Low-rank adapters in the language model's linear layers, beside the new tokens' rows of embedding and
    head; what they adapt stays as it is.
    """

    rank: Positive = 32
    alpha: Rate = 64.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    quantize: Literal["none", "nf4"] = "none"  # nf4: the frozen language model in 4 bits (QLoRA)


class ModelConfig(_Strict):
    """What is trained, and from where: a folder or hub id (transformers' or LLaVA-NeXT's layout), or a tiny
    random model.
    """

    path: str | None = None
    tiny: TinyModel | None = None
    image_mode: ImageMode = "single"
    lora: LoraConfig | None = None
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"

    @model_validator(mode="after")
    def _one_of_both(self) -> ModelConfig:
        if (self.path is None) == (self.tiny is None):
            raise ValueError("give either path (a folder or hub id) or tiny")
        if self.tiny is not None and self.lora is not None:
            raise ValueError("lora adapts a model that is somewhere, but tiny makes a new one; give path")
        return self


class SourceConfig(_Strict):
    """More data beside the converted folder that the command names."""

    name: FolderName
    path: Path  # a converted folder, or LLaVA data: .json, .jsonl, or a .yaml that lists such files
    images: Path | None = None  # of LLaVA data: the folder below which its images lie
    weight: Annotated[float, Field(ge=0)] = 1.0


class DataConfig(_Strict):
    """What is mixed into one stream. P(source) is proportional to its weight x its samples."""

    weight: Annotated[float, Field(ge=0)] = 1.0  # of the converted folder, times each dataset's own
    sources: tuple[SourceConfig, ...] = ()
    augment: Augment | None = None  # of training frames; OpenVLA's strengths when written {}
    workers: Annotated[int, Field(ge=0)] | None = None  # processes per rank that decode; None: by the cores
    cache_frames: bool = False  # keep decoded frames in memory at model size: for small data only

    @model_validator(mode="after")
    def _cached_frames_are_final(self) -> DataConfig:
        if self.cache_frames and (self.augment is not None or self.workers):
            raise ValueError("cache_frames keeps frames as they are, in one process: no augment, no workers")
        if len({source.name for source in self.sources}) < len(self.sources):
            raise ValueError("two sources have the same name")
        return self


class LossConfig(_Strict):
    """Beyond cross-entropy on the answer."""

    neighbour_sigma: Annotated[float, Field(ge=0)] = 0.0  # bins; above 0 near bins count as nearly right
    dimension_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None  # one per action dimension


class ZeroConfig(_Strict):
    """How DeepSpeed splits the training state over the ranks."""

    stage: Literal[2, 3] = 2
    offload: Literal["none", "optimizer", "all"] = "none"  # to the CPU; all: stage 3's weights too

    @model_validator(mode="after")
    def _fits(self) -> ZeroConfig:
        if self.offload == "all" and self.stage != 3:
            raise ValueError("offload: all moves weights, which only stage 3 splits; use offload: optimizer")
        return self


class TrainConfig(_Strict):
    """How long, in what steps, and on what schedule."""

    epochs: Rate | None = None  # passes of as many draws as there are samples
    max_steps: Positive | None = None
    global_batch: Positive | None = None  # samples per optimizer step over all ranks, whatever their number
    accumulate: Positive | None = None  # or: forward passes per optimizer step and rank
    micro_batch: Positive  # samples per rank and forward pass
    # Of each part, null where it is frozen. With lora, language_model's is that of adapters and new rows.
    learning_rates: dict[Part, Rate | None]
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    max_grad_norm: Rate = 1.0
    precision: Precision = "bf16"
    gradient_checkpointing: bool = False
    parallel_action_slots: bool = False  # one pass answers all tokens of a chunk, without an order among them
    compile: bool = False  # the layers of vision tower and language model, by torch.compile
    max_length: Positive = 2048  # tokens of a sample, frames included; a longer one is refused before step 1
    zero: ZeroConfig = ZeroConfig()
    loss: LossConfig = LossConfig()

    @model_validator(mode="after")
    def _says_each_thing_once(self) -> TrainConfig:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give either epochs or max_steps")
        if (self.global_batch is None) == (self.accumulate is None):
            raise ValueError("give either global_batch or accumulate")
        if set(self.learning_rates) != set(PARTS):
            raise ValueError(f"learning_rates: give each of {', '.join(PARTS)}; null freezes a part")
        if not any(self.learning_rates.values()):
            raise ValueError("learning_rates: all parts are frozen; nothing would be trained")
        return self


class CheckpointConfig(_Strict):
    """What is kept while the run goes on."""

    every: Positive = 500  # steps
    keep: Positive = 2  # the last so many; the best one beside them


class EvaluationConfig(_Strict):
    """On held-out episodes of the converted folder, if it has any."""

    every: Positive | None = None  # steps; None: only at the end. The checkpoint of the best one is kept.
    samples: Positive = 512  # of the held-out ones, evenly spread, while training goes on
    final_samples: Positive = 10_000  # and at its end, at most


class LoggingConfig(_Strict):
    """metrics.jsonl is always written."""

    every: Positive = 10  # steps
    to: tuple[Literal["tensorboard", "wandb"], ...] = ()


class RunConfig(_Strict):
    """A whole run."""

    name: FolderName
    seed: Annotated[int, Field(ge=0)] = 0
    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        lora, rates = self.model.lora, self.train.learning_rates
        if self.train.parallel_action_slots and self.model.attention == "flash_attention_2":
            raise ValueError("train.parallel_action_slots needs a mask that flash-attn has not; take sdpa")
        if lora is not None and rates["language_model"] is None:
            raise ValueError("model.lora trains the language model, but its learning rate is null")
        if lora is not None and lora.quantize != "none" and self.train.zero.stage == 3:
            raise ValueError("model.lora.quantize goes with zero stage 2: stage 3 cannot split 4-bit weights")
        return self


def load_config(file: Path) -> RunConfig:
    """Read a run's config; its own paths are relative to the working folder.

    Raises: UserError, one line per problem.
    """
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
        parts = _Strict.__subclasses__()
        known = [name for part in parts for name in part.model_fields]
        return f"{place}: unknown key{did_you_mean(str(problem['loc'][-1]), known)}"
    return f"{place}: {problem['msg'].removeprefix('Value error, ')}"
