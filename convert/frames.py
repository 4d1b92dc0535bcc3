"""Where encoded frames lie: a file each below `images/`, or one tar per shard with an index beside it.

A sample's `image` is the same path in both layouts but for several cameras, whose name stands behind a dot in
a tar, as WebDataset wants it, and behind a hyphen in a file's name. Frames are written under a temporary name
that becomes the final one when the shard is whole.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from convert.llava import IMAGES
from oxe_mix.errors import UserError
from oxe_mix.files import atomic_write

Layout = Literal["files", "tar"]
INDEX_SUFFIX = ".tsv"


@dataclass(frozen=True, slots=True)
class Frame:
    """One encoded frame of a converted folder: a whole file, or a part of a tar."""

    file: Path
    offset: int = 0
    num_bytes: int | None = None  # None: to the end of the file

    def __str__(self) -> str:
        return str(self.file) if self.num_bytes is None else f"{self.file}, at byte {self.offset:,}"

    def read(self) -> bytes:
        """Its bytes, JPEG or PNG.

        Raises: UserError when the file is not there or too short.
        """
        try:
            with self.file.open("rb", buffering=0) as stream:
                if self.num_bytes is None:
                    return stream.read()
                frame = os.pread(stream.fileno(), self.num_bytes, self.offset)
        except FileNotFoundError as error:
            raise UserError(f"{self.file}: no such image") from error
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read ({error.strerror})") from error
        if len(frame) != self.num_bytes:
            raise UserError(f"{self}: the file ends inside the frame; convert again")
        return frame


class FolderWriter:
    """One shard's frames as files of a folder; it appears when the block ends without an error."""

    def __init__(self, folder: Path) -> None:
        """Raises: nothing; a folder of that name is replaced when the block ends."""
        self._folder = folder
        self._temporary = folder.with_name(f".{folder.name}.tmp")
        self._prefix = f"{self._temporary}/"

    def __enter__(self) -> Self:
        # What a killed run left under the temporary name goes.
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        return self

    def add(self, name: str, frame: bytes) -> int:
        """Write the frame of the path `name` below `images/`; returns where in its file it begins."""
        with open(self._prefix + name.rsplit("/", 1)[1], "wb", buffering=0) as stream:
            stream.write(frame)
        return 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._temporary.rename(self._folder)
        else:
            shutil.rmtree(self._temporary, ignore_errors=True)


class TarWriter:
    """One shard's frames as a tar with an index beside it: NAME, OFFSET and BYTES of each, in order."""

    def __init__(self, file: Path) -> None:
        """Raises: nothing; a tar of that name is replaced when the block ends."""
        self._file = file
        self._index: list[str] = []
        self._end = 0

    def __enter__(self) -> Self:
        self._block = ExitStack()
        self._tar = self._block.enter_context(atomic_write(self._file, flush=False))
        return self

    def add(self, name: str, frame: bytes) -> int:
        """Append the frame of the path `name` below `images/`; returns where in the tar it begins."""
        header = _tar_header(name, len(frame))
        offset = self._end + len(header)
        padding = -len(frame) % tarfile.BLOCKSIZE
        self._tar.write(b"".join((header, frame, bytes(padding))))
        self._index.append(f"{name}\t{offset}\t{len(frame)}\n")
        self._end = offset + len(frame) + padding
        return offset

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            # Two empty blocks are the end, and a tar is a whole number of records long.
            end = self._end + 2 * tarfile.BLOCKSIZE
            self._tar.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
            with atomic_write(self._file.with_suffix(INDEX_SUFFIX), flush=False) as stream:
                stream.write("".join(self._index).encode())
        self._block.__exit__(kind, error, trace)


_NAME_BYTES = 100
_EMPTY_HEADER = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_SIZE, _CHECKSUM = slice(124, 136), slice(148, 156)
_BARE_SUM = sum(_EMPTY_HEADER) - sum(_EMPTY_HEADER[_SIZE]) - sum(_EMPTY_HEADER[_CHECKSUM]) + 8 * ord(" ")


def _tar_header(name: str, num_bytes: int) -> bytes:
    """The header of a member of mode 0644 and time 0.

    `TarInfo.tobuf` makes the same one in 20 us, a third of what a frame costs in all; this takes 2.
    """
    encoded = name.encode()
    if len(encoded) > _NAME_BYTES:
        info = tarfile.TarInfo(name)
        info.size = num_bytes
        return info.tobuf(tarfile.PAX_FORMAT)
    size = b"%011o\0" % num_bytes
    total = _BARE_SUM + sum(encoded) + sum(size)
    return b"".join(
        (
            encoded.ljust(_NAME_BYTES, b"\0"),
            _EMPTY_HEADER[_NAME_BYTES : _SIZE.start],
            size,
            _EMPTY_HEADER[_SIZE.stop : _CHECKSUM.start],
            b"%06o\0 " % total,
            _EMPTY_HEADER[_CHECKSUM.stop :],
        )
    )


class FrameReader:
    """Frames of a converted folder by their path; the index of the tar asked last is kept."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        """Raises: nothing; a folder without images has no frame."""
        self._images = (folder / IMAGES).resolve()
        self._tars: dict[str, Path] | None = None
        if layout == "tar":
            self._tars = {
                file.name.rpartition("-of-")[0]: file for file in sorted(self._images.glob("*-of-*.tar"))
            }
        self._index: tuple[Path, dict[str, Frame]] | None = None

    def find(self, name: str) -> Frame:
        """Where the frame of a sample's `image` lies.

        Raises: UserError when it is in no tar, or outside the folder.
        """
        if self._tars is None:
            path = (self._images / name).resolve()
            if not path.is_relative_to(self._images):
                raise UserError(f"the image {name} lies outside {self._images}")
            return Frame(path)
        stem = _shard_prefix(name)
        if stem not in self._tars:
            raise UserError(f"{self._images}: no tar holds the image {name}")
        file = self._tars[stem]
        if self._index is None or self._index[0] != file:
            self._index = file, read_tar_index(file)
        if name not in self._index[1]:
            raise UserError(f"{file}: does not hold the image {name}")
        return self._index[1][name]

    def read(self, name: str) -> bytes:
        """The bytes of a frame. Raises: UserError as `find`, and when it cannot be read."""
        return self.find(name).read()


def open_frames(folder: Path, layout: Layout) -> FrameReader:
    """The frames of a converted folder by name."""
    return FrameReader(folder, layout)


def tar_of(conversations: str) -> str:
    """The name of the tar that holds the frames of a file of conversations."""
    return f"{conversations.removesuffix('.jsonl')}.tar"


def _shard_prefix(name: str) -> str:
    """`NAME-SPLIT-0000i` of an image NAME/SPLIT/i/…: how the shard's files begin."""
    parts = name.split("/")
    if len(parts) != 4 or not parts[2].isdecimal():
        return ""
    return f"{parts[0]}-{parts[1]}-{int(parts[2]):05d}"


def read_tar_index(file: Path) -> dict[str, Frame]:
    """The frames of a tar by name, from the index beside it. Raises: UserError for one that is missing or
    broken.
    """
    index = file.with_suffix(INDEX_SUFFIX)
    try:
        rows = [line.split("\t") for line in index.read_text().splitlines()]
        return {name: Frame(file, int(offset), int(num_bytes)) for name, offset, num_bytes in rows}
    except (OSError, ValueError) as error:
        raise UserError(f"{index}: no index of {file.name} ({error}); convert again") from error
