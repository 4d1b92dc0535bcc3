"""What `oxe-mix convert` does, in order, and what it prints."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from convert.estimate import estimate, tell
from convert.finish import Run, finish_conversion
from convert.llava import CONVERSATIONS
from convert.manifest import MANIFEST_FILE
from convert.options import ConvertOptions
from convert.plan import find_datasets, missing_inputs, open_folders, shard_jobs
from convert.report import ShardReport, read_report
from convert.shards import report_file
from convert.summary import summary
from oxe_mix.cards import load_cards
from oxe_mix.engine import Engine
from oxe_mix.errors import UserError
from oxe_mix.files import BUSY_FILE, folder_lock, sweep
from oxe_mix.lock import LOCK_FILE
from oxe_mix.mix import load_mix
from oxe_mix.progress import Goal, Sample, progress
from oxe_mix.text import complain, count, say, warn

_PARTIAL = ".partial"


def run_convert(options: ConvertOptions, engine: Engine) -> int:
    """Convert data folders.

    Returns: the exit code: 0 when all of it arrived, 1 when a shard failed or something that was asked for
        did not come of the data.
    Raises: UserError for what the user can mend.
    """
    from pipelines.convert import convert_all

    start = time.monotonic()
    run = _resolve(options)
    # Absolute: the workers of a cluster do not know where the command was typed.
    out, scratch = options.out, options.out.absolute() / _PARTIAL
    _refuse_other_folder(out)
    guess = estimate(run.datasets, run.jobs)
    workers = engine.workers or guess.workers(len(run.jobs))
    say(tell(guess, out, workers))
    with folder_lock(out, "conversion"):
        # Until the new manifest is there, nobody may take what lies here for a result.
        (out / MANIFEST_FILE).unlink(missing_ok=True)
        sweep(out)
        scratch.mkdir(exist_ok=True)
        with progress(Goal("convert", "shard reading", 2 * len(run.jobs)), _passes_done(run)):
            failures = convert_all(run.jobs, scratch, engine, workers)
        reports = _reports(run)
        failures = failures or _too_many_bad(run, reports)
        if failures:
            complain("\n".join(failures))
            say(f"{len(reports)} of {count(len(run.jobs), 'shard')} converted; {out} is no result yet")
            return 1
        os.sync()
        manifest = finish_conversion(run, reports, scratch)
        shutil.rmtree(scratch)
    say(summary(manifest, time.monotonic() - start))
    quoted = shlex.quote(str(out))
    say(f"result: {out}\nnext: oxe-mix check {quoted}, then make train LLAVA={quoted}")
    if manifest.missing:
        complain("\n".join(manifest.missing))
        return 1
    return 0


def _resolve(options: ConvertOptions) -> Run:
    cards = load_cards(options.cards)
    folders = open_folders(options.data)
    locks = [folder.lock for folder in folders if folder.lock is not None]
    mix = load_mix(options.mix, cards) if options.mix is not None else None
    datasets = find_datasets(folders, mix, cards, options.only, options.rules.asking)
    if mix is None and len(folders) == len(locks) == 1:
        mix = locks[0].mix
    widths = {dataset.card.action.dims for dataset in datasets}
    if len(widths) > 1:
        raise UserError(
            f"actions of widths {sorted(widths)} cannot share one codec; make a mix for each width, or take "
            "some with --only"
        )
    missing = missing_inputs(datasets, options.rules.asking)
    if missing and not options.allow_missing:
        raise UserError("\n".join(f"{line}; leave it out, or go on with --allow-missing" for line in missing))
    warn("\n".join(missing))
    seed = mix.seed if mix is not None else 0
    rules, fraction = options.rules, options.val_fraction
    jobs = [job for d in datasets for job in shard_jobs(d, options.out, rules, seed, fraction)]
    return Run(options, mix, seed, datasets, jobs, cards)


def _passes_done(run: Run) -> Callable[[], Sample]:
    """Counts the shards that have been read once and those that have been read twice."""
    scratch = run.options.out / _PARTIAL
    once = [scratch / f"{job.stem}.collected.json" for job in run.jobs]
    twice = [report_file(scratch, job) for job in run.jobs]
    return lambda: Sample(sum(file.exists() for file in (*once, *twice)))


def _reports(run: Run) -> list[ShardReport]:
    """Of the shards that are converted, in order of dataset, split and shard."""
    found = [read_report(report_file(run.options.out / _PARTIAL, job)) for job in run.jobs]
    return [report for report in found if report is not None]


def _too_many_bad(run: Run, reports: list[ShardReport]) -> list[str]:
    """Each shard is within --max-bad by itself; here all of them together."""
    limit = run.options.rules.max_bad
    bad = [record.error for report in reports for record in report.bad]
    if limit is None or len(bad) <= limit:
        return []
    return [*bad, f"{count(len(bad), 'record')} broken, --max-bad allows {limit}"]


def _refuse_other_folder(out: Path) -> None:
    """Only a folder that is empty or was made by a conversion is written into; what that one left is
    replaced.
    """
    if (out / LOCK_FILE).exists():
        raise UserError(f"{out}: holds a download; choose another --out")
    if not out.is_dir() or any((out / name).exists() for name in (_PARTIAL, CONVERSATIONS, MANIFEST_FILE)):
        return
    strange = next((file for file in out.iterdir() if file.name != BUSY_FILE), None)
    if strange is not None:
        raise UserError(f"{out}: holds other things ({strange.name}); choose another --out")
