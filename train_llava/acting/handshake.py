"""What a server says of itself to each client that connects, before anything is asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.action_codec import CODEC_FILE, ActionCodec
from convert.prompt import CAMERA_ROLES
from oxe_mix import __version__
from oxe_mix.cards import Card
from train_llava.acting.obs_keys import ObsKeys
from train_llava.card_source import CardSource, read_source
from train_llava.dimensions import ARM, is_arm

if TYPE_CHECKING:
    from train_llava.acting.policy import Policy

PROTOCOL = 1  # goes up when a client of before could no longer read the answers
UNKNOWN = "unknown"


def metadata(checkpoint: Path, policy: Policy, keys: ObsKeys) -> dict[str, Any]:
    """The first message of a connection: plain values. What no file of the checkpoint says is "unknown"."""
    codec, source = policy.codec, read_source(checkpoint)
    robots = {key: _robot(key, codec, _card(source, key)) for key in sorted(codec.datasets)}
    return {
        "protocol": PROTOCOL,
        "server": f"oxe-mix {__version__}",
        "checkpoint": checkpoint.resolve().name,
        "codec_sha256": source.hashes[CODEC_FILE],
        "action_dim": codec.action_dim,
        "chunk": codec.chunk,
        "decode": "parallel" if policy.is_parallel else "sequential",
        "action_names": _common(robots, "action_names"),
        "units": _common(robots, "units"),
        "cameras": list(policy.cameras),
        "image_size": list(policy.image_size),
        "wants_state": codec.asking.state,
        "unnorm_keys": sorted(codec.datasets),
        "robots": robots,
        "request_fields": _request_fields(codec, keys),
        "ignored_fields": sorted(key for key, meaning in keys.items() if meaning == "ignore"),
    }


def _common(robots: dict[str, dict[str, Any]], what: str) -> Any:
    """What is true of each robot."""
    first, *others = (robot[what] for robot in robots.values())
    return first if all(other == first for other in others) else UNKNOWN


def _card(source: CardSource, key: str) -> Card | None:
    """A dataset's card, with the recipe that its actions were made by."""
    card = source.card_of(key)
    recipe = next((own.recipe for own in source.datasets if own.name == key), None)
    return card if card is None or recipe is None else card.with_recipe(recipe)


def _request_fields(codec: ActionCodec, keys: ObsKeys) -> dict[str, str]:
    """The fields that say something to this checkpoint."""
    others = set(CAMERA_ROLES) - set(codec.asking.cameras) | {"ignore"}
    others |= set() if codec.asking.state else {"state"}
    return {key: meaning for key, meaning in sorted(keys.items()) if meaning not in others}


def _robot(key: str, codec: ActionCodec, card: Card | None) -> dict[str, Any]:
    """What is known of the robot that an unnorm_key stands for."""
    units = None if card is None else card.action.units
    return {
        "robot": UNKNOWN if card is None else card.robot,
        "control_hz": UNKNOWN if card is None or card.control_hz is None else card.control_hz,
        "action_kind": UNKNOWN if card is None else card.action_kind,
        "action_names": list(ARM) if is_arm(card, codec.action_dim) else UNKNOWN,
        "units": UNKNOWN if units is None else list(units),
        "cameras": list(codec.asking_of(key).cameras),
        "state_width": len(codec.states[key].mask) if codec.asking.state and key in codec.states else None,
    }
