"""Stage 1 beside curl and cp: rate and memory, on loopback, in one run; start-up excluded on both sides.

python benchmarks/transfer.py [GB]   writes benchmarks/results/DATE-transfer.json
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import write_result
from oxe_mix.cards import load_cards
from oxe_mix.files import write_json
from oxe_mix.mix import DatasetSpec, Mix, load_mix
from oxe_mix.plan import plan_download
from oxe_mix.schedule import schedule
from oxe_mix.shards import ShardTask
from oxe_mix.source_file import Patience
from oxe_mix.synth.features import save_features
from oxe_mix.target import open_target
from oxe_mix.text import say
from oxe_mix.tfrecord import frame
from pipelines.download import Batch, FetchBatch
from tests.loopback import BUCKET, upload
from tests.servers import strict_bucket

SHARDS, RECORD, CONNECTIONS, ROUNDS = 16, 4_000_000, 4, 5
PACKED = {"kuka": 1024, "language_table": 1024}  # shards assumed for the dry run; 256 for all others


def main() -> None:
    """Run all of it and write the result."""
    num_bytes = float(sys.argv[1] if len(sys.argv) > 1 else 2.1) * 1e9
    with tempfile.TemporaryDirectory(prefix="oxe-mix-bench-") as folder:
        root = Path(folder)
        big = _bucket(root / "big", 1, num_bytes)
        memory = _memory(big, root / "one")
        shutil.rmtree(big)
        bucket = _bucket(root / "bucket", SHARDS, num_bytes)
        result: dict[str, Any] = {"gigabytes": num_bytes / 1e9, "connections": CONNECTIONS, "memory": memory}
        result["file"] = _compare("cp", lambda out: _cp(bucket, out), str(bucket), root)
        with strict_bucket() as endpoint:
            upload(endpoint, bucket)
            os.environ["STORAGE_EMULATOR_HOST"] = endpoint
            urls = [
                f"{endpoint}/download/storage/v1/b/{BUCKET}/o/{_key(f)}?alt=media" for f in _shards(bucket)
            ]
            result["http"] = _compare("curl", lambda out: _curl(urls, out), f"gs://{BUCKET}", root)
            result["dry_run"] = _dry_run(root / "many", endpoint)
        file = write_result("transfer", ("urllib3", "gcsfs", "fsspec", "google-crc32c"), result)
        say(f"{file.read_text()}result: {file}")


def _bucket(root: Path, num_shards: int, num_bytes: float) -> Path:
    """One dataset of random records under viola's features: its records are never parsed."""
    folder = root / "viola/0.1.0"
    folder.mkdir(parents=True)
    save_features("viola", folder)
    per_shard = max(1, round(num_bytes / num_shards / RECORD))
    rng = np.random.default_rng(0)
    for index in range(num_shards):
        name = f"viola-train.tfrecord-{index:05d}-of-{num_shards:05d}"
        with (folder / name).open("wb") as stream:
            for _ in range(per_shard):
                stream.write(frame(rng.bytes(RECORD)))
    lengths = [str(per_shard)] * num_shards
    split = {"name": "train", "shardLengths": lengths, "numBytes": str(per_shard * num_shards * RECORD)}
    write_json(folder / "dataset_info.json", {"name": "viola", "version": "0.1.0", "splits": [split]})
    return root


def _shards(bucket: Path) -> list[Path]:
    return sorted((bucket / "viola/0.1.0").glob("*.tfrecord-*"))


def _key(file: Path) -> str:
    return f"viola%2F0.1.0%2F{file.name}"


def _compare(other: str, reference: Callable[[Path], None], source: str, root: Path) -> dict[str, object]:
    """Both in turn, so that neither has the quieter machine; the files of each round are removed."""
    ours: list[float] = []
    theirs: list[float] = []
    size = 0
    for _ in range(ROUNDS):
        for seconds, run in ((theirs, reference), (ours, lambda out: _ours(source, out))):
            out = root / "out"
            out.mkdir()
            os.sync()  # what the last round left to write would slow this one
            start = time.monotonic()
            run(out)
            seconds.append(time.monotonic() - start)
            size = sum(f.stat().st_size for f in out.rglob("*.tfrecord*") if f.suffix != ".json")
            shutil.rmtree(out)
    rate = {"oxe-mix": _rates(ours, size), other: _rates(theirs, size)}
    ratio = statistics.median(theirs) / statistics.median(ours)
    return {"megabytes_per_s": rate, f"rate beside {other}": round(ratio, 2)}


def _rates(seconds: list[float], size: int) -> list[int]:
    return [round(size / 1e6 / s) for s in seconds]


def _ours(source: str, out: Path) -> None:
    """The worker's own function, as Beam calls it."""
    tasks = _tasks(source, out)
    results = list(FetchBatch(Patience()).process(Batch(tuple(tasks), CONNECTIONS)))
    assert all("report" in result for result in results), results


def _tasks(source: str, out: Path) -> list[ShardTask]:
    spec = DatasetSpec(name="viola", version="0.1.0", fraction=1.0)
    mix = Mix(name="bench", source=source, datasets=(spec,))
    plans = plan_download(mix, load_cards(), Patience())
    return [one.task for one in schedule(plans, open_target(out), None)]


def _curl(urls: list[str], out: Path) -> None:
    targets = [part for i, url in enumerate(urls) for part in ("-o", str(out / f"{i}.tfrecord-x"), url)]
    command = ["curl", "--silent", "--fail", "--parallel", "--parallel-max", str(CONNECTIONS), *targets]
    subprocess.run(command, check=True)


def _cp(bucket: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", str(bucket), str(out)], check=True)


def _dry_run(folder: Path, endpoint: str) -> dict[str, Any]:
    """`--dry-run` of the default mix as a user types it, start-up included; the objects are tiny."""
    cards = load_cards()
    mix = load_mix(Path("default.yaml"), cards)
    num = 0
    for spec in mix.datasets:
        name = cards.get(spec.name).names[-1] if spec.name == "bridge_orig" else spec.name
        build = folder / name / spec.version
        build.mkdir(parents=True)
        save_features(spec.name, build)
        shards = PACKED.get(spec.name, 256)
        for index in range(shards):
            (build / f"{name}-train.tfrecord-{index:05d}-of-{shards:05d}").write_bytes(b"x")
        split = {"name": "train", "shardLengths": ["40"] * shards, "numBytes": str(shards)}
        write_json(build / "dataset_info.json", {"name": name, "version": spec.version, "splits": [split]})
        num += shards
    upload(endpoint, folder)
    command = ["oxe-mix", "download", "--mix", "default.yaml", "--source", f"gs://{BUCKET}", "--dry-run"]
    seconds = []
    for _ in range(ROUNDS):
        start = time.monotonic()
        subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=True)
        seconds.append(round(time.monotonic() - start, 2))
    return {"datasets": len(mix.datasets), "objects": num, "shards": "assumed", "seconds": seconds}


def _memory(bucket: Path, out: Path) -> dict[str, object]:
    """Peak memory of a process that fetches one great shard, above what its imports cost."""
    code = (
        "import sys; from benchmarks import transfer; from pathlib import Path\n"
        "def high(): return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) / 1e3\n"
        "tasks = transfer._tasks(sys.argv[1], Path(sys.argv[2]))\n"
        "Path('/proc/self/clear_refs').write_text('5'); before = high()  # forget the imports' own peak\n"
        "list(transfer.FetchBatch(transfer.Patience()).process(transfer.Batch(tuple(tasks), 1)))\n"
        "print(before, high())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(bucket), str(out)], check=True, capture_output=True, text=True
    )
    before, after = map(float, done.stdout.split())
    shard = _shards(bucket)[0].stat().st_size
    shutil.rmtree(out)
    return {
        "shard_gb": round(shard / 1e9, 2),
        "imports_mb": round(before),
        "above_mb": round(after - before, 1),
    }


if __name__ == "__main__":
    main()
