"""One training run, top to bottom, as each rank executes it. Started by `make train` through
`train_llava.launch` and `train_llava.rank`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from convert.reader import ConversationReader
from oxe_mix.errors import UserError
from oxe_mix.files import write_json
from oxe_mix.text import count, duration, outlive_the_reader
from train_llava import ranks
from train_llava.action_tokens import prove_action_tokens
from train_llava.checkpoints import RESUME, Checkpoints, read_about
from train_llava.config import ERROR_FILE, METRICS_FILE, OVERFIT_FILE, RunConfig, load_config
from train_llava.data import RankBatches
from train_llava.evaluate import HeldOut, evaluate
from train_llava.loss import AnswerLoss
from train_llava.memory import oom_advice
from train_llava.metrics import summary
from train_llava.metrics_log import Metrics, mean_and_last_loss
from train_llava.model_card import write_card
from train_llava.overfit import learnt_share, verdict
from train_llava.prepare import Options, Prepared, prepare
from train_llava.result import REPORT_FILE, publish
from train_llava.step_end import StepEnd, Stopping
from train_llava.trainer import MixTrainer, NoLossError, Work, arguments, compile_layers

_MAX_WORKERS = 8


def train(prepared: Prepared) -> None:
    """Train, evaluate, and leave the model in the run's folder with its codec, metrics and report.

    Raises: UserError for a sample that cannot be read, and for a loss that is no number.
    """
    config, run, batch = prepared.config, prepared.options.run, prepared.batch
    if config.train.compile:
        compile_layers(prepared.model)
    stopping = Stopping(run)
    file = run / (OVERFIT_FILE if prepared.options.overfit_batch else METRICS_FILE)
    metrics = Metrics(file, prepared.data.order, batch, prepared.num_steps)
    args = arguments(config, run, batch, prepared.num_steps)
    trainer = MixTrainer(_work(prepared), Checkpoints(run, config.checkpoints.keep), args, metrics)
    trainer.add_callback(
        StepEnd(trainer, metrics, stopping, partial(_held_out, prepared, config.evaluation.samples))
    )
    trainer.remove_callback(PrinterCallback)
    metrics.begin(0 if prepared.goes_on is None else read_about(prepared.goes_on).step)
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=None if prepared.goes_on is None else str(prepared.goes_on / RESUME))
    seconds = time.monotonic() - start
    if stopping.stopped:
        return
    done = f"trained {prepared.num_steps:,} steps of {count(batch.samples, 'sample')}"
    ranks.tell(f"{done}; {duration(seconds)} in this go")
    if prepared.options.overfit_batch:
        share, num_tokens = learnt_share(prepared.model, prepared.processor, prepared.dataset, batch.samples)
        ranks.tell(verdict(share, num_tokens, prepared.num_steps, trainer.last_loss))
        return
    # Saved before it is scored: whatever happens there, the trained model is on disk.
    publish(run, partial(prepared.save, engine=trainer.engine))
    held_out = _held_out(prepared, config.evaluation.final_samples)
    if ranks.rank() == 0:
        write_json(run / REPORT_FILE, _report(prepared, trainer, seconds) | {"held_out": held_out})
        write_card(run)
    ranks.tell(summary(held_out) if held_out is not None else "no held-out episodes, so no scores")
    shown = shlex.quote(str(run))
    ranks.tell(
        f"result: {run}\nnext: python inference_action.py --checkpoint {shown} --image IMG --instruction TEXT"
    )


def _work(prepared: Prepared) -> Work:
    config, order = prepared.config, prepared.data.order
    action_ids = prove_action_tokens(prepared.processor.tokenizer)
    overfit = prepared.options.overfit_batch
    return Work(
        config=config,
        about=prepared.about,
        model=prepared.model,
        processor=prepared.processor,
        dataset=prepared.dataset,
        batches=RankBatches(order, prepared.batch, prepared.num_steps, ranks.rank(), overfit=overfit),
        loss=AnswerLoss(config.train.loss, prepared.data.codec, action_ids),
        num_workers=_num_workers(config),
        save=prepared.save,
        weights_only=prepared.options.weights_only,
        keeps_nothing=overfit,
    )


def _num_workers(config: RunConfig) -> int:
    """Processes that decode, per rank: a core is left to each rank."""
    if config.data.cache_frames:
        return 0
    if config.data.workers is not None:
        return config.data.workers
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MAX_WORKERS, len(os.sched_getaffinity(0)) // local - 1))


def _held_out(prepared: Prepared, samples: int) -> dict[str, Any] | None:
    """The scores on held-out episodes, None when the data holds none; every rank must call."""
    reader = ConversationReader(prepared.options.llava, "val")
    if len(reader) == 0:
        return None
    ranks.tell(f"evaluating on {min(samples, len(reader)):,} of {len(reader):,} held-out samples")
    codec = prepared.data.codec
    held_out = HeldOut(reader, codec, prepared.config.seed, samples=samples)
    return evaluate(prepared.model, prepared.processor, codec, held_out)


def _report(prepared: Prepared, trainer: MixTrainer, seconds: float) -> dict[str, Any]:
    """What is known of the run beside its scores."""
    mean, last = mean_and_last_loss(prepared.options.run / METRICS_FILE)
    return {
        "config": prepared.config.model_dump(mode="json"),
        "ranks": ranks.num_ranks(),
        "zero_stage": trainer.zero_stage(),
        "optimizer_bytes": trainer.optimizer_bytes(),
        "train_seconds": round(seconds, 1),
        "steps": prepared.num_steps,
        "global_batch": prepared.batch.samples,
        "samples": len(prepared.data.order),
        "mean_loss": mean,
        "final_loss": last,
    }


def main() -> None:
    """What a rank does, from its command line on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--llava", type=Path, required=True)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--overfit-batch", action="store_true")
    parser.add_argument("--weights-only", action="store_true")
    args = parser.parse_args()
    outlive_the_reader()
    options = Options(
        args.config, args.llava, args.into, args.check_only, args.overfit_batch, args.weights_only
    )
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(args.into / "tensorboard"))
    ranks.join()
    try:
        prepared = prepare(options)
        if options.check_only:
            ranks.tell("checked; nothing was trained")
        else:
            train(prepared)
    except NoLossError as error:
        _end(options.run, str(error), code=1)
    except UserError as error:
        _end(options.run, str(error), code=2)
    except torch.OutOfMemoryError as error:
        what = str(error).split(". ")[0]
        _end(options.run, f"{what}; {oom_advice(load_config(args.config))}", code=1)
    finally:
        _end_workers()
        ranks.leave()


def _end_workers() -> None:
    """Those that read data, which do not end on SIGTERM; and no complaint that they are gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


def _end(run: Path, text: str, code: int) -> None:
    """Leave the error to the launcher. Exit 1: the other ranks, which may wait for this one, end too."""
    write_json(run / ERROR_FILE, {"error": text, "code": code})
    sys.exit(1)
