"""Folders of checkpoints: whole or absent, the last few and the best; and what a run may go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from oxe_mix.errors import UserError
from train_llava.checkpoints import RESUME, About, Checkpoints, check_same_run, write_about

ABOUT = About(
    step=5,
    config={"train": {"micro_batch": 4, "zero": {"stage": 2}}, "logging": {"every": 1}, "seed": 0},
    data="abc",
    num_ranks=2,
    global_batch=8,
    num_steps=100,
)


def _write(checkpoints: Checkpoints, step: int, best: float | None = None) -> None:
    partial = checkpoints.partial(step)
    (partial / RESUME).mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"x" * 100)
    write_about(partial, ABOUT.model_copy(update={"step": step}))
    checkpoints.publish(step, best)


def _names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_the_last_ones_are_kept_and_the_best_beside_them(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for step, best in ((5, 0.5), (10, 0.3), (15, None), (20, None), (100, None)):
        _write(checkpoints, step, best)
    assert _names(checkpoints) == ["best.json", "step-10", "step-100", "step-20"]
    assert checkpoints.latest() == tmp_path / "checkpoints/step-100"  # by number, not by name
    assert checkpoints.best() == (10, 0.3)
    _write(checkpoints, 105, 0.1)
    assert _names(checkpoints) == ["best.json", "step-100", "step-105"]


def test_a_half_written_one_is_never_picked_and_goes_with_the_next_start(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    _write(checkpoints, 5)
    (checkpoints.partial(10) / RESUME).mkdir(parents=True)
    assert checkpoints.latest() == tmp_path / "checkpoints/step-5"
    checkpoints.clean()
    assert _names(checkpoints) == ["step-5"]


def _checkpoint(tmp_path: Path) -> Path:
    write_about(tmp_path, ABOUT)
    return tmp_path


def _changed(**changes: Any) -> About:
    return ABOUT.model_copy(update=changes)


def test_a_run_goes_on_when_only_what_is_logged_and_kept_changed(tmp_path: Path) -> None:
    config = {**ABOUT.config, "logging": {"every": 50}}
    assert check_same_run(_checkpoint(tmp_path), _changed(config=config), weights_only=False).step == 5


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"data": "other"}, "was trained on other data; name another folder"),
        ({"num_ranks": 4}, "written by 2 ranks, and now there are 4.*WEIGHTS_ONLY=1"),
        ({"global_batch": 16}, "a step took 8 samples, and now takes 16"),
        ({"config": {**ABOUT.config, "seed": 1}}, "seed was 0, and is 1; set it back"),
        (
            {"config": {**ABOUT.config, "train": {"micro_batch": 2, "zero": {"stage": 2}}}},
            r"train\.micro_batch was 4, and is 2",
        ),
    ],
)
def test_another_run_is_refused_with_what_differs(tmp_path: Path, now: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_same_run(_checkpoint(tmp_path), _changed(**now), weights_only=False)


def test_with_the_weights_alone_the_ranks_may_differ_but_not_what_a_step_is(tmp_path: Path) -> None:
    train = {"micro_batch": 2, "zero": {"stage": 3}}
    now = _changed(num_ranks=4, config={**ABOUT.config, "train": train})
    assert check_same_run(_checkpoint(tmp_path), now, weights_only=True).step == 5
    with pytest.raises(UserError, match="a step took 8 samples"):
        check_same_run(tmp_path, _changed(num_ranks=4, global_batch=16), weights_only=True)
    with pytest.raises(UserError, match="seed was 0"):
        check_same_run(tmp_path, _changed(config={**ABOUT.config, "seed": 1}), weights_only=True)


def test_a_checkpoint_without_its_note_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.json: no such file"):
        check_same_run(tmp_path, ABOUT, weights_only=False)
