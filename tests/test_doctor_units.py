"""`oxe-mix doctor`: movements in other units than metres and radians are found, by a heuristic."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.doctor_command import DoctorOptions, run_doctor
from oxe_mix.cards import Cards
from tests.recorded_episodes import clean, write


def _said(capsys: pytest.CaptureFixture[str], folder: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """By dataset, what is said of its units."""
    capsys.readouterr()
    assert run_doctor(DoctorOptions(folder=folder, json=True, **options)) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    return {one["subject"]: one for one in checks if one["check"] == "action units"}


@pytest.mark.parametrize(
    ("positions", "angles", "wrong"),
    [
        (1000, 1000, {"positions": "more than 1 m a step", "angles": "more than 1 rad a step"}),
        (1e-3, 1e-3, {"positions": "all below 0.0001 m a step"}),
        (1000, 1, {"positions": "more than 1 m a step"}),
        (1, 57.3, {"angles": "more than 1 rad a step"}),
        (1, 1e-4, {"angles": "all below 0.0001 rad a step"}),
        (1, 1, {}),
    ],
)
def test_movements_in_millimetres_and_degrees_are_found(
    positions: float,
    angles: float,
    wrong: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    episodes = clean()
    for episode in episodes:
        episode.moves *= np.array([positions] * 3 + [angles] * 3, np.float32)
    said = _said(capsys, write(tmp_path / "data", episodes))["viola"]
    found = dict(
        re.findall(r"(positions|angles) reach [\d.e-]+ in dimension \d, (.+?): another", said["text"])
    )
    assert (said["level"], found) == ("warning" if wrong else "ok", wrong)
    assert ("action.units" in said["mend"]) == bool(wrong)


def test_a_card_that_names_its_units_is_believed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cards: Cards
) -> None:
    episodes = clean()
    for episode in episodes:
        episode.moves[:, :3] *= 1000
    data, own = write(tmp_path / "data", episodes), tmp_path / "cards"
    own.mkdir()
    text = cards.file_of(cards.get("viola")).read_text()
    units = "units: [mm, mm, mm, rad, rad, rad, 1 open]"
    (own / "viola.yaml").write_text(text.replace("dims: 7", f"dims: 7\n  {units}"))
    assert _said(capsys, data)["viola"]["level"] == "warning"
    assert _said(capsys, data, cards=own)["viola"]["level"] == "ok"


def test_poses_may_be_far_from_zero_but_not_in_millimetres(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cards: Cards
) -> None:
    own = tmp_path / "cards"
    own.mkdir()
    text = cards.file_of(cards.get("viola")).read_text()
    (own / "viola.yaml").write_text(text.replace("action_kind: delta", "action_kind: absolute"))
    for metres, level in ((2.0, "ok"), (800.0, "warning")):
        episodes = clean()
        for episode in episodes:
            episode.moves[:, 0] += metres
        data = write(tmp_path / f"{metres:g}", episodes)
        said = _said(capsys, data, cards=own)["viola"]
        assert said["level"] == level
    assert "more than 10 m from the base" in said["text"]


def test_synthetic_data_is_in_metres_and_radians(
    bucket26: Path, data: Path, llava: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of real episodes the same is asked beside everything else: test_doctor_data."""
    for folder, num in ((data, 6), (llava, 6), (bucket26, 26)):
        said = _said(capsys, folder, every=True)
        assert [one["level"] for one in said.values()] == ["ok"] * num
