"""`oxe-mix eval`: how well a checkpoint answers the samples of any converted folder."""

from __future__ import annotations

import hashlib
import re
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from convert.action_codec import CODEC_FILE, ActionCodec, read_codec
from convert.manifest import MANIFEST_FILE, Manifest, read_manifest
from convert.reader import ConversationReader
from oxe_mix import __version__
from oxe_mix.errors import UserError, did_you_mean
from oxe_mix.files import prove_writable, read_json, read_model, write_json
from oxe_mix.text import count, say, warn
from train_llava.config import CHECKPOINTS, RunConfig, load_config, refuse_unended
from train_llava.recorded import other_statistics, refuse_other_dataset, refuse_other_tokens

if TYPE_CHECKING:
    from train_llava.model import OneViewLlava
    from train_llava.processor import OneViewProcessor

_PARTS = {"val": "held-out sample", "train": "training sample"}


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """What a user asked for."""

    checkpoint: Path
    data: Path
    part: str
    samples: int | None
    batch: int
    device: str | None
    out: Path | None
    only: tuple[str, ...]
    unnorm_keys: tuple[str, ...]  # NAME=KEY each


@dataclass(frozen=True, slots=True)
class _Task:
    """What was asked for, proved to fit together."""

    options: EvalOptions
    codec: ActionCodec  # of the checkpoint
    measured: ActionCodec  # of the data
    reader: ConversationReader
    keys: dict[str, str]  # of the datasets that are scored, by their names
    out: Path
    config: RunConfig | None  # of the run that left the checkpoint

    @property
    def num_samples(self) -> int:
        """To be scored."""
        found = sum(len(self.reader.ranges[name]) for name in self.keys)
        return min(found, self.options.samples or found)


def run_eval(options: EvalOptions) -> int:
    """Score a checkpoint on a converted folder, print the figures and write them as JSON.

    Returns: the exit code.
    Raises: UserError for what the user can mend.
    """
    start = time.monotonic()
    task = _prove(options)
    unit, step = _PARTS[options.part], _step(options.checkpoint)
    named = str(options.checkpoint) if step is None else f"{options.checkpoint} (step {step:,})"
    say(
        f"{named} on {count(task.num_samples, unit)} of {count(len(task.keys), 'dataset')} "
        f"in {options.data}, batches of {options.batch}"
    )
    report = _evaluate(task)
    from train_llava.metrics import by_dataset, summary

    seconds = round(time.monotonic() - start, 1)
    write_json(task.out, _document(task, step) | {"seconds": seconds, "report": report})
    say(f"{summary(report, unit)}\n\n{by_dataset(report)}\n")
    say(f"{count(report['samples'], 'sample')} scored in {seconds} s")
    where = f"--checkpoint {shlex.quote(str(options.checkpoint))} --data {shlex.quote(str(options.data))}"
    say(f"result: {task.out}\nnext: oxe-mix replay {where} to look at an episode")
    return 0


def _prove(options: EvalOptions) -> _Task:
    """Before the weights are read: do checkpoint, data and options go together?"""
    if options.part not in _PARTS:
        raise UserError(f"--part {options.part}: give val (held-out samples) or train")
    folder = options.checkpoint
    refuse_unended(folder)
    manifest = read_manifest(options.data)
    codec, measured = read_codec(folder), read_codec(options.data)
    refuse_other_tokens((options.data, measured), (folder, codec))
    reader = ConversationReader(options.data, cast(Literal["train", "val"], options.part))
    keys = _keys(options, codec, measured, reader)
    if options.part == "val":
        warn("\n".join(_perhaps_trained_on(folder, manifest, list(keys))))
    others = (other_statistics(measured, name, codec, key) for name, key in keys.items())
    warn("\n".join(filter(None, others)))
    file = next(iter(_left_by_the_run(folder, "config.yaml")), None)
    config = load_config(file) if file is not None else None
    return _Task(options, codec, measured, reader, keys, _out(options), config)


def _keys(
    options: EvalOptions, codec: ActionCodec, measured: ActionCodec, reader: ConversationReader
) -> dict[str, str]:
    """The datasets to score, and what the checkpoint calls them."""
    found = [name for name, samples in reader.ranges.items() if samples]
    if not found:
        mend = (
            "convert with --val-fraction, or use --part train" if options.part == "val" else "convert again"
        )
        raise UserError(f"{options.data}: holds no {_PARTS[options.part]}; {mend}")
    told = dict(_mapped(word, list(reader.ranges), codec) for word in options.unnorm_keys)
    for name in options.only:
        if name not in found:
            raise UserError(f"--only {name}: has no {_PARTS[options.part]}{did_you_mean(name, found)}")
    keys = {name: told.get(name, name) for name in found if name in (options.only or found)}
    strange = [name for name, key in keys.items() if key not in codec.datasets]
    if strange:
        raise UserError(
            f"{options.checkpoint} does not know {', '.join(strange)}; choose others with --only, or say "
            f"whose statistics it shall act with: --unnorm-key {strange[0]}=KEY, KEY one of "
            f"{', '.join(sorted(codec.datasets))}"
        )
    for name, key in keys.items():
        refuse_other_dataset(measured, name, codec, key)
    return keys


def _mapped(word: str, names: list[str], codec: ActionCodec) -> tuple[str, str]:
    name, _, key = word.partition("=")
    if not key:
        raise UserError(
            f"--unnorm-key {word}: give NAME=KEY, a dataset of the data and one of the checkpoint"
        )
    if name not in names:
        raise UserError(f"--unnorm-key {word}: the data has no {name}{did_you_mean(name, names)}")
    if key not in codec.datasets:
        known = list(codec.datasets)
        raise UserError(f"--unnorm-key {word}: the checkpoint has no {key}{did_you_mean(key, known)}")
    return name, key


def _perhaps_trained_on(folder: Path, manifest: Manifest, names: list[str]) -> list[str]:
    """A seed and a share decide which episodes are held out, and a larger share holds the smaller one."""
    said = []
    for file in _left_by_the_run(folder, "data_*manifest.json"):
        trained = read_model(Manifest, file, "the manifest of the data trained on")
        held_out = trained.asked.val_fraction if trained.seed == manifest.seed else 0.0
        shared = [dataset.name for dataset in trained.datasets if dataset.name in names]
        if shared and held_out < manifest.asked.val_fraction:
            said.append(
                f"{', '.join(shared)}: by this data's seed training held out {held_out:.1%} of the episodes, "
                f"the data {manifest.asked.val_fraction:.1%}: some of what is scored may have been trained on"
            )
    return said


def _out(options: EvalOptions) -> Path:
    """Where the report goes, and that it can; said now and not after the work."""
    name = f"eval-{options.data.resolve().name}{'' if options.part == 'val' else '-train'}.json"
    return prove_writable(options.out or options.checkpoint / name)


def _evaluate(task: _Task) -> dict[str, Any]:
    from train_llava.quiet import quiet_libraries

    quiet_libraries()
    import torch

    from train_llava.evaluate import HeldOut, evaluate

    options = task.options
    model, processor = _load(task)
    held_out = HeldOut(
        reader=task.reader,
        codec=task.measured,
        seed=task.config.seed if task.config else 0,
        samples=options.samples,
        only=tuple(task.keys),
        keys=task.keys,
        batch=options.batch,
    )
    try:
        return evaluate(model, processor, task.codec, held_out)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of the device's memory with batches of {options.batch}; give a smaller --batch"
        ) from error


def _load(task: _Task) -> tuple[OneViewLlava, OneViewProcessor]:
    """The model, where it is to run, as precise as it was in training."""
    import torch

    from train_llava.loading import DTYPES, load_checkpoint, proved_device

    device = proved_device(task.options.device)
    precision = task.config.train.precision if task.config else "fp32"
    model, processor = load_checkpoint(task.options.checkpoint, DTYPES[precision])
    torch.nn.Module.to(model, device)
    return model, processor


def _document(task: _Task, step: int | None) -> dict[str, Any]:
    """What was scored, so that the figures can be traced to it."""
    options, folder = task.options, task.options.checkpoint
    asked = asdict(options)
    weights = sorted(folder.glob("*.safetensors"))
    return {
        "oxe_mix": __version__,
        "asked": {name: str(value) if isinstance(value, Path) else value for name, value in asked.items()},
        "checkpoint": {
            "step": step,
            "codec_sha256": _sha256(folder / CODEC_FILE),
            "weights_sha256": {file.name: _sha256(file) for file in weights},
        },
        "data": {"manifest_sha256": _sha256(options.data / MANIFEST_FILE), "unnorm_keys": task.keys},
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _left_by_the_run(folder: Path, pattern: str) -> list[Path]:
    """Files beside a checkpoint's weights, else in the run above RUN/checkpoints/step-N."""
    whole = folder.resolve()
    above = whole.parent.parent if whole.parent.name == CHECKPOINTS else whole
    return sorted(folder.glob(pattern)) or sorted(above.glob(pattern))


def _step(checkpoint: Path) -> int | None:
    """How many steps the checkpoint was trained, where that is written down."""
    named = re.fullmatch(r"step-(\d+)", checkpoint.resolve().name)
    if named:
        return int(named[1])
    report = checkpoint / "evaluation.json"
    found = read_json(report, "the report of the training run").get("steps") if report.exists() else None
    return found if isinstance(found, int) else None
