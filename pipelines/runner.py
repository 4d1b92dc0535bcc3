"""How a Beam graph is run, here or on a cluster, and how its small results come back."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.environments import SubprocessSDKEnvironment

from oxe_mix.engine import LOCAL, Engine
from oxe_mix.errors import UserError
from oxe_mix.target import open_target
from pipelines.worker import COMMAND_PID

_BYTES_PER_WORKER = 256 << 20
_LONGEST_JOB_S = 30 * 24 * 3600
_INTERRUPT_S = 3.0  # what a busy machine may need until Ctrl-C is heard


def run_and_collect(
    build: Callable[[beam.Pipeline], beam.PCollection[dict[str, Any]]],
    engine: Engine,
    shared: str,
    workers: int,
) -> list[dict[str, Any]]:
    """Run a graph whose end is a collection of small JSON objects, and return them, in no order.

    They come back through a file: on a cluster in `shared`, a folder that all workers reach, else in a
    temporary one, since the disk of `shared` may be what is full. Locally the graph runs in this process, or
    in `workers` processes. The local runner is named: plain DirectRunner in Beam 2.77 first tries to start
    Prism, which may download a binary.
    """
    # Beam tells every change of its workers' state at INFO and WARNING; what matters comes as an exception.
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    if engine.runner == LOCAL:
        with tempfile.TemporaryDirectory(prefix="oxe-mix-") as folder, _complaints_wait():
            return _run(build, _pipeline(engine, workers), folder)
    return _run(build, _pipeline(engine, workers), shared)


@contextmanager
def _complaints_wait() -> Iterator[None]:
    """Ctrl-C ends the workers and this process; Beam's threads, which see the workers go, may be the quicker
    ones. What they say of it waits until it is sure that there was no Ctrl-C.
    """
    usual = threading.excepthook

    def later(problem: threading.ExceptHookArgs) -> None:
        time.sleep(_INTERRUPT_S)
        usual(problem)

    def waited(_: logging.LogRecord) -> bool:
        time.sleep(_INTERRUPT_S)
        return True

    reader = logging.getLogger("apache_beam.runners.worker.data_plane")
    threading.excepthook = later
    reader.addFilter(waited)
    try:
        yield
    finally:
        threading.excepthook = usual
        reader.removeFilter(waited)


def check_engine(engine: Engine) -> None:
    """Refuse an engine that cannot be. Raises: UserError."""
    _pipeline(engine, workers=1)


def _run(
    build: Callable[[beam.Pipeline], beam.PCollection[dict[str, Any]]], pipeline: beam.Pipeline, shared: str
) -> list[dict[str, Any]]:
    name = f"reports-{uuid.uuid4().hex}.json"
    with pipeline:
        _ = build(pipeline) | beam.combiners.ToList() | beam.Map(_write, shared, name)
    target = open_target(shared)
    text = target.read(name)
    if text is None:
        raise UserError(
            f"{shared}/{name}: the workers wrote their reports where this machine does not see them; "
            "give --out a bucket or a folder that all of them reach"
        )
    target.remove(name)
    return list(json.loads(text))


def _pipeline(engine: Engine, workers: int) -> beam.Pipeline:
    if engine.runner != LOCAL:
        # Beam 2.77 watches a portable job through a stream with this deadline, 300 s if not given: a longer
        # job would go on while the command fails.
        flags = [f"--job_server_timeout={_LONGEST_JOB_S}", *engine.flags]
        try:
            return beam.Pipeline(runner=engine.runner, options=PipelineOptions(flags))
        except (ValueError, ImportError, AttributeError) as error:
            raise UserError(f"--runner {engine.runner}: {error}") from error
    processes = None
    if workers > 1:
        processes = SubprocessSDKEnvironment.from_command_string(_worker_command())
    options = PipelineOptions([f"--direct_num_workers={workers}"])
    return beam.Pipeline(runner=FnApiRunner(default_environment=processes), options=options)


def _worker_command() -> str:
    """How Beam starts a worker process.

    -P: a file that happens to lie in the user's folder (proto.py, say) must not stand in for a package. Beam
    itself waits for ever for a worker that cannot start or that the kernel killed; so its end ends this
    process, too. And the other way round: told who started it, a worker ends when that one has.
    """
    worker = f"{COMMAND_PID}={os.getpid()} {shlex.quote(sys.executable)} -P -m pipelines.worker"
    words = "a worker process ended early (out of memory?); the next run goes on where this one was"
    return f"{worker} || {{ echo 'error: {words}' >&2; kill -TERM {os.getpid()}; }}"


def default_workers(num_tasks: int, num_bytes: int) -> int:
    """One per core, but no more than there are tasks, and only as many as earn the seconds they take to
    start.

    Measured on two cores: at 220 MB one process converts in 5.4 s and downloads in 2.2 s, two in 7.2 s and
    2.9 s.
    """
    return max(1, min(len(os.sched_getaffinity(0)), num_tasks, num_bytes // _BYTES_PER_WORKER))


def _write(reports: list[dict[str, Any]], shared: str, name: str) -> None:
    open_target(shared).write(name, json.dumps(reports).encode())
