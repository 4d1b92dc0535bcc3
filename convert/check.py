"""`oxe-mix check`: is a converted folder what its manifest says, and can a trainer use all of it? Every line
and every frame is read, nothing is changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convert.action_codec import CODEC_FILE, ActionCodec, read_codec
from convert.check_shard import Finding, ShardCheck, ShardFiles, check_shard
from convert.frames import INDEX_SUFFIX, tar_of
from convert.lines import index_of
from convert.llava import CONVERSATIONS, IMAGES, VALIDATION
from convert.manifest import MANIFEST_FILE, ConvertedDataset, Manifest, read_manifest
from oxe_mix.errors import UserError
from oxe_mix.progress import Goal, Sample, progress
from oxe_mix.text import complain, count, say, table

_LISTED = 20
_LOOK_S = 0.5
# What follows the dataset's name in that of a file of conversations.
_REST = re.compile(r"-(?P<split>.+)-(?P<index>\d{5,})-of-\d{5,}\.jsonl")


@dataclass(frozen=True, slots=True)
class Checked:
    """All that was found in a folder; `findings` are those of no single shard."""

    datasets: tuple[str, ...]
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
        event: dict[str, Any] = {"event": "checked", "samples": samples, "images": images}
        listed = [asdict(finding) for finding in findings]
        say(json.dumps(event | {"datasets": _by_dataset(checked), "problems": listed}))
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
    quoted = shlex.quote(str(folder))
    mend = f"remove {quoted} and run oxe-mix convert again" if findings else f"make train LLAVA={quoted}"
    say(f"next: {mend}")
    return int(bool(findings))


def check(folder: Path, jobs: int, *, decode: bool, as_json: bool = False) -> Checked:
    """Check all shards, what the manifest says of them together, and that nothing else lies in the folder.

    Raises: UserError when the folder is no finished conversion.
    """
    manifest, codec = read_manifest(folder), read_codec(folder)
    shards = [shard for dataset in manifest.datasets for shard in _shards(folder, manifest, dataset, codec)]
    done: list[ShardCheck] = []
    goal, workers = Goal("check", "shard", len(shards)), max(1, min(jobs, len(shards)))
    with ProcessPoolExecutor(workers, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        # Before the thread that shows the progress: a process is best forked while there is one thread.
        coming = pool.map(check_shard, shards, [decode] * len(shards))
        with progress(goal, lambda: Sample(len(done)), "json" if as_json else "auto"):
            for one in coming:
                done.append(one)
    findings = [*_sums(folder, manifest), *_twice(shards), *_strangers(folder, shards)]
    return Checked(tuple(dataset.name for dataset in manifest.datasets), done, findings)


def _end_with(parent: int) -> None:
    """End this worker when the command that wants its work was killed: it would wait for more for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _shards(
    folder: Path, manifest: Manifest, dataset: ConvertedDataset, codec: ActionCodec
) -> list[ShardFiles]:
    """Raises: UserError when the manifest names files that cannot be those of the dataset."""
    held_out = {Path(file.path).name: file for file in dataset.validation_files}
    layout, shards, paths = manifest.asked.layout, list[ShardFiles](), list[str]()
    for file, frames in zip(dataset.files, dataset.frames, strict=False):
        name = Path(file.path).name
        place, val = _REST.fullmatch(name.removeprefix(dataset.name)), held_out.get(name)
        if place is None:
            break
        split, index = place["split"], int(place["index"])
        shards.append(ShardFiles(folder, dataset.name, split, index, layout, file, val, frames, codec))
        paths += [f"{CONVERSATIONS}/{name}", *([f"{VALIDATION}/{name}"] if val else [])]
        paths.append(f"{IMAGES}/{tar_of(name) if layout == 'tar' else f'{dataset.name}/{split}/{index}'}")
    told = [file.path for file in (*dataset.files, *dataset.validation_files)]
    told += [frames.path for frames in dataset.frames]
    if sorted(paths) != sorted(told):
        raise UserError(
            f"{folder / MANIFEST_FILE}: the files of {dataset.name} are not called as convert calls them; "
            "convert again"
        )
    return shards


def _sums(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """What the manifest says of the codec, and whether its sums are those of its parts."""
    sha256 = hashlib.sha256((folder / CODEC_FILE).read_bytes()).hexdigest()
    if sha256 != manifest.codec_sha256:
        yield Finding("codec", str(folder / CODEC_FILE), "is not the one that the manifest tells of")
    for dataset in manifest.datasets:
        told = (dataset.steps.written, dataset.steps.held_out, dataset.images, dataset.image_bytes)
        parts = (
            sum(file.samples for file in dataset.files),
            sum(file.samples for file in dataset.validation_files),
            sum(frames.images for frames in dataset.frames),
            sum(frames.bytes for frames in dataset.frames),
        )
        if told != parts:
            text = f"{dataset.name}: samples, held out, images, bytes: {told}, its files' together {parts}"
            yield Finding("count", str(folder / MANIFEST_FILE), text)


def _twice(shards: list[ShardFiles]) -> Iterator[Finding]:
    """Ids are unique within a shard, and begin with its place: two shards of one place share ids."""
    places = Counter((shard.dataset, shard.split, shard.index) for shard in shards)
    for shard in shards:
        if places[shard.dataset, shard.split, shard.index] > 1:
            yield Finding("id", str(shard.folder / shard.train.path), "another file holds the same shard")


def _strangers(folder: Path, shards: list[ShardFiles]) -> Iterator[Finding]:
    """What the manifest does not tell of: a tool that takes all it finds would train on it. Hidden files are
    left to whom they belong; what lies in a shard's own folder is looked at with the shard.
    """
    files, frames = set[Path](), {folder / shard.frames.path for shard in shards}
    for shard in shards:
        for file in (shard.train, shard.val):
            files |= {folder / file.path, index_of(folder / file.path)} if file else set()
    files |= {file.with_suffix(INDEX_SUFFIX) for file in frames if file.suffix == ".tar"}
    wanted = files | frames
    above = {parent for path in wanted for parent in path.parents}
    known = wanted | above
    for part in (CONVERSATIONS, VALIDATION, IMAGES):
        for where, folders, names in os.walk(folder / part):
            found = {name: Path(where, name) for name in (*folders, *names) if not name.startswith(".")}
            for name in sorted(found):
                if found[name] not in known:
                    yield Finding("stranger", str(found[name]), "the manifest does not tell of it")
            folders[:] = [name for name in folders if found.get(name) in above]


def _by_dataset(checked: Checked) -> list[dict[str, Any]]:
    found = []
    for name in checked.datasets:
        own = [shard for shard in checked.shards if shard.dataset == name]
        kinds = Counter(finding.kind for shard in own for finding in shard.findings)
        sums = {"samples": sum(shard.samples for shard in own), "images": sum(shard.images for shard in own)}
        found.append({"name": name, **sums, "problems": dict(sorted(kinds.items()))})
    return found


def _report(checked: Checked) -> str:
    rows = []
    for dataset in _by_dataset(checked):
        problems = ", ".join(f"{kind} {n:,}" for kind, n in dataset["problems"].items()) or "none"
        rows.append((dataset["name"], f"{dataset['samples']:,}", f"{dataset['images']:,}", problems))
    return table(("dataset", "samples", "images", "problems"), rows)
