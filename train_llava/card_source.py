"""What a run left, read for its model card: each part is there, or it is not."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.action_codec import CODEC_FILE, ActionCodec, read_codec
from convert.finish import CARDS
from convert.manifest import ConvertedDataset, Manifest
from oxe_mix.cards import Card, load_card
from oxe_mix.files import read_json, read_model
from train_llava.base_record import ADAPTER_CONFIG
from train_llava.config import METRICS_FILE, RunConfig, load_config
from train_llava.metrics_log import read_metrics
from train_llava.result import CONFIG_FILE, DATA_MANIFEST, REPORT_FILE, VERSIONS_FILE

_MANIFESTS = "data_*manifest.json"


@dataclass(frozen=True, slots=True)
class CardSource:
    """A run's files; None or empty where there is none."""

    name: str
    config: RunConfig | None
    report: dict[str, Any] | None  # evaluation.json
    lines: tuple[dict[str, Any], ...]  # metrics.jsonl
    codec: ActionCodec | None
    manifests: tuple[Manifest, ...]  # of the converted folders, that of the command first
    cards: dict[str, Card]
    versions: dict[str, str]
    hashes: dict[str, str]  # SHA-256 of the manifests and the codec
    is_whole: bool  # not adapters, whose base lies elsewhere

    @property
    def held_out(self) -> dict[str, Any] | None:
        """The figures on held-out episodes."""
        return None if self.report is None else self.report["held_out"]

    @property
    def is_parallel(self) -> bool:
        """Whether one pass answers all tokens of a chunk."""
        return self.config is not None and self.config.train.parallel_action_slots

    @property
    def has_curves(self) -> bool:
        """Whether a step of training was logged."""
        return any("loss" in line for line in self.lines)

    @property
    def datasets(self) -> list[ConvertedDataset]:
        """Of all converted folders."""
        return [own for manifest in self.manifests for own in manifest.datasets]

    @property
    def drawn(self) -> dict[str, float]:
        """The share of each source in the draws of training, as last logged."""
        shares: dict[str, float] = next(
            (line["shares"] for line in reversed(self.lines) if "shares" in line), {}
        )
        return shares

    def card_of(self, name: str) -> Card | None:
        """The card of a dataset, which may go by one of its other names."""
        return next((card for card in self.cards.values() if name in card.names), None)


def read_source(run: Path) -> CardSource:
    """Read a run's folder. Raises: UserError for a file that is broken."""
    config = load_config(run / CONFIG_FILE) if (run / CONFIG_FILE).exists() else None
    # The command's own first, data_1_, data_2_ after it.
    manifests = sorted(
        run.glob(_MANIFESTS), key=lambda file: (file.name != DATA_MANIFEST, len(file.name), file.name)
    )
    hashed = [*manifests, *([run / CODEC_FILE] if (run / CODEC_FILE).exists() else [])]
    return CardSource(
        name=run.resolve().name if config is None else config.name,
        config=config,
        report=_json(run / REPORT_FILE, "the report of a run"),
        lines=tuple(read_metrics(run / METRICS_FILE)),
        codec=read_codec(run) if (run / CODEC_FILE).exists() else None,
        manifests=tuple(
            read_model(Manifest, file, "a manifest that oxe-mix convert writes") for file in manifests
        ),
        cards={file.stem: load_card(file) for file in sorted((run / CARDS).glob("*.yaml"))},
        versions=_json(run / VERSIONS_FILE, "the versions that a run was made with") or {},
        hashes={file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in hashed},
        is_whole=not (run / ADAPTER_CONFIG).exists(),
    )


def left_out(file: str) -> str:
    """The sentence that stands for what a file would have said."""
    return f"There is no `{file}` in this folder, so what it would say is left out."


def _json(file: Path, what: str) -> Any:
    return read_json(file, what) if file.exists() else None
