"""What a run will take of each GPU's memory, worked out from shapes alone, before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlavaOnevisionConfig

from oxe_mix.text import size
from train_llava.activations import Longest, kept_by_model, logits_of, peak_of_backward
from train_llava.batch import BatchPlan
from train_llava.config import ModelConfig, Part, RunConfig
from train_llava.shapes import Shapes

_MASTER_AND_MOMENTS = 12  # bytes: float32 weight, mean and variance, for each trained weight
_FP32 = 4
# 4 bits; for every 64 of them a scale of a byte; for every 256 scales one of four.
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
_BUCKET = 500_000_000  # weights whose gradients DeepSpeed collects before it reduces them: its default
_LIVE = 1_000_000_000  # weights that stage 3 holds whole at a time: its default
_CUDA = 2.5e9  # context, kernels' workspaces, NCCL, and what the allocator cannot join up
_PROCESS = 1e9  # Python, torch and DeepSpeed themselves, where there is no GPU


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes per GPU at the worst moment of a step. An estimate: kernels and allocators have their own ways.

    host: of the machine's own memory, for each GPU, where states are kept there.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    reserve: float
    host: float = 0.0
    on_gpu: bool = True

    @property
    def total(self) -> float:
        """All of a GPU's."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.logits, self.reserve)
        return sum(parts)

    def __str__(self) -> str:
        """One line: the sum, and what it is made of."""
        kind = "GPU" if self.on_gpu else "process"
        parts = ("weights", "gradients", "optimizer", "activations", "logits", "reserve")
        made_of = " + ".join(f"{part} {size(getattr(self, part))}" for part in parts)
        host = f"; and of the machine's memory {size(self.host)} per {kind}" if self.host else ""
        return f"memory per {kind}: about {size(self.total)} = {made_of}{host}"


@dataclass(frozen=True, slots=True)
class Counts:
    """Weights of a run's model, by what becomes of them."""

    whole: int  # held in the run's precision
    in_4_bits: int
    trained: int
    largest_table: int  # the largest one whose gradient is made at once

    @property
    def all(self) -> int:
        """Every weight, in whatever form."""
        return self.whole + self.in_4_bits


def shapes_of(model: ModelConfig) -> Shapes:
    """The shapes of the model that a run starts from; of its files, the config alone is read.

    Raises: UserError when there is no such model.
    """
    if model.tiny is not None:
        return Shapes.of_tiny(model.tiny)
    from train_llava.loading import read_shapes

    assert model.path is not None
    config: LlavaOnevisionConfig = read_shapes(model.path)
    return Shapes.of(config)


def counts(config: RunConfig, shapes: Shapes) -> Counts:
    """How many weights are held, in what form, and how many are trained."""
    rates, lora = config.train.learning_rates, config.model.lora
    of_part = shapes.num_weights
    trained: dict[Part, int] = {part: n if rates[part] is not None else 0 for part, n in of_part.items()}
    whole, in_4_bits = sum(of_part.values()), 0
    table = shapes.table if rates["language_model"] is not None else 0
    if lora is not None:
        added = shapes.num_adapter_weights(lora.rank)
        trained["language_model"], whole, table = added, whole + added, 0
        if lora.quantize == "nf4":
            in_4_bits = shapes.num_linear_weights
    return Counts(whole - in_4_bits, in_4_bits, sum(trained.values()), table)


def estimate(config: RunConfig, shapes: Shapes, batch: BatchPlan, longest: Longest) -> MemoryEstimate:
    """The memory that a step needs.

    Args:
        longest: the longest sample; every one of a batch is reckoned as long.
    """
    zero, of = config.train.zero, counts(config, shapes)
    each, ranks = 2 if config.train.precision == "bf16" else _FP32, batch.num_ranks
    in_weights = of.whole * each + of.in_4_bits * _NF4
    # Stages 2 and 3 split gradients and states; stage 3 splits the weights, too.
    weights = in_weights / ranks if zero.stage == 3 else in_weights
    gradients, states = of.trained * each / ranks, of.trained * _MASTER_AND_MOMENTS / ranks
    host = 0.0
    if zero.offload != "none":
        # Gradients are kept beside the states that they are for, in float32.
        host, gradients, states = states + of.trained * _FP32 / ranks, 0.0, 0.0
    if zero.offload == "all":
        host, weights = host + weights, 0.0
    activations = kept_by_model(config, shapes, batch.micro, longest) + peak_of_backward(
        config, shapes, batch.micro, longest
    )
    logits = logits_of(config, shapes, batch.micro, longest)
    if config.model.tiny is not None:
        return MemoryEstimate(weights, gradients, states, activations, logits, _PROCESS, host, on_gpu=False)
    # At the optimizer's step the activations are gone, but the gradients are there in float32.
    step = 0.0 if zero.offload != "none" else of.trained * _FP32 / ranks
    reserve = _CUDA + _BUCKET * each + of.largest_table * each + max(0.0, step - activations - logits)
    if zero.stage == 3:
        reserve += min(_LIVE, of.all) * each
    return MemoryEstimate(weights, gradients, states, activations, logits, reserve, host)


def check_fits(estimate: MemoryEstimate, device_bytes: int | None) -> str | None:
    """A warning when a run is likely to need more than a GPU has; None when not, or without a GPU."""
    if device_bytes is None or estimate.total <= device_bytes:
        return None
    return (
        f"the estimate, {size(estimate.total)}, is more than the {size(device_bytes)} of this GPU; training "
        "may end out of memory at its first steps"
    )


def oom_advice(config: RunConfig) -> str:
    """What to change in a config that ran out of a GPU's memory: at most three things, the mildest first."""
    own, zero, lora = config.train, config.train.zero, config.model.lora
    quantized = lora is not None and lora.quantize != "none"
    advice: list[str] = []
    if own.micro_batch > 1:
        advice.append(_smaller_batch(config))
    if not own.gradient_checkpointing:
        advice.append("train.gradient_checkpointing: true")
    if zero.offload == "none":
        advice.append("train.zero.offload: optimizer")
    if zero.offload != "all" and not quantized:
        advice.append("train.zero: {stage: 3, offload: all}")
    if lora is None and config.model.path is not None:
        advice.append("model.lora: {rank: 32}")
    elif lora is not None and not quantized:
        # Stage 3 cannot split weights of 4 bits.
        split = ", with train.zero: {stage: 2, offload: optimizer}" if zero.stage == 3 else ""
        advice.append(f"model.lora.quantize: nf4{split}")
    if not advice:
        return "every setting that saves memory is in use: take a smaller model, or a larger GPU"
    return f"try, in this order: {'; '.join(advice[:3])}"


def _smaller_batch(config: RunConfig) -> str:
    """Half the samples per pass in twice the passes: the step stays what it is."""
    own = config.train
    half = 1 if own.micro_batch % 2 else own.micro_batch // 2
    if own.accumulate is None:
        return f"train.micro_batch: {half}"  # global_batch stays, and the passes follow from it
    return f"train.micro_batch: {half} with train.accumulate: {own.accumulate * own.micro_batch // half}"
