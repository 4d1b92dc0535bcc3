"""What the fields of a request mean: openpi's and OpenVLA's own names, and those that a user's file gives.

observation/exterior_image_1_left: primary
observation/joint_position: state
observation/gripper_position: ignore
task: prompt
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from convert.prompt import CAMERA_ROLES, Asking, CameraRole
from oxe_mix.errors import UserError, did_you_mean
from oxe_mix.yaml_files import line_of, load_yaml

Meaning = Literal[CameraRole, "state", "prompt", "unnorm_key", "seed", "ignore"]
ObsKeys = Mapping[str, Meaning]  # what each field of a request means, by its path
_FILE = TypeAdapter(dict[str, Meaning])

_TEXTS: dict[str, Meaning] = {
    "prompt": "prompt",
    "instruction": "prompt",
    "unnorm_key": "unnorm_key",
    "seed": "seed",
    "state": "state",
}
# What openpi's clients send of every robot, asked for or not.
_STOCK: dict[str, Meaning] = {"observation/wrist_image": "wrist", "observation/state": "state"}


def obs_keys(asking: Asking, file: Path | None = None) -> ObsKeys:
    """The meanings for a checkpoint, and those of a file, which win.

    `image` and `observation/image` are its first camera, `images/ROLE` each by its role. openpi's wrist image
    and state are ignored by a checkpoint that was trained without them: its clients send them always. A field
    that has no meaning is refused.

    Raises: UserError, one line per problem, for a file that cannot be read or names what there is not.
    """
    known: dict[str, Meaning] = dict.fromkeys(("image", "observation/image"), asking.cameras[0])
    known |= {f"images/{role}": role for role in CAMERA_ROLES}
    taken = _taken(asking)
    known |= {key: what if what in taken else "ignore" for key, what in _STOCK.items()}
    return known | _TEXTS | (_read(file, asking) if file else {})


def _taken(asking: Asking) -> tuple[str, ...]:
    return (*asking.cameras, *(("state",) if asking.state else ()), "prompt", "unnorm_key", "seed", "ignore")


def _read(file: Path, asking: Asking) -> dict[str, Meaning]:
    raw = load_yaml(file)
    try:
        found = _FILE.validate_python(raw)
    except ValidationError as error:
        raise UserError("\n".join(_said(file, problem) for problem in error.errors())) from error
    taken = _taken(asking)
    if wrong := [key for key in found if found[key] not in taken]:
        known = ", ".join(taken)
        raise UserError(
            "\n".join(
                f"{_place(file, key)}: the checkpoint takes no {found[key]}; it takes {known}"
                for key in wrong
            )
        )
    return found


def _said(file: Path, problem: Any) -> str:
    if problem["type"] == "literal_error":
        known = did_you_mean(str(problem["input"]), list(get_args(Meaning)))
        return f"{_place(file, problem['loc'][0])}: {problem['input']!r} is unknown{known}"
    where = _place(file, problem["loc"][0]) if problem["loc"] else str(file)
    return f"{where}: expected a mapping from fields of requests to what they mean"


def _place(file: Path, key: str) -> str:
    return f"{file}:{line_of(file, (key,))}: {key}"
