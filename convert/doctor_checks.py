"""All that `oxe-mix doctor` checks of a dataset: one table, in the order in which it is told."""

from __future__ import annotations

from collections.abc import Callable

from convert.doctor_gripper import gripper_polarity, gripper_range
from convert.doctor_labels import advised_mods, instructions, readable, repeated_episodes
from convert.doctor_mends import Place
from convert.doctor_numbers import action_range, finite, idle_steps, known_figures, width
from convert.doctor_pictures import blank_frames, colour_channels, frozen_frames, repeated_frames
from convert.doctor_summary import DatasetSummary, Outcome
from convert.doctor_units import plausible_units
from oxe_mix.verdicts import Verdict

Check = Callable[[DatasetSummary], Outcome]

CHECKS: tuple[tuple[str, Check], ...] = (
    ("episodes", readable),
    ("finite numbers", finite),
    ("action width", width),
    ("action range", action_range),
    ("action units", plausible_units),
    ("known figures", known_figures),
    ("gripper range", gripper_range),
    ("gripper polarity", gripper_polarity),
    ("idle steps", idle_steps),
    ("frozen frames", frozen_frames),
    ("repeated frames", repeated_frames),
    ("blank frames", blank_frames),
    ("colour channels", colour_channels),
    ("repeated episodes", repeated_episodes),
    ("instructions", instructions),
    ("advised mods", advised_mods),
)


def judge(data: DatasetSummary, place: Place) -> list[Verdict]:
    """Every check of one dataset."""
    outcomes = [(name, check(data)) for name, check in CHECKS]
    return [
        Verdict(
            level=outcome.level,
            subject=data.name,
            check=name,
            text=outcome.text,
            examples=outcome.examples,
            mend=place.fill(outcome.mend, data.name),
        )
        for name, outcome in outcomes
    ]
