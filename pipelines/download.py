"""Stage 1 as a Beam graph: shard tasks in, reports out. The bytes of a shard never leave its worker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import apache_beam as beam

from oxe_mix.errors import UserError
from oxe_mix.fetch import ShardReport, ShardTask, fetch_shard
from pipelines.runner import default_workers, run_and_collect


class FetchShard(beam.DoFn):
    """Fetches; a shard that cannot be had is reported, and the others go on."""

    def process(self, task: ShardTask) -> Iterator[dict[str, Any]]:
        """One report per task."""
        try:
            yield {"report": asdict(fetch_shard(task))}
        except UserError as error:
            yield {"failure": str(error)}


def fetch_all(
    tasks: list[ShardTask], num_bytes: int, workers: int | None
) -> tuple[list[ShardReport], list[str]]:
    """Fetch all shards, about `num_bytes` in all.

    Returns: the reports in order of dataset, split and shard, and what was wrong with the shards that failed.
    """

    def build(pipeline: beam.Pipeline) -> beam.PCollection[dict[str, Any]]:
        # Reshuffle spreads the tasks: without it all of them are one bundle of one worker.
        return pipeline | beam.Create(tasks) | beam.Reshuffle() | beam.ParDo(FetchShard())

    results = run_and_collect(build, workers or default_workers(len(tasks), num_bytes))
    reports = [ShardReport(**result["report"]) for result in results if "report" in result]
    failures = sorted(result["failure"] for result in results if "failure" in result)
    return sorted(reports, key=lambda r: (r.dataset, r.split, r.index)), failures
