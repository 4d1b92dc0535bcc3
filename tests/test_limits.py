"""A user's file of limits says what is meant, or is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from oxe_mix.errors import UserError
from train_llava.acting.limits import Bounds, Limits, MaxNorm, read_limits


def test_limits_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "limits.yaml"
    file.write_text(
        "default:\n  max_norm: {translation: 0.05}\n"
        "datasets:\n  arm:\n    low: [null, 0, 0, 0, 0, 0, 0.5]\n    max_jump: [1e-3, null, 0, 0, 0, 0, 1]\n"
    )
    assert read_limits(file) == Limits(
        default=Bounds(max_norm=MaxNorm(translation=0.05)),
        datasets={"arm": Bounds(low=(None, 0, 0, 0, 0, 0, 0.5), max_jump=(0.001, None, 0, 0, 0, 0, 1))},
    )
    (tmp_path / "empty.yaml").write_text("{}")
    assert read_limits(tmp_path / "empty.yaml") == Limits()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "limits are a mapping with default, datasets or both"),
        ("defaults: {}", "defaults: unknown key; did you mean default?"),
        ("datasets: {arm: {max_jumb: [1]}}", "datasets.arm.max_jumb: unknown key; did you mean max_jump?"),
        ("default: {max_norm: {rotate: 1}}", "default.max_norm.rotate: unknown key; did you mean rotation?"),
        ("default: {low: [0, fast]}", "default.low.1: Input should be a valid number"),
        ("default: {high: [.inf]}", "default.high.0: Input should be a finite number"),
        ("default: {low: [true]}", "default.low.0: true is no number"),
        ("default: {max_jump: [-1]}", "default.max_jump.0: Input should be greater than or equal to 0"),
        ("default: {", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "limits.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_limits(file)
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
