"""Stage 2 as one Beam graph of two passes: shard names in, counts out. Actions and frames stay in the
workers' files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam

from convert.shards import (
    ShardCounts,
    ShardJob,
    collect_actions,
    convert_shard,
    counts_from_json,
    counts_to_json,
    merge_actions,
    read_stats,
)
from oxe_mix.engine import Engine
from oxe_mix.errors import UserError
from pipelines.runner import default_workers, run_and_collect

_FAILED = "failed"


class CollectActions(beam.DoFn):
    """First pass over a shard; yields its dataset and the file with its actions."""

    def __init__(self, scratch: str) -> None:
        self._scratch = scratch

    def process(self, job: ShardJob) -> Iterator[tuple[str, tuple[ShardJob, str, str]]]:
        """One (dataset, (job, file, error)) per shard."""
        try:
            yield job.card.name, (job, collect_actions(job, Path(self._scratch)), "")
        except UserError as error:
            yield job.card.name, (job, "", str(error))


class MergeActions(beam.DoFn):
    """All shards of a dataset become its statistics; the shards go on to the second pass, now that these are
    known.
    """

    def __init__(self, scratch: str) -> None:
        self._scratch = scratch

    def process(
        self, element: tuple[str, Iterable[tuple[ShardJob, str, str]]]
    ) -> Iterator[tuple[ShardJob, str, str]]:
        """One (job, file of statistics, error) per shard of the dataset."""
        shards = list(element[1])
        errors = [error for _, _, error in shards if error]
        file = ""
        if not errors:
            try:
                file = merge_actions(
                    shards[0][0].card, [actions for _, actions, _ in shards], Path(self._scratch)
                )
            except UserError as error:
                errors = [str(error)]
        for job, _, own_error in shards:
            yield job, file, own_error or (errors[0] if errors else "")


class ConvertShard(beam.DoFn):
    """Second pass over a shard; what a conversation is lives in `convert.llava`."""

    def process(self, element: tuple[ShardJob, str, str]) -> Iterator[dict[str, Any]]:
        """One report per shard."""
        job, stats_file, error = element
        if error:
            yield {_FAILED: error}
            return
        try:
            yield {"counts": counts_to_json(convert_shard(job, read_stats(stats_file)))}
        except UserError as own_error:
            yield {_FAILED: str(own_error)}


def convert_all(jobs: list[ShardJob], scratch: Path, engine: Engine) -> tuple[list[ShardCounts], list[str]]:
    """Convert all shards.

    Returns: the counts in order of dataset, split and shard, and what was wrong with the shards that failed.
    """

    def build(pipeline: beam.Pipeline) -> beam.PCollection[dict[str, Any]]:
        return (
            pipeline
            | beam.Create(jobs)
            | "SpreadFirst" >> beam.Reshuffle()
            | beam.ParDo(CollectActions(str(scratch)))
            | beam.GroupByKey()
            | beam.ParDo(MergeActions(str(scratch)))
            | "SpreadSecond" >> beam.Reshuffle()
            | beam.ParDo(ConvertShard())
        )

    num_bytes = sum(Path(job.file).stat().st_size for job in jobs)
    workers = engine.workers or default_workers(len(jobs), num_bytes)
    results = run_and_collect(build, engine, str(scratch), workers)
    failures = sorted({result[_FAILED] for result in results if _FAILED in result})
    counts = [counts_from_json(result["counts"]) for result in results if "counts" in result]
    return sorted(counts, key=lambda c: (c.dataset, c.split, c.index)), failures
