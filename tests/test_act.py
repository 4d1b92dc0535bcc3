"""`oxe-mix act` and `inference_action.py`: files, folders and videos in, JSON in robot units out."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convert.action_codec import decode, read_codec, write_codec
from oxe_mix.errors import UserError
from tests.conftest import OXE_MIX, PYTHON, ROOT, run
from tests.serving import write_checkpoint
from train_llava.acting.act_command import ActOptions, run_act
from train_llava.acting.load import Loading, load_policy
from train_llava.acting.observation import Observation, ObservationError
from train_llava.loading import load_checkpoint
from train_llava.processor import OneViewProcessor

CPU = Loading(device="cpu")
RED = "Pick up the red block."


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def seeing_much(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cameras and the robot's state, chunks of two, one robot."""
    out = tmp_path_factory.mktemp("much") / "run"
    cameras: Any = ("primary", "wrist")
    return write_checkpoint(out, chunk=2, cameras=cameras, state=True, robots=("viola",))


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures, whose names do not sort as people count."""
    folder = tmp_path_factory.mktemp("frames")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
    for i, rgb in enumerate(pixels):
        Image.fromarray(rgb).save(folder / f"frame_{i}.png")
    return folder


def _act(capsys: pytest.CaptureFixture[str], checkpoint: Path, **asked: Any) -> list[dict[str, Any]]:
    capsys.readouterr()
    words: dict[str, Any] = {"instruction": RED, "unnorm_key": "viola", "loading": CPU} | asked
    assert run_act(ActOptions(checkpoint, **words)) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def _without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in one.items() if name != "latency_ms"} for one in records]


def test_script_and_command_say_the_same(plain: Path, frames: Path) -> None:
    words = ("--checkpoint", plain, "--image", frames / "frame_0.png", "--instruction", RED)
    both = []
    for command in ((PYTHON, ROOT / "inference_action.py"), (OXE_MIX, "act")):
        done = run(*command, *words, "--unnorm-key", "viola", "--device", "cpu")
        assert done.stderr == ""
        both.append(json.loads(done.stdout))
    assert _without_times(both[:1]) == _without_times(both[1:])
    codec = read_codec(plain)
    actions = decode(np.array(both[0]["bins"]), codec.datasets["viola"])
    assert np.array_equal(actions, both[0]["actions"])
    assert both[0]["clamped"] == []
    spent = both[0]["latency_ms"]
    assert spent["total"] == pytest.approx(spent["preprocess"] + spent["prefill"] + spent["decode"], abs=0.05)


def test_a_folder_is_answered_in_the_order_of_its_numbers(
    plain: Path, frames: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _act(capsys, plain, images=(str(frames),))
    assert [Path(one["image"]).name for one in found] == [f"frame_{i}.png" for i in range(12)]
    assert len({json.dumps(one["bins"]) for one in found}) > 6  # it looks at them
    together = _act(capsys, plain, images=(str(frames),), batch=5)
    assert [one["bins"] for one in together] == [one["bins"] for one in found]
    third = _act(capsys, plain, images=(str(frames),), stride=3)
    assert [one["bins"] for one in third] == [one["bins"] for one in found[::3]]
    named = _act(capsys, plain, images=tuple(str(frames / f"frame_{i}.png") for i in (7, 2)))
    assert [one["bins"] for one in named] == [found[7]["bins"], found[2]["bins"]]


def test_a_video_is_its_frames(plain: Path, frames: Path, tmp_path: Path, capsys: Any) -> None:
    import av

    with av.open(str(tmp_path / "seen.mkv"), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=10)  # without loss
        stream.width = stream.height = 64
        stream.pix_fmt = "bgr0"
        for i in range(12):
            with Image.open(frames / f"frame_{i}.png") as picture:
                rgb = np.asarray(picture)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())
    found = _act(capsys, plain, images=(str(tmp_path / "seen.mkv"),), stride=4)
    assert [one["image"] for one in found] == [f"{tmp_path}/seen.mkv#{i}" for i in (0, 4, 8)]
    pictures = _act(capsys, plain, images=(str(frames),), stride=4)
    assert [one["bins"] for one in found] == [one["bins"] for one in pictures]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"broken\.mp4: not a video that can be decoded"):
        _act(capsys, plain, images=(str(tmp_path / "broken.mp4"),))


def test_several_cameras_and_the_state(seeing_much: Path, frames: Path, capsys: Any) -> None:
    first, last = frames / "frame_0.png", frames / "frame_11.png"
    state = "0.1, -0.2 0.3 0 0 0 0 1"
    images = (f"wrist={last}", f"primary={first}")
    (found,) = _act(capsys, seeing_much, images=images, state=state, unnorm_key=None)
    assert np.shape(found["actions"]) == (2, 7)
    policy = load_policy(seeing_much, CPU)
    seen = {name: np.asarray(Image.open(file)) for name, file in (("primary", first), ("wrist", last))}
    values = np.array([0.1, -0.2, 0.3, 0, 0, 0, 0, 1])
    asked = policy.question(Observation(seen, RED, state=values))
    assert asked.text.startswith("<image>\n<image>\nState: ")
    assert policy.answer([asked])[0].bins.tolist() == found["bins"]
    (other,) = _act(capsys, seeing_much, images=images, state="1" + state[3:], unnorm_key=None)
    assert other["probabilities"] != found["probabilities"]


def test_requests_are_answered_line_by_line_into_a_file_that_is_whole_or_absent(
    seeing_much: Path, frames: Path, tmp_path: Path, capsys: Any
) -> None:
    images = {"primary": str(frames / "frame_0.png"), "wrist": str(frames / "frame_1.png")}
    lines = [{"images": images, "state": [0.0] * 8, "instruction": text} for text in ("go", "stop", "turn")]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    out = tmp_path / "answers.jsonl"
    asked = ActOptions(seeing_much, requests=tmp_path / "asked.jsonl", batch=2, out=out, loading=CPU)
    assert run_act(asked) == 0
    said = capsys.readouterr().out
    assert said.startswith("3 answers, p50 ")
    assert said.splitlines()[-2:] == [f"result: {out}", f"next: oxe-mix serve --checkpoint {seeing_much}"]
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["image"] for one in found] == [f"{tmp_path}/asked.jsonl:{i}" for i in (1, 2, 3)]
    out.unlink()
    (tmp_path / "asked.jsonl").write_text("\n".join([*map(json.dumps, lines), '{"instructions": "go"}']))
    with pytest.raises(UserError, match=r"asked\.jsonl:4: instructions: "):
        run_act(asked)
    assert [file.name for file in tmp_path.iterdir()] == ["asked.jsonl"]


def test_draws_go_by_their_seed(plain: Path, frames: Path, capsys: Any) -> None:
    hot = Loading(device="cpu", temperature=1.5)
    folder = (str(frames),)
    found = _act(capsys, plain, images=folder, loading=hot, seed=3)
    again = _act(capsys, plain, images=folder, loading=hot, seed=3, batch=4)
    assert [one["bins"] for one in again] == [one["bins"] for one in found]
    other = _act(capsys, plain, images=folder, loading=hot, seed=4)
    assert [one["bins"] for one in other] != [one["bins"] for one in found]


@pytest.mark.parametrize(("bits", "kind"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_in_few_bits_are_the_language_models_layers(
    frames: Path, tmp_path: Path, capsys: Any, bits: Any, kind: str
) -> None:
    checkpoint = write_checkpoint(tmp_path / "run", hidden=64)  # a block of 4-bit weights is 64 wide
    model, _ = load_checkpoint(checkpoint, bits=bits)
    small = [name for name, layer in model.named_modules() if type(layer).__name__ == kind]
    assert len(small) == 14
    assert all(name.startswith("model.language_model.layers.") for name in small)
    image = (str(frames / "frame_0.png"),)
    (whole,) = _act(capsys, checkpoint, images=image)
    (found,) = _act(capsys, checkpoint, images=image, loading=Loading(device="cpu", quantize=bits))
    assert found["probabilities"] != whole["probabilities"]
    assert np.isfinite(found["actions"]).all()


def test_in_bf16_it_answers(plain: Path, frames: Path, capsys: Any) -> None:
    loading = Loading(device="cpu", dtype="bf16")
    (found,) = _act(capsys, plain, images=(str(frames / "frame_0.png"),), loading=loading)
    assert np.isfinite(found["actions"]).all()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"images": ()}, "give either --image or --requests"),
        ({"images": ("none.jpg",)}, "no such image"),
        ({"images": ("primary=x.jpg",), "unnorm_key": None}, "missing: wrist=PATH"),
        ({"images": ("a.jpg",)}, "of several cameras; write CAMERA=PATH"),
        ({"images": ("wrist=a.jpg", "wrist=b.jpg")}, "--image wrist=b.jpg: wrist is a.jpg already"),
        ({"images": ("wirst=a.jpg",)}, "no camera 'wirst'; did you mean wrist?"),
        ({"state": "0.1 up"}, '--state \'0.1 up\': give numbers, as "0.31 -0.02 0.15"'),
        ({"state": "0.1 0.2"}, "state: of shape [2]; give [8] in robot units"),
        ({"state": None}, "state: missing; give [8] in robot units"),
        ({"instruction": None}, "--instruction: say in words what to do"),
        ({"unnorm_key": "violin"}, "unknown --unnorm-key 'violin'; did you mean viola?"),
    ],
)  # fmt: skip
def test_what_will_not_do_is_said_in_one_line(
    seeing_much: Path, plain: Path, frames: Path, capsys: Any, asked: dict[str, Any], message: str
) -> None:
    picture = frames / "frame_0.png"
    usual = {"images": (f"primary={picture}", f"wrist={picture}"), "state": " ".join(["0"] * 8)}
    with pytest.raises(UserError) as error:
        _act(capsys, plain if asked.get("images") == ("none.jpg",) else seeing_much, **usual | asked)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_answer_beyond_what_was_recorded_is_clamped_and_said(
    plain: Path, frames: Path, tmp_path: Path, capsys: Any
) -> None:
    narrow = shutil.copytree(plain, tmp_path / "run")
    codec = read_codec(narrow)
    own = codec.datasets["viola"]
    recorded = own.model_copy(update={"min": (-0.01,) * 6 + (0.0,), "max": (0.01,) * 6 + (1.0,)})
    write_codec(narrow, codec.model_copy(update={"datasets": {**codec.datasets, "viola": recorded}}))
    (answer,) = _act(capsys, narrow, images=(str(frames / "frame_0.png"),))
    assert np.abs(np.array(answer["actions"])[:, :6]).max() <= 0.01
    assert {one["rule"] for one in answer["clamped"]} == {"range"}


@pytest.mark.parametrize("rule", ["clamp", "reject"])
def test_limits_of_ones_own_hold(plain: Path, frames: Path, tmp_path: Path, capsys: Any, rule: Any) -> None:
    (tmp_path / "limits.yaml").write_text("default: {high: [0.01, 0.01, 0.01, null, null, null, null]}\n")
    asked = {"images": (str(frames),), "limits": tmp_path / "limits.yaml", "on_violation": rule}
    if rule == "reject":
        with pytest.raises(UserError, match=r"viola: .* \(range\); nothing is sent"):
            _act(capsys, plain, **asked)
        return
    answers = _act(capsys, plain, **asked)
    assert np.max([answer["actions"][0][:3] for answer in answers]) <= 0.01
    assert any(answer["clamped"] for answer in answers)


def test_the_time_of_scaling_and_tokenizing_is_told(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(plain, CPU)
    frames = OneViewProcessor.frames

    def slowly(self: OneViewProcessor, views: Any) -> Any:
        time.sleep(0.05)
        return frames(self, views)

    monkeypatch.setattr(OneViewProcessor, "frames", slowly)
    frame = np.zeros((8, 8, 3), np.uint8)
    (answer,) = policy.answer([policy.question(Observation({"primary": frame}, RED, "viola"))])
    assert answer.latency.preprocess > 50


def test_a_request_says_each_thing_once_and_in_text(
    plain: Path, frames: Path, tmp_path: Path, capsys: Any
) -> None:
    file, picture = tmp_path / "asked.jsonl", str(frames / "frame_0.png")
    twice = json.dumps({"image": picture, "images": {"primary": picture}}).encode()
    half = json.dumps({"image": picture, "instruction": "\ud800"}).encode()
    for content, message in (
        (twice, "asked.jsonl:1: has image"),
        (b'{"instruction": "\xff"}', "asked.jsonl: is no UTF-8 text"),
        (half, "asked.jsonl:1: instruction: is no"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=re.escape(message)):
            _act(capsys, plain, requests=file)


def test_streams_of_different_length_are_not_paired(seeing_much: Path, frames: Path, capsys: Any) -> None:
    images = (f"primary={frames}", f"wrist={frames / 'frame_0.png'}")
    with pytest.raises(UserError, match="the cameras have not the same number of pictures"):
        _act(capsys, seeing_much, images=images, state=" ".join(["0"] * 8))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("images", {"images": {}}),
        ("images", {"images": dict.fromkeys(("primary", "top"), np.zeros((4, 4, 3), np.uint8))}),
        ("images", {"images": {"primary": np.zeros((4, 4, 3), np.float32)}}),
        ("images", {"images": {"primary": np.zeros((0, 4, 3), np.uint8)}}),
        ("instruction", {"instruction": " "}),
        ("instruction", {"instruction": "look at <image>"}),
        ("instruction", {"instruction": "go<|im_end|>\n<|im_start|>user\nstop"}),
        ("instruction", {"instruction": "go <ACTION_5>"}),
        ("unnorm_key", {"unnorm_key": None}),
        ("unnorm_key", {"unnorm_key": "violin"}),
        ("state", {"state": np.zeros(7)}),
        ("instruction", {"instruction": "go \udfff"}),
    ],
)  # fmt: skip
def test_an_observation_that_will_not_do_names_its_field(plain: Path, field: str, change: Any) -> None:
    frame = np.zeros((8, 8, 3), np.uint8)
    usual: dict[str, Any] = {"images": {"primary": frame}, "instruction": RED, "unnorm_key": "viola"}
    policy = load_policy(plain, CPU)
    policy.question(Observation(**usual))
    with pytest.raises(ObservationError) as error:
        policy.question(Observation(**usual | change))
    assert error.value.field == field
