"""A dataset as it lies at a source: its metadata, parsed, and the files that hold its records."""

from __future__ import annotations

from dataclasses import dataclass, field

from oxe_mix.cards import Card
from oxe_mix.errors import UserError
from oxe_mix.filesystems import list_folder
from oxe_mix.rlds import (
    FEATURES_FILE,
    INFO_FILE,
    DatasetInfo,
    FeatureTree,
    parse_dataset_info,
    parse_features,
)
from oxe_mix.source_file import Patience, SourceFile
from oxe_mix.transport import read_text


@dataclass(frozen=True, slots=True)
class SourceDataset:
    """One dataset at a source: its folder, copies of it elsewhere, metadata, and files where they are
    listed.
    """

    folder: str
    mirrors: tuple[str, ...]  # the same folder in the copies that stand behind this one in the mix
    info: DatasetInfo
    features_text: str
    features: FeatureTree
    files: dict[str, SourceFile] = field(default_factory=dict)  # empty where nothing can be listed


def open_dataset(sources: tuple[str, ...], card: Card, version: str, patience: Patience) -> SourceDataset:
    """Read a dataset's metadata at SOURCE/NAME/VERSION, in the first of `sources` that has it.

    NAME is the card's name or an alias of it.

    Raises: UserError when it is not there or its metadata cannot be understood.
    """
    problems, looked = [], []
    for i, source in enumerate(sources):
        for name in card.names:
            folder = f"{source}/{name}/{version}"
            looked.append(folder)
            try:
                text = read_text(f"{folder}/{INFO_FILE}", patience)
            except UserError as error:
                problems.append(str(error))
                break  # the source itself fails: its other folders would, too
            if text is not None:
                mirrors = tuple(f"{mirror}/{name}/{version}" for mirror in sources[i + 1 :])
                return _read(folder, mirrors, text, patience)
    if problems:
        raise UserError("\n".join(problems))
    if not card.public:
        raise UserError(f"{card.name}: no public copy is known; name yours with source: or --source")
    where = " or ".join(looked)
    raise UserError(f"{card.name} {version}: no {INFO_FILE} in {where}; is --source right?")


def _read(folder: str, mirrors: tuple[str, ...], info_text: str, patience: Patience) -> SourceDataset:
    features_text = read_text(f"{folder}/{FEATURES_FILE}", patience)
    if features_text is None:
        raise UserError(f"{folder}: has {INFO_FILE} but no {FEATURES_FILE}; this copy is not complete")
    return SourceDataset(
        folder=folder,
        mirrors=mirrors,
        info=parse_dataset_info(info_text, f"{folder}/{INFO_FILE}"),
        features_text=features_text,
        features=parse_features(features_text, f"{folder}/{FEATURES_FILE}"),
        files=list_folder(folder) or {},
    )
