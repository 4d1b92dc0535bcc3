"""Memory of a training run's data, for 20 thousand and 2 million samples: of the process that trains and of
each worker that reads.

python -m benchmarks.loader_memory [--rows 20000 2000000] [--scratch build/loader]

Each size is LLaVA data of one .jsonl with a few pictures, opened, indexed and drawn from in the run's own
order by the trainer's own loader, in a fresh process. Private memory (what no other process shares) is read
from the kernel after a thousand batches.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.results import write_result
from oxe_mix.text import say, table

_WORKERS, _BATCHES, _MICRO = 2, 1000, 8
_TURNS = (
    '[{{"from":"human","value":"<image>\\nWhat is in picture {0}?"}},{{"from":"gpt","value":"Number {0}."}}]'
)


def main() -> None:
    """Measure each size in a process of its own, and put them beside each other."""
    parser = argparse.ArgumentParser(description="Memory of a training run's data.")
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 2_000_000])
    parser.add_argument("--scratch", type=Path, default=Path("build/loader"))
    parser.add_argument("--measure", type=int, help="one size, in this process")
    args = parser.parse_args()
    if args.measure is not None:
        say(json.dumps(_measure(args.scratch / str(args.measure), args.measure)))
        return
    found = {}
    for rows in args.rows:
        folder = _make(args.scratch / str(rows), rows)
        words = ["--measure", str(rows), "--scratch", str(args.scratch)]
        command = [sys.executable, "-m", "benchmarks.loader_memory", *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[str(rows)] = json.loads(done.stdout.splitlines()[-1])
        found[str(rows)]["data_mb"] = round((folder / "data.jsonl").stat().st_size / 1e6, 1)
    header = ("samples", "data MB", "index s", "trainer MB", "worker MB", "samples/s")
    keys = ("data_mb", "open_s", "trainer_mb", "worker_mb", "samples_per_s")
    say(table(header, [(f"{int(rows):,}", *(str(own[key]) for key in keys)) for rows, own in found.items()]))
    say(f"result: {write_result('loader-memory', ('torch', 'numpy'), {'sizes': found})}")


def _make(folder: Path, rows: int) -> Path:
    """The data, unless it is there."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(16):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"images/{i}.jpg")
    if not (folder / "data.jsonl").exists():
        with (folder / "data.jsonl").open("w") as stream:
            for i in range(rows):
                turns = _TURNS.format(i)
                stream.write(f'{{"id":"s{i}","image":"{i % 16}.jpg","conversations":{turns}}}\n')
    return folder


def _measure(folder: Path, rows: int) -> dict[str, Any]:
    """Memory in MB, and how long opening took."""
    from torch.utils.data import DataLoader

    from convert.action_codec import ActionCodec
    from convert.statistics import action_stats
    from train_llava.batch import BatchPlan
    from train_llava.config import ModelConfig, TinyModel
    from train_llava.data import RankBatches, SampleDataset, collate
    from train_llava.llava_data import LlavaData
    from train_llava.loading import load_or_build
    from train_llava.mixture import MixedOrder, SourceRange
    from train_llava.sources import Source, TrainingData

    start = time.monotonic()
    data = LlavaData(folder / "data.jsonl", folder / "images", cache=folder / f"index-{time.time_ns()}")
    opened = time.monotonic() - start
    assert len(data) == rows
    source = SourceRange("data", range(rows), 1.0)
    stats = action_stats(np.zeros((2, 7), np.float32), (True,) * 6 + (False,), 1)
    codec = ActionCodec(action_dim=7, datasets={"data": stats})
    training = TrainingData((Source(source, data),), MixedOrder([source], 0), codec, (), "")
    _, processor, _ = load_or_build(ModelConfig(tiny=TinyModel()), ["What is in picture 1?"], 0)
    batches = RankBatches(training.order, BatchPlan(_MICRO, 1, 1, accumulate_is_given=True), _BATCHES, rank=0)
    loader: DataLoader[Any] = DataLoader(
        SampleDataset(training, processor),
        batch_sampler=batches,
        collate_fn=partial(collate, processor=processor),
        num_workers=_WORKERS,
        prefetch_factor=4,
        persistent_workers=True,
    )
    start = time.monotonic()
    iterator = iter(loader)
    for batch in iterator:
        assert "error" not in batch
    seconds = time.monotonic() - start
    workers = [worker.pid for worker in iterator._workers]  # type: ignore[attr-defined] # noqa: SLF001
    return {
        "open_s": round(opened, 2),
        "trainer_mb": _private_mb("self"),
        "worker_mb": max(_private_mb(str(pid)) for pid in workers),
        "samples_per_s": round(_BATCHES * _MICRO / seconds),
    }


def _private_mb(pid: str) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kilobytes = [
        int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))
    ]
    return round(sum(kilobytes) / 1e3, 1)


if __name__ == "__main__":
    main()
