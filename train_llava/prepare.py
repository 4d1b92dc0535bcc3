"""Data and model of a run, loaded and proved to fit each other before step 1."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from convert.action_codec import ActionCodec
from oxe_mix.errors import UserError
from oxe_mix.text import count, warn
from train_llava import ranks
from train_llava.action_tokens import prove_action_tokens
from train_llava.activations import Longest
from train_llava.batch import BatchPlan, num_steps, plan_batch
from train_llava.checkpoints import About, Checkpoints, check_same_run
from train_llava.config import RunConfig, load_config
from train_llava.data import SampleDataset
from train_llava.loading import DTYPES, load_checkpoint, load_or_build
from train_llava.memory import check_fits, estimate, shapes_of
from train_llava.model import OneViewLlava
from train_llava.preflight import check_lengths, check_sight, first_batch, in_words, rehearse_save
from train_llava.processor import OneViewProcessor
from train_llava.result import save_weights, write_origin
from train_llava.slots import slot_ids
from train_llava.sources import TrainingData, open_data
from train_llava.trainer import freeze

# Questions that a tiny model's tokenizer is trained on, spread over the data: enough to meet every word.
_TOKENIZER_SAMPLES = 2000
_OVERFIT_STEPS = 200
_WORDS = 64  # of a prompt, for the estimate of memory; 41 with the usual instruction


@dataclass(frozen=True, slots=True)
class Options:
    """What the command asks for."""

    config: Path
    llava: Path
    run: Path
    check_only: bool = False
    overfit_batch: bool = False
    weights_only: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that a run needs, proved before step 1."""

    options: Options
    config: RunConfig
    data: TrainingData
    batch: BatchPlan
    num_steps: int
    goes_on: Path | None  # the checkpoint
    about: About  # what the run's checkpoints are of
    model: OneViewLlava
    processor: OneViewProcessor
    dataset: SampleDataset

    def save(self, folder: Path, engine: Any = None) -> None:
        """The model with all that it acts with; called on every rank."""
        save_weights(folder, self.model, self.processor, self.config, engine)
        if ranks.rank() == 0:
            write_origin(folder, self.config, self.data.codec, self.data.folders)
        ranks.wait()


def prepare(options: Options) -> Prepared:
    """Load data and model, and prove that they fit each other.

    Raises: UserError for what the user can mend.
    """
    config = load_config(options.config)
    _prove_loggers(config)
    set_seed(config.seed)
    batch = plan_batch(config, ranks.num_ranks())
    with ranks.first_rank_first():
        data = open_data(config.data, options.llava, config.seed)
    steps = num_steps(config, batch, len(data.order))
    if options.overfit_batch:
        batch = dataclasses.replace(batch, accumulate=1, accumulate_is_given=True)
        steps = min(steps, _OVERFIT_STEPS)
    ranks.tell(f"an epoch is {count(len(data.order), 'draw')}: {_shares(data)}")
    about = About(
        step=0,
        config=config.model_dump(mode="json"),
        data=data.fingerprint,
        num_ranks=batch.num_ranks,
        global_batch=batch.samples,
        num_steps=steps,
    )
    goes_on = _to_go_on_from(options, config)
    if goes_on is not None:
        then = check_same_run(goes_on, about, weights_only=options.weights_only)
        ranks.tell(f"going on from {goes_on}, step {then.step:,} of {steps:,}")
    _tell_memory(config, batch, data.codec)
    model, processor = _model(options, config, data, goes_on)
    change = None if options.overfit_batch else config.data.augment
    dataset = SampleDataset(data, processor, cache=config.data.cache_frames, change=change, seed=config.seed)
    prepared = Prepared(options, config, data, batch, steps, goes_on, about, model, processor, dataset)
    _prove(prepared)
    return prepared


def _prove_loggers(config: RunConfig) -> None:
    for name in config.logging.to:
        if find_spec(name) is None:
            raise UserError(f"logging.to: {name} is not installed; pip install 'oxe-mix[logging]'")


def _shares(data: TrainingData) -> str:
    return ", ".join(f"{name} {draws / len(data.order):.1%}" for name, draws in data.order.draws.items())


def _to_go_on_from(options: Options, config: RunConfig) -> Path | None:
    if options.overfit_batch:
        return None
    found = Checkpoints(options.run, config.checkpoints.keep).latest()
    if options.weights_only and found is None:
        raise UserError(f"{options.run}: holds no checkpoint whose weights could be taken")
    return found


def _model(
    options: Options, config: RunConfig, data: TrainingData, goes_on: Path | None
) -> tuple[OneViewLlava, OneViewProcessor]:
    """What training starts from, on this rank's device, with what is not trained frozen."""
    lora, weights_from = config.model.lora, goes_on if options.weights_only else None
    if weights_from is not None and lora is None:
        model, processor = load_checkpoint(weights_from, dtype=DTYPES[config.train.precision])
    else:
        questions = data.questions(_TOKENIZER_SAMPLES) if config.model.tiny is not None else []
        model, processor, tokens = load_or_build(
            config.model, questions, config.seed, config.train.precision, _num_slots(config, data.codec)
        )
        ranks.tell(str(tokens))
    if lora is not None:
        from train_llava.lora import add_lora, load_adapter

        add_lora(model, config.model, processor.tokenizer)
        if weights_from is not None:
            load_adapter(weights_from, model)
    freeze(model, config)
    if config.train.zero.stage == 2:
        torch.nn.Module.to(model, ranks.device())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    everything = sum(weight.numel() for weight in model.parameters())
    ranks.tell(f"model: {everything / 1e6:,.2f} M weights, {trained / 1e6:,.2f} M trained")
    return model, processor


def _num_slots(config: RunConfig, codec: ActionCodec) -> int:
    return codec.tokens_per_answer if config.train.parallel_action_slots else 0


def _tell_memory(config: RunConfig, batch: BatchPlan, codec: ActionCodec) -> None:
    """The estimate, before a weight is loaded: of samples with as many frames as the codec's prompt has."""
    shapes = shapes_of(config.model)
    cameras = len(codec.asking.cameras)
    tokens = min(
        cameras * (shapes.vision.num_patches + 1) + _WORDS + codec.tokens_per_answer, config.train.max_length
    )
    if config.model.image_mode == "anyres_max_9":
        tokens = config.train.max_length
    longest = Longest(tokens, patches=cameras, answer=codec.tokens_per_answer + 1)
    guess = estimate(config, shapes, batch, longest)
    ranks.tell(f"{guess}, for samples of {tokens:,} tokens")
    there = None
    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties(ranks.device()).total_memory
    if (warning := check_fits(guess, there)) is not None and ranks.rank() == 0:
        warn(warning)


def _prove(prepared: Prepared) -> None:
    """What must hold before step 1, said line by line. Raises: UserError for what does not."""
    model, processor, dataset, config = (
        prepared.model,
        prepared.processor,
        prepared.dataset,
        prepared.config,
    )
    prove_action_tokens(processor.tokenizer)
    if len(slot_ids(processor.tokenizer)) != _num_slots(config, prepared.data.codec):
        raise UserError("train.parallel_action_slots: the weights are of a run that had it otherwise")
    ranks.tell("tokens: 256 action tokens, each a single id that survives encoding alone and side by side")
    ranks.tell(check_lengths(dataset, config.train.max_length))
    samples = first_batch(dataset, prepared.batch.micro)
    ranks.tell(f"first of {count(len(samples), 'sample')}: {in_words(samples[0], processor)}")
    ranks.tell(check_sight(model, processor, samples))
    if ranks.rank() == 0:

        def save_and_load(folder: Path) -> OneViewLlava:
            save_weights(folder, model, processor, config)
            return load_checkpoint(folder, dtype=DTYPES[config.train.precision])[0]

        ranks.tell(rehearse_save(model, processor, samples, prepared.options.run, save_and_load))
    ranks.wait()
