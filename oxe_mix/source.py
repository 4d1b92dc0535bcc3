"""Where datasets come from: any folder or bucket that fsspec reads, always without credentials."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from oxe_mix.cards import Card
from oxe_mix.errors import UserError
from oxe_mix.rlds import (
    FEATURES_FILE,
    INFO_FILE,
    DatasetInfo,
    FeatureTree,
    parse_dataset_info,
    parse_features,
)

# Public buckets: whatever credentials the machine has are neither read nor sent.
_ANONYMOUS: dict[str, dict[str, Any]] = {"gs": {"token": "anon"}, "s3": {"anon": True}}


@dataclass(frozen=True, slots=True)
class SourceDataset:
    """One dataset as it lies at a source: its metadata, as text and parsed, and the address of its folder."""

    folder: str
    info: DatasetInfo
    features_text: str
    features: FeatureTree


def open_dataset(source: str, card: Card, version: str) -> SourceDataset:
    """Read a dataset's metadata at SOURCE/NAME/VERSION, NAME being the card's name or an alias of it.

    Raises: UserError when it is not there or its metadata cannot be understood.
    """
    folders = [f"{source}/{name}/{version}" for name in card.names]
    for folder in folders:
        info_text = _read_text(f"{folder}/{INFO_FILE}")
        if info_text is not None:
            features_text = _read_text(f"{folder}/{FEATURES_FILE}")
            if features_text is None:
                raise UserError(
                    f"{folder}: has {INFO_FILE} but no {FEATURES_FILE}; this copy is not complete"
                )
            info = parse_dataset_info(info_text, f"{folder}/{INFO_FILE}")
            return SourceDataset(
                folder, info, features_text, parse_features(features_text, f"{folder}/{FEATURES_FILE}")
            )
    where = " or ".join(folders)
    raise UserError(f"{card.name} {version}: no {INFO_FILE} in {where}; is --source right and within reach?")


def open_stream(url: str) -> BinaryIO:
    """Open a file for reading from its start; only what is read is transferred, in blocks.

    Raises: FileNotFoundError, PermissionError, and what the transport raises.
    """
    import fsspec

    return cast(BinaryIO, fsspec.open(url, "rb", **_options(url)).open())


def file_size(url: str) -> int:
    """The size of a file in bytes. Raises: FileNotFoundError."""
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url, **_options(url))
    return int(filesystem.size(path))


def transport_errors() -> tuple[type[Exception], ...]:
    """What reading from a source can raise when the source, the network or the disk fails."""
    import aiohttp
    from gcsfs.retry import HttpError

    return (OSError, aiohttp.ClientError, HttpError)


def _read_text(url: str) -> str | None:
    try:
        with open_stream(url) as stream:
            return stream.read().decode()
    except FileNotFoundError:
        return None
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: cannot be opened ({error}); expected a folder, gs:// or https://") from error
    except transport_errors() as error:
        raise UserError(f"{url}: cannot be read ({type(error).__name__}: {error})") from error


def _options(url: str) -> dict[str, Any]:
    return _ANONYMOUS.get(url.split("://", 1)[0], {})
