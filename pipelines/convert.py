"""Stage 2 as one Beam graph of two passes: shard names in, the names of finished shards out. Actions, frames
and counts stay in the workers' files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam

from convert.shards import ShardJob, collect_actions, convert_shard, merge_actions
from oxe_mix.engine import Engine
from oxe_mix.errors import UserError
from pipelines.runner import run_and_collect


class CollectActions(beam.DoFn):
    """First pass over a shard."""

    def __init__(self, scratch: str) -> None:
        self._scratch = scratch

    def process(self, job: ShardJob) -> Iterator[tuple[str, tuple[ShardJob, str]]]:
        """One (dataset, (job, error)) per shard."""
        yield job.card.name, (job, _error(collect_actions, job, Path(self._scratch)))


class MergeActions(beam.DoFn):
    """All shards of a dataset become its statistics; the shards go on to the second pass, now that these are
    known.
    """

    def __init__(self, scratch: str) -> None:
        self._scratch = scratch

    def process(self, element: tuple[str, Iterable[tuple[ShardJob, str]]]) -> Iterator[tuple[ShardJob, str]]:
        """One (job, error) per shard of the dataset: its own error, or the dataset's."""
        shards = list(element[1])
        errors = [error for _, error in shards if error]
        if not errors:
            errors = [_error(merge_actions, [job for job, _ in shards], Path(self._scratch))]
        for job, own_error in shards:
            yield job, own_error or errors[0]


class ConvertShard(beam.DoFn):
    """Second pass over a shard; what a conversation is lives in `convert.llava`."""

    def __init__(self, scratch: str) -> None:
        self._scratch = scratch

    def process(self, element: tuple[ShardJob, str]) -> Iterator[dict[str, Any]]:
        """One {stem, error} per shard."""
        job, error = element
        yield {"stem": job.stem, "error": error or _error(convert_shard, job, Path(self._scratch))}


def _error(work: Any, *args: Any) -> str:
    """What was wrong in a piece of work; empty when nothing was. Other shards go on."""
    try:
        work(*args)
    except UserError as error:
        return str(error)
    return ""


def convert_all(jobs: list[ShardJob], scratch: Path, engine: Engine, workers: int) -> list[str]:
    """Convert all shards, locally in `workers` processes; each leaves its report in `scratch`.

    Returns: what was wrong with the shards that failed, each thing once.
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
            | beam.ParDo(ConvertShard(str(scratch)))
        )

    results = run_and_collect(build, engine, str(scratch), workers)
    return sorted({result["error"] for result in results if result["error"]})
