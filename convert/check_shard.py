"""One shard of a converted folder, read whole: its lines, their index, their frames."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from convert.action_codec import NUM_BINS, ActionCodec, decode, encode, text_to_bins
from convert.frames import FrameReader, Layout, open_frames
from convert.lines import index_of
from convert.llava import Place
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


@dataclass(frozen=True, slots=True)
class _Line:
    """A sample and where it stands; `row` is its row in the index."""

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
    lines = [
        list(_lines(shard.folder / file.path, file, report)) for file in (shard.train, shard.val) if file
    ]
    frames = open_frames(shard.folder, shard.layout)
    crc32c, num_bytes, seen = 0, 0, set[str]()
    for line in heapq.merge(*lines, key=lambda line: line.order):
        try:
            _check_words(shard, line)
            for name in _names(line.sample):
                encoded = _read_frame(frames, name, line, decode_frames)
                crc32c, num_bytes = google_crc32c.extend(crc32c, encoded), num_bytes + len(encoded)
                report.images += 1
        except _ProblemError as problem:
            report.findings.append(Finding(problem.kind, line.where, str(problem)))
        if line.sample["id"] in seen:
            report.findings.append(Finding("id", line.where, f"the id {line.sample['id']} comes twice"))
        seen.add(line.sample["id"])
        report.samples += 1
    told = (shard.frames.images, shard.frames.bytes, shard.frames.crc32c)
    if not report.findings and (report.images, num_bytes, crc32c) != told:
        where = str(shard.folder / shard.frames.path)
        report.findings.append(Finding("frames", where, "the frames are not those that were written"))
    return report


class _ProblemError(Exception):
    """Why a sample is of no use."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def _lines(path: Path, file: ConvertedFile, report: ShardCheck) -> Iterator[_Line]:
    """The samples of a file that parse; what does not is booked."""

    def book(kind: str, where: str, text: str) -> None:
        report.findings.append(Finding(kind, where, text))

    try:
        content = path.read_bytes()
        index = np.load(index_of(path))
    except (OSError, ValueError) as error:
        book("file", str(path), f"it or its index cannot be read ({error})")
        return
    if hashlib.sha256(content).hexdigest() != file.sha256:
        book("file", str(path), "is not the file that the manifest tells of")
    lines = content.splitlines(keepends=True)
    ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
    begins_and_ends = np.stack([ends - [len(line) for line in lines], ends], axis=1) if lines else ends
    if len(lines) != file.samples:
        book("count", str(path), f"{len(lines)} samples, the manifest says {file.samples}")
    if len(index) != len(lines) or (len(lines) and (index[:, :2] != begins_and_ends).any()):
        book("index", str(path), "its index does not fit its lines")
        return
    for number, line in enumerate(lines):
        where = f"{path}:{number + 1}"
        try:
            sample = json.loads(line)
            _refuse_other_shapes(sample)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            book("line", where, f"is no sample ({type(error).__name__}: {error})")
        else:
            yield _Line(where, sample, index[number].tolist())


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
    """Raises: _ProblemError for an id, a question or an answer that is not right."""
    sample, names = line.sample, _names(line.sample)
    split, index, _, _ = Path(shard.train.path).stem.removeprefix(f"{shard.dataset}-").rsplit("-", 3)
    place = Place(shard.dataset, split, int(index), sample["episode"], sample["step"])
    if sample["id"] != place.id or sample["dataset"] != shard.dataset:
        raise _ProblemError("id", f"the id {sample['id']} is not that of its place, {place.id}")
    marks = sample["conversations"][0]["value"].count(IMAGE)
    if marks != len(names):
        raise _ProblemError("images", f"{marks} {IMAGE} marks, {len(names)} images")
    _check_answer(shard, sample["conversations"][1]["value"])


def _check_answer(shard: ShardFiles, answer: str) -> None:
    codec = shard.codec
    try:
        bins = text_to_bins(answer, codec.action_dim)
        stats = codec.datasets[shard.dataset]
        again = encode(decode(bins, stats, codec.binning), stats, codec.binning)
    except (ValueError, KeyError) as error:
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
    places = list(zip(line.row[2::2], line.row[3::2], strict=True))
    if places and (frame.offset, frame.num_bytes) not in places:
        raise _ProblemError("index", f"{name}: the index beside the conversations has it in another place")
    return encoded
