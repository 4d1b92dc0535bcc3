"""A policy server's answers: what comes back over the websocket and over HTTP, and what it counts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.action_codec import read_codec, write_codec
from tests.serving import (
    FRAME,
    REQUEST,
    Served,
    Setting,
    ask,
    decoded,
    http,
    served,
    tiny_policy,
    write_checkpoint,
)
from train_llava.acting import json_numpy
from train_llava.acting.handshake import metadata
from train_llava.acting.limits import Bounds, Limits
from train_llava.acting.load import Loading, load_policy
from train_llava.acting.observation import Observation
from train_llava.acting.policy import Policy
from train_llava.acting.tally import PHASES

OBSERVATION = Observation({"primary": FRAME}, "pick up the red block", "viola")
# Between actions at most so much, so that a second answer differs from the first only by what is allowed.
TIGHT = Limits(default=Bounds(low=(-0.5,) * 6 + (0,), high=(0.5,) * 6 + (1,)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> Policy:
    return tiny_policy(checkpoint)


@pytest.fixture(scope="module")
def expected(policy: Policy) -> np.ndarray[Any, Any]:
    """What the policy answers to `REQUEST` without a server, float32 [1, 7]."""
    return policy.answer([policy.question(OBSERVATION)])[0].actions.astype(np.float32)


@pytest.fixture(scope="module")
def server(checkpoint: Path, policy: Policy) -> Iterator[Served]:
    with served(checkpoint, policy) as running:
        yield running


def test_a_client_is_first_told_what_it_needs_to_know(server: Served, checkpoint: Path) -> None:
    with server.connect() as socket:
        told = decoded(socket.recv())
    assert told["protocol"] == 1
    assert told["codec_sha256"] == hashlib.sha256((checkpoint / "action_codec.json").read_bytes()).hexdigest()
    assert (told["action_dim"], told["chunk"], told["decode"]) == (7, 1, "sequential")
    assert told["action_names"] == ["x", "y", "z", "rotation 1", "rotation 2", "rotation 3", "gripper"]
    assert (told["units"], told["cameras"], told["image_size"]) == ("unknown", ["primary"], [64, 64])
    assert told["unnorm_keys"] == ["bridge_orig", "viola"]
    viola = told["robots"]["viola"]
    assert (viola["robot"], viola["control_hz"], viola["action_kind"]) == ("Franka", 20, "delta")
    assert told["wants_state"] is False
    assert told["request_fields"]["observation/image"] == "primary"
    assert told["ignored_fields"] == ["observation/state", "observation/wrist_image"]


@pytest.mark.parametrize("robots", [["bridge_orig"], ["bridge_orig", "viola"]])
def test_units_are_those_of_the_cards(robots: list[str], tmp_path: Path) -> None:
    units = ["m", "m", "m", "rad", "rad", "rad", "1 open"]
    folder = write_checkpoint(tmp_path / "known")
    for robot in robots:
        card = folder / "cards" / f"{robot}.yaml"
        card.write_text(card.read_text().replace("  dims: 7\n", f"  dims: 7\n  units: {units}\n"))
    told = metadata(folder, tiny_policy(folder), {})
    assert [robot for robot, own in told["robots"].items() if own["units"] == units] == robots
    assert told["units"] == (units if len(robots) == 2 else "unknown")


def test_what_no_card_says_is_unknown(tmp_path: Path, policy: Policy) -> None:
    joints = "berkeley_mvp_converted_externally_to_rlds"  # its card has another encoding than an arm's
    bare = write_checkpoint(tmp_path / "bare", state=True, robots=("bridge_orig", joints, "viola"))
    (bare / "cards" / "viola.yaml").unlink()
    with served(bare, tiny_policy(bare)) as running, running.connect() as socket:
        told = decoded(socket.recv())
        refused = ask(socket, REQUEST)
    assert told["action_names"] == "unknown"
    assert told["robots"]["viola"]["robot"] == told["robots"]["viola"]["control_hz"] == "unknown"
    assert told["robots"]["bridge_orig"]["action_names"] != "unknown"
    assert told["robots"][joints]["robot"] != "unknown"
    assert told["robots"][joints]["action_names"] == "unknown"
    assert (told["wants_state"], told["robots"]["viola"]["state_width"]) == (True, 8)
    assert refused == "state: missing; give [8] in robot units"


def test_the_answer_is_the_policys_own(server: Served, expected: np.ndarray[Any, Any]) -> None:
    with server.connect() as socket:
        socket.recv()
        reply = ask(socket, REQUEST)
    assert reply["actions"].dtype == np.float32
    assert (reply["actions"] == expected).all()
    assert reply["clamped"] == []
    timing = reply["server_timing"]
    assert set(timing) == set(PHASES)
    assert timing["total"] >= timing["preprocess"] + timing["prefill"] + timing["decode"] > 0


def test_another_robot_has_other_units(server: Served, expected: np.ndarray[Any, Any]) -> None:
    with server.connect() as socket:
        socket.recv()
        other = ask(socket, REQUEST | {"unnorm_key": "bridge_orig"})
        missing = ask(socket, {"image": FRAME, "prompt": "go"})
        unknown = ask(socket, REQUEST | {"unnorm_key": "violin"})
    assert (other["actions"] != expected).any()
    assert missing == "unnorm_key: name one of bridge_orig, viola"
    assert unknown == "unnorm_key: unknown 'violin'; did you mean viola?"


def test_a_bad_request_is_told_as_text_and_the_connection_goes_on(server: Served) -> None:
    with server.connect() as socket:
        socket.recv()
        assert ask(socket, REQUEST | {"image": FRAME[..., 0]}).startswith("image: is uint8 [256, 256]")
        assert ask(socket, {"image": FRAME, "unnorm_key": "viola"}).startswith(
            "prompt: the instruction '' is empty"
        )
        assert ask(socket, REQUEST | {"prompt": "<image>"}).startswith("prompt: ")
        assert ask(socket, "text") == "request: is text; send msgpack in a binary message"
        assert ask(socket, b"\xc1").startswith("request: is not msgpack")
        assert "actions" in ask(socket, REQUEST)


@pytest.mark.parametrize("is_encoded", [False, True])
def test_over_http_it_is_what_openvlas_server_answers(
    server: Served, expected: np.ndarray[Any, Any], is_encoded: bool
) -> None:
    image = json.loads(json_numpy.dumps(FRAME))
    body = json.dumps({"image": image, "instruction": REQUEST["prompt"], "unnorm_key": "viola"})
    status, content, headers = http(
        server.port, "/act", (json.dumps({"encoded": body}) if is_encoded else body).encode()
    )
    assert status == 200
    answer = json.loads(content) if is_encoded else content
    assert answer == json.loads(json_numpy.dumps(expected[0]))
    assert headers["X-Clamped"] == "0"
    assert re.fullmatch(r"queue;dur=[\d.]+, preprocess;dur=.*, total;dur=[\d.]+", headers["Server-Timing"])


def test_over_http_errors_are_statuses_with_a_line(server: Served) -> None:
    assert http(server.port, "/act", b"{}")[:2] == (
        400,
        {"error": "unnorm_key: name one of bridge_orig, viola"},
    )
    assert http(server.port, "/act", b"[")[0] == 400
    assert http(server.port, "/")[:2] == (
        400,
        {"error": "request: here is a websocket; over HTTP there is POST /act"},
    )
    assert http(server.port, "/nothing")[:2] == (404, {"error": "request: not found"})
    assert http(server.port, "/act")[:2] == (405, {"error": "request: method not allowed"})
    assert http(server.port, "/healthz")[:2] == (200, {"status": "ok"})


def test_a_chunk_comes_whole(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "chunk", chunk=3, robots=("viola",))
    body = json.dumps({"image": json.loads(json_numpy.dumps(FRAME)), "instruction": "go"}).encode()
    with served(folder, tiny_policy(folder)) as running, running.connect() as socket:
        assert decoded(socket.recv())["chunk"] == 3
        # With one robot its key need not be named.
        assert ask(socket, {"observation/image": FRAME, "prompt": "go"})["actions"].shape == (3, 7)
        assert http(running.port, "/act", body)[1]["shape"] == [3, 7]


def test_what_is_beyond_a_limit_is_clamped_and_said(checkpoint: Path, policy: Policy) -> None:
    with served(checkpoint, policy, Setting(limits=TIGHT)) as running, running.connect() as socket:
        socket.recv()
        reply = ask(socket, REQUEST)
        metrics = http(running.port, "/metrics")[1]
    assert (np.abs(reply["actions"][0, :6]) <= 0.5).all()
    first = reply["clamped"][0]
    assert set(first) == {"step", "dimension", "given", "limit", "rule"}
    assert abs(first["given"]) > 0.5
    assert f'oxe_mix_clamped_values_total{{rule="range"}} {len(reply["clamped"])}' in metrics


def test_what_must_not_be_sent_is_not(checkpoint: Path, policy: Policy) -> None:
    body = json.dumps({"image": json.loads(json_numpy.dumps(FRAME)), "prompt": "go", "unnorm_key": "viola"})
    with (
        served(checkpoint, policy, Setting(limits=TIGHT, rejects=True)) as running,
        running.connect() as socket,
    ):
        socket.recv()
        assert re.fullmatch(r"actions: viola: .*\(range\); nothing is sent", ask(socket, REQUEST))
        assert http(running.port, "/act", body.encode())[0] == 422
        assert running.server.tally.errors == {"rejected": 2}


def test_a_jump_is_measured_from_what_the_same_client_was_sent(checkpoint: Path, policy: Policy) -> None:
    calm = Limits(default=Bounds(max_jump=(1e-4,) * 6 + (None,)))
    changed = REQUEST | {"image": 255 - FRAME, "prompt": "put it on the blue block now"}
    with (
        served(checkpoint, policy, Setting(limits=calm)) as running,
        running.connect() as one,
        running.connect() as two,
    ):
        one.recv()
        two.recv()
        first, other = ask(one, REQUEST), ask(one, changed)
        alone = ask(two, changed)
        another_robot = ask(one, changed | {"unnorm_key": "bridge_orig"})
        back = ask(one, changed)
    assert alone["clamped"] == another_robot["clamped"] == []
    assert (alone["actions"] != first["actions"]).any()
    assert {one["rule"] for one in other["clamped"]} == {one["rule"] for one in back["clamped"]} == {"jump"}
    assert np.abs(back["actions"] - other["actions"])[0, :6].max() <= 1.01e-4
    assert np.abs(other["actions"] - first["actions"])[0, :6].max() <= 1.01e-4


def test_what_no_text_can_hold_is_the_askers_fault(server: Served) -> None:
    body = {"image": json.loads(json_numpy.dumps(FRAME)), "prompt": "\ud800", "unnorm_key": "viola"}
    status, said, _ = http(server.port, "/act", json.dumps(body).encode())
    assert (status, said["error"]) == (
        400,
        "prompt: is no Unicode text: it holds half of a surrogate pair",
    )
    assert http(server.port, "/healthz")[0] == 200


def test_where_actions_are_drawn_each_is_a_draw_of_its_own(checkpoint: Path) -> None:
    drawing = load_policy(checkpoint, Loading(device="cpu", temperature=1.0))
    with served(checkpoint, drawing) as running, running.connect() as socket:
        socket.recv()
        drawn = {ask(socket, REQUEST)["actions"].tobytes() for _ in range(4)}
        seeded = {ask(socket, REQUEST | {"seed": 7})["actions"].tobytes() for _ in range(2)}
    assert (len(drawn), len(seeded)) == (4, 1)


def test_a_robot_without_state_or_second_camera_is_asked_without(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "run", cameras=("primary", "wrist"), state=True)
    codec = read_codec(folder)
    states = {"bridge_orig": codec.states["bridge_orig"]}
    write_codec(folder, codec.model_copy(update={"states": states, "cameras": {"viola": ("primary",)}}))
    both = REQUEST | {"observation/wrist_image": FRAME, "state": np.zeros(8)}
    with served(folder, tiny_policy(folder)) as running, running.connect() as socket:
        told = decoded(socket.recv())
        assert "actions" in ask(socket, REQUEST)
        assert "actions" in ask(socket, both | {"unnorm_key": "bridge_orig"})
        too_much = ask(socket, REQUEST | {"observation/wrist_image": FRAME})
        state = ask(socket, REQUEST | {"state": np.zeros(8)})
    assert too_much.endswith("the checkpoint knows no camera wrist of viola; it takes primary")
    assert state == "state: the checkpoint was trained without the state of viola"
    viola, bridge = told["robots"]["viola"], told["robots"]["bridge_orig"]
    assert (viola["cameras"], viola["state_width"]) == (["primary"], None)
    assert (bridge["cameras"], bridge["state_width"]) == (["primary", "wrist"], 8)


def test_the_metrics_are_what_prometheus_reads(server: Served) -> None:
    status, text, headers = http(server.port, "/metrics")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    values: dict[str, float] = {}
    kinds: dict[str, str] = {}
    for line in text.splitlines():
        if found := re.fullmatch(r"# TYPE (\w+) (counter|gauge|histogram)", line):
            kinds[found[1]] = found[2]
        elif not line.startswith("# HELP "):
            sample = re.fullmatch(r'(\w+(?:\{\w+="[^"]*"(?:,\w+="[^"]*")*\})?) ([\d.]+)', line)
            assert sample, line
            assert sample[1] not in values
            values[sample[1]] = float(sample[2])
    assert kinds["oxe_mix_phase_seconds"] == "histogram"
    answered = sum(values[f'oxe_mix_requests_total{{way="{way}"}}'] for way in ("websocket", "http"))
    for phase in PHASES:
        name = f'oxe_mix_phase_seconds_bucket{{phase="{phase}",le='
        buckets = [value for key, value in values.items() if key.startswith(name)]
        assert buckets == sorted(buckets)
        assert buckets[-1] == values[f'oxe_mix_phase_seconds_count{{phase="{phase}"}}'] == answered > 0
    assert values["oxe_mix_connections"] == 0
    assert values["oxe_mix_in_flight"] == 0
