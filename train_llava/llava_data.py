"""Any LLaVA data by index: .jsonl, one .json array of any size, or a .yaml that lists such files.

Nothing of the samples is kept in memory. Where each begins and ends in its file is found once, in one pass,
and written to a cache folder; both are then read with each sample, whatever the number of rows.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import re
import zlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from convert.frames import Frame
from convert.prompt import IMAGE
from oxe_mix.errors import UserError
from oxe_mix.text import count
from oxe_mix.yaml_files import line_of, load_yaml
from train_llava.llava_index import SampleIndex, open_index
from train_llava.mixture import Permutation

Role = Literal["human", "gpt"]

_ROLES: dict[Any, Role] = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
_STRATEGY = r"^(all|(first|end|random):(\d+|\d+(\.\d+)?%))$"


@dataclass(frozen=True, slots=True)
class Conversation:
    """One sample: turns that alternate and begin with the human's, and an image for each <image> in them."""

    id: str
    turns: tuple[tuple[Role, str], ...]
    images: tuple[Frame, ...]


class _Entry(BaseModel):
    """One file of a data.yaml, in LLaVA-NeXT's words."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    json_path: str
    sampling_strategy: Annotated[str, Field(pattern=_STRATEGY)] = "all"

    def taken(self, num_samples: int) -> range:
        """Which of a file's samples are taken, in the order drawn for `random`; more than there are is all.

        A percentage is rounded up, as LLaVA-NeXT does (llava/train/train.py, LazySupervisedDataset).
        """
        strategy, _, number = self.sampling_strategy.partition(":")
        if strategy == "all":
            return range(num_samples)
        share = Fraction(number.removesuffix("%")) * (Fraction(num_samples, 100) if "%" in number else 1)
        count = min(math.ceil(share), num_samples)
        return range(num_samples - count, num_samples) if strategy == "end" else range(count)


class _Listing(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    datasets: Annotated[tuple[_Entry, ...], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Taken:
    """The samples that are taken of one file."""

    samples: SampleIndex
    numbers: range
    order: Permutation | None  # what the numbers go through first, where they are drawn at random

    def number(self, place: int) -> int:
        """The number in the file of one of the samples taken."""
        number = self.numbers[place]
        return number if self.order is None else int(self.order(np.array([number]))[0])


class LlavaData:
    """The samples of LLaVA data by index, in the order of its files."""

    def __init__(self, file: Path, images: Path | None, seed: int = 0, cache: Path | None = None) -> None:
        """Open the data, and index its files where that was not done before.

        Args:
            file: .json, .jsonl, or .yaml with `datasets: [{json_path, sampling_strategy}]`; {a,b} in a path
                stands for several files. A relative json_path is looked for in the working folder, as
                LLaVA-NeXT does, and beside the .yaml.
            images: the folder below which every image lies; None: the data is text alone.
            seed: of the `random` strategies.
            cache: where indices are kept; oxe-mix/ in the user's cache folder when not given.

        Raises: UserError for a file that is missing, empty or not of its kind, and an unknown strategy.
        """
        if images is not None and not images.is_dir():
            raise UserError(f"{images}: no such folder of images")
        # abspath and not resolve: an absolute image is given with the links that its folder is given with.
        self._images = None if images is None else os.path.abspath(images)
        cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oxe-mix"
        self.files = tuple(_take(path, entry, seed, cache) for path, entry in _files(file))
        self._ends = np.cumsum([len(taken.numbers) for taken in self.files]).tolist()

    def __len__(self) -> int:
        """Samples in all, after sampling."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Conversation:
        """One sample. Raises: IndexError; UserError, with file and sample, for one that is none or whose
        images are not the ones its turns speak of, or lie outside the folder.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = bisect.bisect_right(self._ends, index)
        taken = self.files[place]
        number = taken.number(index - (self._ends[place] - len(taken.numbers)))
        samples = taken.samples
        line = samples.read(number)
        try:
            return _conversation(json.loads(line), self._images, f"{samples.file.stem}/{number}")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            what = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise UserError(f"{samples.file}: sample {number + 1}: not usable: {what}") from error


def _conversation(sample: Any, folder: str | None, name: str) -> Conversation:
    """What a sample says. Raises: ValueError, KeyError or TypeError for one that cannot be trained on."""
    if not isinstance(sample, dict):
        raise ValueError("no JSON object")
    images = _images(sample, folder)
    identity = sample.get("id")
    return Conversation(name if identity is None else str(identity), _turns(sample, len(images)), images)


def _turns(sample: dict[str, Any], num_images: int) -> tuple[tuple[Role, str], ...]:
    """Its turns, in our words for the roles; LLaVA-NeXT reads from/value and role/content too."""
    turns: list[tuple[Role, str]] = []
    for turn in sample["conversations"]:
        role = turn["from"] if "from" in turn else turn["role"]
        text = turn["value"] if "value" in turn else turn["content"]
        if role not in _ROLES or not isinstance(text, str):
            raise ValueError(f"a turn is not a text of {', '.join(_ROLES)} but {text!r:.60} of {role!r:.60}")
        text.encode()  # half a surrogate pair is no text
        turns.append((_ROLES[role], text))
    if turns and turns[0][0] == "gpt":
        del turns[0]  # an answer without a question, which LLaVA-NeXT leaves out as well
    if len(turns) < 2 or any(role != ("human", "gpt")[i % 2] for i, (role, _) in enumerate(turns)):
        raise ValueError(f"turns by {', '.join(role for role, _ in turns) or 'nobody'} do not alternate")
    markers = [text.count(IMAGE) for _, text in turns]
    if any(markers[1::2]):
        raise ValueError(f"an answer holds {IMAGE}")
    if sum(markers) != num_images:
        raise ValueError(f"{num_images} images, but {sum(markers)} times {IMAGE} in the turns")
    return tuple(turns)


def _images(sample: dict[str, Any], folder: str | None) -> tuple[Frame, ...]:
    """Its images, joined to the folder as LLaVA-NeXT joins them: an absolute path stays what it is."""
    if sample.get("video") is not None:
        raise ValueError("a video, which is not trained on; leave such samples out")
    image = sample.get("image")
    names = [] if image is None else image if isinstance(image, list) else [image]
    if not names:
        return ()
    if folder is None:
        raise ValueError("it has images, and no folder of images was given")
    paths = [os.path.normpath(os.path.join(folder, name)) for name in names]
    for name, path in zip(names, paths, strict=True):
        path.encode()
        if not path.startswith(os.path.join(folder, "")) or "\0" in path:
            raise ValueError(f"the image {name!r} lies outside {folder}")
    return tuple(Frame(Path(path)) for path in paths)


def _take(file: Path, entry: _Entry, seed: int, cache: Path) -> Taken:
    """Index a file and sample it. Raises: UserError when nothing is left."""
    samples = open_index(file, cache)
    numbers = entry.taken(samples.num_samples)
    if not numbers:
        raise UserError(
            f"{file}: {entry.sampling_strategy} of {count(samples.num_samples, 'sample')} leaves none"
        )
    is_random = entry.sampling_strategy.startswith("random")
    # By the file's name and not its place: a folder that moved is sampled as before.
    key = zlib.crc32(file.name.encode())
    return Taken(samples, numbers, Permutation(samples.num_samples, seed, key) if is_random else None)


def _files(file: Path) -> list[tuple[Path, _Entry]]:
    """The files that a path or a listing stands for, and how each is sampled."""
    if file.suffix not in (".yaml", ".yml"):
        return [(Path(name), _Entry(json_path=name)) for name in _expanded(str(file))]
    try:
        entries = _Listing.model_validate(load_yaml(file)).datasets
    except ValidationError as error:
        lines = [
            f"{file}:{line_of(file, problem['loc'])}: {'.'.join(map(str, problem['loc'])) or 'file'}: "
            f"{_words(problem)}"
            for problem in error.errors()
        ]
        raise UserError("\n".join(lines)) from error
    return [(_found(name, file), entry) for entry in entries for name in _expanded(entry.json_path)]


def _words(problem: Any) -> str:
    if problem["type"] == "string_pattern_mismatch":
        return f"{problem['input']!r} is none of all, first:N, end:N, random:N, and the same with N%"
    return str(problem["msg"])


def _found(name: str, listing: Path) -> Path:
    """A file of a listing. Raises: UserError for one that is not there, or that could be either of two."""
    found = [path for path in (Path(name), listing.parent / name) if path.is_file()]
    if not found:
        raise UserError(f"{listing}: {name}: no such file")
    if not found[0].samefile(found[-1]):
        raise UserError(f"{listing}: {name}: could be {found[0].absolute()} or {found[1]}; write it in full")
    return found[0]


def _expanded(path: str) -> list[str]:
    """Each alternative of each {a,b}; LLaVA-NeXT knows one such group, in the path of the data itself."""
    match = re.fullmatch(r"(.*)\{([^{}]*)\}(.*)", path, re.DOTALL)
    if match is None:
        return [path]
    before, group, after = match.groups()
    return [f"{head}{name}{after}" for head in _expanded(before) for name in group.split(",")]
