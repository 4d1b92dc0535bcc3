"""`oxe-mix check`: is a converted folder what its manifest says, and can a trainer use all of it? Every line
and every frame is read, nothing is changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from convert.action_codec import CODEC_FILE, ActionCodec, read_codec
from convert.check_shard import Finding, ShardCheck, ShardFiles, check_shard
from convert.frames import INDEX_SUFFIX
from convert.lines import index_of
from convert.llava import CONVERSATIONS, IMAGES, VALIDATION
from convert.manifest import ConvertedDataset, Manifest, read_manifest
from oxe_mix.progress import Goal, Sample, progress
from oxe_mix.text import complain, count, say, table

_LISTED = 20


@dataclass(slots=True)
class _Checked:
    """All that was read of a folder."""

    manifest: Manifest
    shards: list[ShardCheck]
    findings: list[Finding]


def run_check(folder: Path, jobs: int | None, *, decode: bool, as_json: bool) -> int:
    """Check a converted folder; with `decode` every frame is decoded, too.

    Returns: the exit code: 0 when all is well, 1 when something is wrong.
    Raises: UserError when the folder is no finished conversion.
    """
    start = time.monotonic()
    checked = check(folder, jobs or len(os.sched_getaffinity(0)), decode=decode, as_json=as_json)
    findings = checked.findings + [finding for shard in checked.shards for finding in shard.findings]
    samples = sum(shard.samples for shard in checked.shards)
    images = sum(shard.images for shard in checked.shards)
    if as_json:
        listed = [asdict(finding) for finding in findings]
        say(json.dumps({"event": "checked", "samples": samples, "images": images, "problems": listed}))
        return int(bool(findings))
    say(_report(checked))
    if findings:
        complain("\n".join(f"{finding.where}: {finding.text}" for finding in findings[:_LISTED]))
        if len(findings) > _LISTED:
            say(f"and {len(findings) - _LISTED:,} more; --json lists them all")
    say(
        f"{count(samples, 'sample')}, {count(images, 'image')}, {count(len(findings), 'problem')}, "
        f"{time.monotonic() - start:.1f} s"
    )
    mend = f"remove {folder} and run oxe-mix convert again" if findings else f"make train LLAVA={folder}"
    say(f"next: {mend}")
    return int(bool(findings))


def check(folder: Path, jobs: int, *, decode: bool, as_json: bool = False) -> _Checked:
    """Check all shards, and that nothing else lies in the folder.

    Raises: UserError when the folder is no finished conversion.
    """
    manifest, codec = read_manifest(folder), read_codec(folder)
    shards = [shard for dataset in manifest.datasets for shard in _shards(folder, manifest, dataset, codec)]
    done: list[ShardCheck] = []
    goal = Goal("check", "shard", len(shards))
    with (
        progress(goal, lambda: Sample(len(done)), "json" if as_json else "auto"),
        ProcessPoolExecutor(max(1, min(jobs, len(shards)))) as pool,
    ):
        for one in pool.map(check_shard, shards, [decode] * len(shards)):
            done.append(one)
    findings = list(_strangers(folder, manifest))
    sha256 = hashlib.sha256((folder / CODEC_FILE).read_bytes()).hexdigest()
    if sha256 != manifest.codec_sha256:
        findings.append(
            Finding("codec", str(folder / CODEC_FILE), "is not the one that the manifest tells of")
        )
    return _Checked(manifest, done, findings)


def _shards(
    folder: Path, manifest: Manifest, dataset: ConvertedDataset, codec: ActionCodec
) -> list[ShardFiles]:
    held_out = {Path(file.path).name: file for file in dataset.validation_files}
    return [
        ShardFiles(
            folder=folder,
            dataset=dataset.name,
            layout=manifest.asked.layout,
            train=file,
            val=held_out.get(Path(file.path).name),
            frames=frames,
            codec=codec,
        )
        for file, frames in zip(dataset.files, dataset.frames, strict=True)
    ]


def _strangers(folder: Path, manifest: Manifest) -> list[Finding]:
    """Files that the manifest does not tell of: a tool that takes all it finds would train on them."""
    wanted = set()
    for dataset in manifest.datasets:
        for file in (*dataset.files, *dataset.validation_files):
            wanted |= {folder / file.path, index_of(folder / file.path)}
        for frames in dataset.frames:
            wanted |= {folder / frames.path, (folder / frames.path).with_suffix(INDEX_SUFFIX)}
    found = [file for part in (CONVERSATIONS, VALIDATION, IMAGES) for file in (folder / part).glob("*")]
    strange = [file for file in found if file.is_file() and file not in wanted]
    strange += [shard for shard in (folder / IMAGES).glob("*/*/*") if shard not in wanted]
    return [Finding("stranger", str(file), "the manifest does not tell of it") for file in sorted(strange)]


def _report(checked: _Checked) -> str:
    rows = []
    for dataset in checked.manifest.datasets:
        own = [shard for shard in checked.shards if shard.dataset == dataset.name]
        kinds = Counter(finding.kind for shard in own for finding in shard.findings)
        problems = ", ".join(f"{kind} {n:,}" for kind, n in sorted(kinds.items())) or "none"
        samples, images = sum(s.samples for s in own), sum(s.images for s in own)
        rows.append((dataset.name, f"{samples:,}", f"{images:,}", problems))
    return table(("dataset", "samples", "images", "problems"), rows)
