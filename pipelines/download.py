"""Stage 1 as a Beam graph: shard tasks in, reports out. The bytes of a shard never leave its worker."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import apache_beam as beam

from oxe_mix.engine import LOCAL, Engine
from oxe_mix.errors import UserError
from oxe_mix.fetch import fetch_shard
from oxe_mix.shards import PARTIAL, ShardReport, ShardTask, report_from_json
from oxe_mix.source_file import Patience
from oxe_mix.writing import TargetError
from pipelines.runner import default_workers, run_and_collect


@dataclass(frozen=True, slots=True)
class Batch:
    """Shards that one worker fetches, so many of them at once."""

    tasks: tuple[ShardTask, ...]
    at_once: int


class FetchBatch(beam.DoFn):
    """Fetches; a shard that cannot be had is reported, and the others go on."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience

    def process(self, batch: Batch) -> Iterator[dict[str, Any]]:
        """One report or failure per task."""
        hopeless = threading.Event()  # the target cannot be written: the rest would fail as well

        def fetch(task: ShardTask) -> dict[str, Any]:
            if hopeless.is_set():
                return {"skipped": task.name}
            try:
                return {"report": asdict(fetch_shard(task, self._patience))}
            except TargetError as error:
                hopeless.set()
                return {"failure": str(error)}
            except UserError as error:
                return {"failure": str(error)}

        with ThreadPoolExecutor(batch.at_once) as pool:
            yield from pool.map(fetch, batch.tasks)


def fetch_all(
    tasks: list[ShardTask], jobs: int, engine: Engine, patience: Patience
) -> tuple[list[ShardReport], list[str]]:
    """Fetch shards, at most `jobs` of them at a time.

    Returns: the reports of those fetched, and what was wrong with the others.
    """
    if not tasks:
        return [], []
    num_bytes = sum(task.estimated_bytes for task in tasks)
    workers = engine.workers or default_workers(len(tasks), num_bytes)
    # One process keeps several shards in flight: it waits for the network. A cluster spreads single ones.
    batches = _deal(tasks, workers if engine.runner == LOCAL else jobs, jobs)

    def build(pipeline: beam.Pipeline) -> beam.PCollection[dict[str, Any]]:
        # Reshuffle spreads the batches: without it all of them are one bundle of one worker.
        return pipeline | beam.Create(batches) | beam.Reshuffle() | beam.ParDo(FetchBatch(patience))

    shared = f"{tasks[0].out}/{PARTIAL}"
    results = run_and_collect(build, engine, shared, min(workers, len(batches)))
    reports = [report_from_json(result["report"]) for result in results if "report" in result]
    return reports, sorted({result["failure"] for result in results if "failure" in result})


def _deal(tasks: list[ShardTask], num_batches: int, jobs: int) -> list[Batch]:
    """Tasks dealt into batches of about equal bytes, the largest first."""
    num_batches = max(1, min(num_batches, jobs, len(tasks)))
    hands: list[list[ShardTask]] = [[] for _ in range(num_batches)]
    weights = [0] * num_batches
    for task in sorted(tasks, key=lambda task: -task.estimated_bytes):
        lightest = weights.index(min(weights))
        hands[lightest].append(task)
        weights[lightest] += max(1, task.estimated_bytes)
    return [Batch(tuple(hand), max(1, jobs // num_batches)) for hand in hands]
