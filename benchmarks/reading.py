"""Random access to a converted folder from a fresh process, beside bare reads of as many bytes.

python -m benchmarks.reading LLAVA READS   prints JSON
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from convert.llava import IMAGES
from convert.reader import ConversationReader
from oxe_mix.text import say


def main() -> None:
    """Measure both in this process."""
    folder, num_reads = Path(sys.argv[1]), int(sys.argv[2])
    start = time.monotonic()
    reader = ConversationReader(folder, "train")
    opened = time.monotonic() - start
    indices = np.random.default_rng(0).integers(len(reader), size=num_reads).tolist()
    start, num_bytes = time.monotonic(), 0
    for index in indices:
        num_bytes += sum(len(frame.read()) for frame in reader[index].frames)
    seconds = time.monotonic() - start
    report = {
        "open_s": round(opened, 3),
        "samples_per_s": round(num_reads / seconds),
        "bare_reads_per_s": round(num_reads / _bare(folder / IMAGES, num_bytes // num_reads, num_reads)),
    }
    say(json.dumps(report))


def _bare(images: Path, length: int, num_reads: int) -> float:
    """Seconds to open a random file below `images`, and read a frame's worth of bytes from a random place."""
    rng = np.random.default_rng(1)
    files = sorted(file for file in images.rglob("*") if file.is_file())
    sizes = [file.stat().st_size for file in files]
    chosen = rng.integers(len(files), size=num_reads).tolist()
    start = time.monotonic()
    for number, share in zip(chosen, rng.random(num_reads).tolist(), strict=True):
        stream = os.open(files[number], os.O_RDONLY)
        os.pread(stream, length, int(max(0, sizes[number] - length) * share))
        os.close(stream)
    return time.monotonic() - start


if __name__ == "__main__":
    main()
