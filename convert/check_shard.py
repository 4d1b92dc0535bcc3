"""One shard of a converted folder, read whole: its lines, their index, their frames. One line is held at a
time.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from convert.action_codec import NUM_BINS, ActionCodec, decode, encode, text_to_bins
from convert.frames import FrameReader, Layout, open_frames, read_tar_index
from convert.lines import index_of
from convert.llava import IMAGES, Place
from convert.manifest import ConvertedFile, ConvertedFrames
from convert.prompt import IMAGE
from oxe_mix import images
from oxe_mix.errors import UserError


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be, and where."""

    kind: str
    where: str
    text: str


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """What the manifest says of one shard."""

    folder: Path
    dataset: str
    split: str
    index: int
    layout: Layout
    train: ConvertedFile
    val: ConvertedFile | None
    frames: ConvertedFrames
    codec: ActionCodec


@dataclass(slots=True)
class ShardCheck:
    """What was found in one shard."""

    dataset: str
    samples: int = 0
    images: int = 0
    findings: list[Finding] = field(default_factory=list)

    def book(self, kind: str, where: object, text: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(kind, str(where), text))


@dataclass(frozen=True, slots=True)
class _Line:
    """A sample and where it stands; `row` is its row in the index, empty when that is of no use."""

    where: str
    sample: dict[str, Any]
    row: list[int]

    @property
    def order(self) -> tuple[int, int]:
        """Shards are written in this order, train and held-out samples together."""
        return self.sample["episode"], self.sample["step"]


def check_shard(shard: ShardFiles, decode_frames: bool) -> ShardCheck:
    """Read a shard's lines and frames, in the order in which they were written."""
    report = ShardCheck(shard.dataset)
    lines = [_lines(shard.folder / file.path, file, report) for file in (shard.train, shard.val) if file]
    frames = _reader(shard.folder, shard.layout)
    crc32c, num_bytes, ids, names = 0, 0, set[str](), set[str]()
    for line in heapq.merge(*lines, key=lambda line: line.order):
        report.samples += 1
        try:
            _check_words(shard, line)
            for name in _names(line.sample):
                encoded = _read_frame(frames, name, line, decode_frames)
                crc32c, num_bytes = google_crc32c.extend(crc32c, encoded), num_bytes + len(encoded)
                report.images += 1
                names.add(name)
        except _ProblemError as problem:
            report.book(problem.kind, line.where, str(problem))
        if line.sample["id"] in ids:
            report.book("id", line.where, f"the id {line.sample['id']} comes twice")
        ids.add(line.sample["id"])
    where = shard.folder / shard.frames.path
    told = (shard.frames.images, shard.frames.bytes, shard.frames.crc32c)
    # After a line that is of no use its frames are missing from the sum, and nobody names them.
    if not report.findings and (report.images, num_bytes, crc32c) != told:
        report.book("frames", where, "the frames are not those that were written")
    if not report.findings:
        _refuse_spare_frames(shard, where, names, report)
    return report


# Kept from shard to shard: with many, each look into the folder of tars takes a while.
_reader = lru_cache(maxsize=1)(open_frames)


class _ProblemError(Exception):
    """Why a sample is of no use."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def _lines(path: Path, file: ConvertedFile, report: ShardCheck) -> Iterator[_Line]:
    """The samples of a file that parse; what does not is booked, and so is what is wrong with the whole."""
    index, sha256, number, end = _index(path, file, report), hashlib.sha256(), 0, 0
    try:
        with path.open("rb") as stream:
            for number, content in enumerate(stream, 1):
                sha256.update(content)
                begin, end = end, end + len(content)
                row = index[number - 1].tolist() if number <= len(index) else []
                if row and row[:2] != [begin, end]:
                    report.book("index", f"{path}:{number}", "its index has the line in another place")
                    index = index[:0]
                sample = _parsed(content, f"{path}:{number}", report)
                if sample is not None:
                    yield _Line(f"{path}:{number}", sample, row if len(index) else [])
    except OSError as error:
        report.book("file", path, f"cannot be read ({error.strerror})")
        return
    if number != file.samples:
        report.book("count", path, f"{number} samples, the manifest says {file.samples}")
    if sha256.hexdigest() != file.sha256:
        report.book("file", path, "is not the file that the manifest tells of")


def _index(path: Path, file: ConvertedFile, report: ShardCheck) -> NDArray[np.int64]:
    """The index of a file of conversations; without a row when it is of no use, which is booked."""
    try:
        index: NDArray[np.int64] = np.load(index_of(path))
        if index.ndim == 2 and index.dtype == np.int64 and index.shape[1] >= 2 and len(index) == file.samples:
            return index
        what = f"is {index.dtype} of {index.shape}, not int64 of {file.samples} rows"
    except (OSError, ValueError, EOFError) as error:
        what = f"cannot be read ({error})"
    report.book("index", index_of(path), what)
    return np.zeros((0, 2), np.int64)


def _parsed(content: bytes, where: str, report: ShardCheck) -> dict[str, Any] | None:
    try:
        sample: dict[str, Any] = json.loads(content)
        _refuse_other_shapes(sample)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        report.book("line", where, f"is no sample ({type(error).__name__}: {error})")
        return None
    return sample


def _refuse_other_shapes(sample: dict[str, Any]) -> None:
    """Raises: ValueError, KeyError or TypeError for what is no sample as stage 2 writes it."""
    human, answer = sample["conversations"]
    texts = (sample["id"], sample["dataset"], human["value"], answer["value"], *_names(sample))
    numbers = (sample["episode"], sample["step"])
    if (human["from"], answer["from"]) != ("human", "gpt"):
        raise ValueError("the turns are not human's and gpt's")
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(n, int) for n in numbers):
        raise TypeError("a field has another type")


def _names(sample: dict[str, Any]) -> list[str]:
    return [sample["image"]] if isinstance(sample["image"], str) else sample["image"]


def _check_words(shard: ShardFiles, line: _Line) -> None:
    """Raises: _ProblemError for an id, a path of an image, a question or an answer that is not right."""
    sample, names = line.sample, _names(line.sample)
    place = Place(shard.dataset, shard.split, shard.index, sample["episode"], sample["step"])
    if sample["id"] != place.id or sample["dataset"] != shard.dataset:
        raise _ProblemError("id", f"the id {sample['id']} is not that of its place, {place.id}")
    marks = sample["conversations"][0]["value"].count(IMAGE)
    if marks != len(names):
        raise _ProblemError("images", f"{marks} {IMAGE} marks, {len(names)} images")
    for name in names:
        # Behind the step stand the camera or the suffix; another digit would be another step.
        if not name.startswith((place.image("."), place.image("-"))):
            raise _ProblemError("images", f"the image {name} is of another place than {place.id}")
    _check_answer(shard, sample["conversations"][1]["value"])


def _check_answer(shard: ShardFiles, answer: str) -> None:
    codec = shard.codec
    stats = codec.datasets.get(shard.dataset)
    if stats is None:
        raise _ProblemError("answer", f"the codec does not know {shard.dataset}")
    try:
        bins = text_to_bins(answer, codec.action_dim)
        again = encode(decode(bins, stats, codec.binning), stats, codec.binning)
    except ValueError as error:
        raise _ProblemError("answer", str(error)) from error
    if len(bins) != codec.chunk:
        raise _ProblemError("answer", f"{len(bins)} actions, a chunk has {codec.chunk}")
    if codec.binning == "openvla255":
        bins = np.minimum(bins, NUM_BINS - 2)  # its last bin decodes as the one before
    if (again != bins).any():
        raise _ProblemError("answer", f"{answer} decodes to an action with other tokens")


def _read_frame(frames: FrameReader, name: str, line: _Line, decode_frames: bool) -> bytes:
    """Raises: _ProblemError for a frame that is not there, not whole, or not where the index says."""
    try:
        frame = frames.find(name)
        encoded = frame.read()
        images.frame_info(encoded)
        if decode_frames:
            images.decode(encoded)
    except (UserError, ValueError) as error:
        raise _ProblemError("image", f"{name}: {error}") from error
    places = list(zip(line.row[2::2], line.row[3::2], strict=False))
    if places and (frame.offset, frame.num_bytes) not in places:
        raise _ProblemError("index", f"{name}: the index beside the conversations has it in another place")
    return encoded


def _refuse_spare_frames(shard: ShardFiles, where: Path, names: set[str], report: ShardCheck) -> None:
    """Books frames that no sample names, and a tar that is another than its index says."""
    if shard.layout == "tar":
        found = _tar_names(where, report)
    else:
        # Hidden files are frames to nobody.
        found = sorted(str(file.relative_to(shard.folder / IMAGES)) for file in where.glob("[!.]*"))
    for name in found:
        if name not in names:
            report.book("stranger", shard.folder / IMAGES / name, "no sample names it")


def _tar_names(file: Path, report: ShardCheck) -> list[str]:
    """The names in a tar's index; a tar that is another is booked: other tools know its headers alone."""
    try:
        index = [(name, frame.offset, frame.num_bytes) for name, frame in read_tar_index(file).items()]
        for told, member in zip_longest(index, _members(file)):
            if told != member:
                name, *_ = told or member or ("",)
                report.book("tar", file, f"its members are not those of its index, from {name} on")
                break
    except (UserError, tarfile.TarError, OSError) as error:
        report.book("tar", file, f"is no whole tar with an index ({error})")
        return []
    return [name for name, _, _ in index]


def _members(file: Path) -> Iterator[tuple[str, int, int]]:
    with tarfile.open(file, "r:") as tar:
        while (member := tar.next()) is not None:
            yield member.name, member.offset_data, member.size
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
