"""`oxe-mix replay` and what stands behind it, on tiny checkpoints that nobody trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from convert.action_codec import decode, read_codec, text_to_bins
from convert.reader import ConversationReader, Sample
from oxe_mix.errors import UserError
from tests.converting import convert, edit_line
from tests.untrained import untrained
from train_llava.acting.episodes import find_episode, stretches
from train_llava.acting.limits import Bounds, Limits
from train_llava.acting.load import Loading, load_policy
from train_llava.acting.observation import Observation
from train_llava.acting.policy import Policy
from train_llava.acting.replay import Replayed, replay
from train_llava.acting.replay_command import ReplayOptions, run_replay
from train_llava.acting.replay_picture import Drawing, Seen, draw_replay
from train_llava.acting.validator import ActionValidator
from train_llava.decode import ActionDecoder
from train_llava.evaluate import HeldOut, evaluate
from train_llava.loading import load_checkpoint
from train_llava.processor import open_frame
from train_llava.recorded import Translation

CPU = Loading(device="cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run_folder(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(llava, tmp_path_factory.mktemp("untrained") / "run")


@pytest.fixture(scope="module")
def chunked(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chunks of three with two cameras and the state in the prompt, at every second step."""
    out = tmp_path_factory.mktemp("chunked") / "llava"
    more = (
        "--chunk",
        "3",
        "--state",
        "--stride",
        "2",
        "--cameras",
        "secondary,primary",
        "--val-fraction",
        "0.3",
    )
    convert(data, out, "--only", "bridge_orig", *more)
    return out


@pytest.fixture(scope="module")
def chunked_run(chunked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(chunked, tmp_path_factory.mktemp("untrained_chunked") / "run")


@pytest.fixture(scope="module")
def chunked_policy(chunked_run: Path) -> Policy:
    return load_policy(chunked_run, CPU)


class _OneEpisode(ConversationReader):
    """A folder that holds only one held-out episode."""

    def __init__(self, folder: Path, samples: list[Sample]) -> None:
        super().__init__(folder, "val")
        self._first = find_episode(ConversationReader(folder, "val"), samples[0].episode)[0]
        self.ranges = {samples[0].dataset: range(len(samples))}

    def __getitem__(self, index: int) -> Sample:
        return super().__getitem__(self._first + index)


def episode_of(llava: Path, name: str, part: Literal["train", "val"] = "val") -> str:
    reader = ConversationReader(llava, part)
    return reader[reader.ranges[name].start].episode


def longest(llava: Path) -> list[Sample]:
    """The held-out episode that goes on for longest."""
    reader = ConversationReader(llava, "val")
    _, found = max(stretches(reader, range(len(reader))), key=lambda own: reader[own[1][-1]].step)
    return [reader[index] for index in found]


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def replayed_of(policy: Policy, llava: Path, limits: Limits | None = None) -> Replayed:
    """The longest held-out episode, with the dataset's own key."""
    samples, codec = longest(llava), read_codec(llava)
    name = samples[0].dataset
    validator = ActionValidator(codec, limits or Limits(), action="clamp")
    return replay(policy, validator, Translation(codec, name, codec, name), samples)


def document_of(options: ReplayOptions) -> Any:
    assert run_replay(options) == 0
    files = sorted((options.out or options.checkpoint / "replay").glob("*.json"))
    return json.loads(files[-1].read_text())


def test_a_replay_says_what_eval_says_of_the_same_samples(
    run_folder: Path, llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = longest(llava)
    episode, dataset = samples[0].episode, samples[0].dataset
    options = ReplayOptions(run_folder, llava, episode, out=tmp_path / "out", loading=CPU)
    document = document_of(options)
    model, processor = load_checkpoint(run_folder)
    codec = read_codec(llava)
    said = evaluate(model, processor, codec, HeldOut(_OneEpisode(llava, samples), codec))
    for name in ("model", "mean_action", "repeat_last"):
        for figure in ("l1", "accuracy", "gripper_f1"):
            assert document["report"][figure][name] == pytest.approx(said[figure][name])
        units = document["report"]["datasets"][dataset]["l1_robot_units"][name]
        assert units == pytest.approx(said["datasets"][dataset]["l1_robot_units"][name])
    assert "shuffled_images" not in document["report"]["l1"]
    decoder = ActionDecoder(model, processor, codec)
    assert [step["step"] for step in document["steps"]] == [sample.step for sample in samples]
    for sample, step in zip(samples, document["steps"], strict=True):
        views = [processor.view(open_frame(frame)) for frame in sample.frames]
        bins = decoder.predict([sample.question], views, [dataset]).bins[0]
        assert step["bins"] == bins[0].tolist()
        assert step["predicted"] == step["sent"] == decode(bins, codec.datasets[dataset])[0].tolist()
        assert step["recorded_bins"] == text_to_bins(sample.answer, 7)[0].tolist()
        assert step["asked_at"] == sample.step
    assert len({tuple(step["bins"]) for step in document["steps"]}) > 1  # it looks at the frames
    assert document["clamped"] == []
    assert document["dimensions"][:2] == ["x", "y"]
    closed = np.array(
        [[step[which][-1] < 0.5 for step in document["steps"]] for which in ("recorded", "sent")]
    )
    agreement = float((closed[0] == closed[1]).mean())
    assert document["report"]["gripper_agreement"] == agreement
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f'{run_folder} on {episode}, {len(samples)} held-out samples: "')
    assert told[0].endswith(f'"{document["instruction"]}"')
    row = next(line for line in told if line.startswith("model  ") and line.count(".") >= 5)
    assert row.split()[1] == f"{document['report']['l1']['model']:.3f}"
    units = document["report"]["datasets"][dataset]["l1_robot_units"]["repeat_last"]
    assert next(line for line in reversed(told) if line.startswith("repeat last")).split()[2:] == [
        f"{value:.4g}" for value in units
    ]
    assert f"gripper as recorded at {agreement:.1%} of the steps; 0 values clamped; " in told[-3]
    stem = tmp_path / "out" / episode.replace("/", "-")
    assert told[-2] == f"result: {stem}.png, and all values in {stem}.json"
    assert told[-1].startswith(
        f"next: oxe-mix eval --checkpoint {run_folder} --data {llava} for all episodes"
    )
    shown = Drawing(
        title=f"“{document['instruction']}”",
        subtitle=f"{episode} (held-out) by run",
        names=tuple(document["dimensions"]),
        steps=np.array([step["step"] for step in document["steps"]]),
        asked=np.array([step["step"] for step in document["steps"]]),
        recorded=np.array([step["recorded"] for step in document["steps"]]),
        predicted=np.array([step["predicted"] for step in document["steps"]]),
        mean=np.array(codec.datasets[dataset].mean),
        seen={"primary": [Seen(one.step, np.asarray(open_frame(one.frames[0]))) for one in samples]},
    )
    assert len(samples) <= 8  # each is shown
    draw_replay(shown, tmp_path / "by_hand.png")
    assert (tmp_path / "by_hand.png").read_bytes() == Path(f"{stem}.png").read_bytes()
    assert size_of(tmp_path / "by_hand.png") == (1200, 985)


def test_a_chunk_is_executed_to_its_end_before_the_policy_is_asked_again(
    chunked_policy: Policy, chunked_run: Path, chunked: Path
) -> None:
    replayed = replayed_of(chunked_policy, chunked)
    codec = read_codec(chunked)
    samples = {sample.step: sample for sample in longest(chunked)}
    first, last = min(samples), max(samples)
    assert last - first >= 4
    # Samples are at every second step, chunks are of three: asked at 0, 4 (the first from 3 on), 8, ...
    asked = [step for step in samples if (step - first) % 4 == 0]
    executed = [(at, at + k) for at in asked for k in range(3) if at + k <= last]
    assert list(zip(replayed.asked.tolist(), replayed.steps.tolist(), strict=True)) == executed
    model, processor = load_checkpoint(chunked_run)
    decoder = ActionDecoder(model, processor, codec)
    row = 0
    for at in asked:
        sample = samples[at]
        views = [processor.view(open_frame(frame)) for frame in sample.frames]
        assert len(views) == 2
        bins = decoder.predict([sample.question], views, ["bridge_orig"]).bins[0]
        recorded = decode(text_to_bins(sample.answer, 7), codec.datasets["bridge_orig"])
        for k in range(min(3, last - at + 1)):
            assert replayed.bins[row].tolist() == bins[k].tolist()
            assert replayed.recorded[row].tolist() == recorded[k].tolist()
            row += 1
    assert row == len(replayed.steps)


def test_a_robot_is_asked_with_the_words_of_the_training(chunked_policy: Policy, chunked: Path) -> None:
    """State and instruction go by way of what a robot sends, and come back as they were."""
    reader, codec = ConversationReader(chunked, "val"), read_codec(chunked)
    translation = Translation(codec, "bridge_orig", codec, "bridge_orig")
    states = set()
    for sample in map(reader.__getitem__, range(len(reader))):
        pictures = (np.asarray(open_frame(frame)) for frame in sample.frames)
        images = dict(zip(chunked_policy.cameras, pictures, strict=True))
        words, state = translation.instruction(sample), translation.state(sample)
        assert state is not None
        asked = chunked_policy.question(Observation(images, words, "bridge_orig", state))
        assert asked.text == sample.question
        states.add(asked.text.partition("State: ")[2])
    assert len(states) > 10


def test_the_figures_of_chunks_are_of_the_steps_that_were_executed(
    chunked_run: Path, chunked: Path, tmp_path: Path
) -> None:
    samples = {sample.step: sample for sample in longest(chunked)}
    episode = next(iter(samples.values())).episode
    document = document_of(ReplayOptions(chunked_run, chunked, episode, out=tmp_path, loading=CPU))
    steps, codec = document["steps"], read_codec(chunked)
    assert len({step["asked_at"] for step in steps}) > 1
    recorded, sent = (np.array([step[which] for step in steps]) for which in ("recorded", "sent"))
    units = document["report"]["datasets"]["bridge_orig"]["l1_robot_units"]
    assert units["model"] == pytest.approx(np.abs(sent - recorded).mean(axis=0).tolist())
    # What was recorded right before the question: two steps back a sample began, whose second action it is.
    own = codec.datasets["bridge_orig"]
    repeated = [
        np.array(own.mean)
        if step["asked_at"] == min(samples)
        else decode(text_to_bins(samples[step["asked_at"] - 2].answer, 7)[1:2], own)[0]
        for step in steps
    ]
    off = np.abs(np.array(repeated) - recorded).mean(axis=0)
    assert units["repeat_last"] == pytest.approx(off.tolist(), abs=1e-6)
    assert document["report"]["samples"] == len(steps)
    assert document["cameras"] == ["secondary", "primary"]
    assert size_of(next(tmp_path.glob("*.png"))) == (1200, 1140)  # a second strip of frames


def test_the_validator_stands_between_answer_and_robot_across_chunks(
    chunked_policy: Policy, chunked: Path
) -> None:
    free = replayed_of(chunked_policy, chunked)
    assert free.clamped == []
    starts = np.flatnonzero(free.steps == free.asked)
    assert (free.predicted[starts[1:]] != free.predicted[0]).any()
    held = replayed_of(chunked_policy, chunked, Limits(default=Bounds(max_jump=(0.0,) * 7)))
    assert (held.predicted == free.predicted).all()
    assert (held.sent == free.predicted[0]).all()
    moved = np.argwhere(free.predicted != free.predicted[0])
    assert [(one.step, one.dimension) for one in held.clamped] == [(held.steps[t], a) for t, a in moved]
    assert {one.rule for one in held.clamped} == {"jump"}


def test_the_command_replays_under_limits_and_in_the_form_that_is_served(
    chunked_run: Path, chunked: Path, tmp_path: Path
) -> None:
    free = ReplayOptions(
        chunked_run,
        chunked,
        episode_of(chunked, "bridge_orig", "train"),
        part="train",
        out=tmp_path,
        loading=Loading(device="cpu", dtype="bf16"),
    )
    document = document_of(free)
    assert document["asked"]["loading"]["dtype"] == "bf16"
    high = max(step["sent"][0] for step in document["steps"]) - 0.001
    limits = tmp_path / "limits.yaml"
    limits.write_text(f"default: {{high: [{high}, null, null, null, null, null, null]}}\n")
    held = replace(free, limits=limits)
    assert max(step["sent"][0] for step in document_of(held)["steps"]) == pytest.approx(high)
    with pytest.raises(UserError, match=r"\(range\); nothing is sent"):
        document_of(replace(held, on_violation="reject"))


def test_another_datasets_statistics_can_stand_in(
    run_folder: Path, llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ReplayOptions(run_folder, llava, "viola", out=tmp_path / "own", loading=CPU)
    own = document_of(asked)
    assert "warning" not in capsys.readouterr().err
    other = document_of(replace(asked, out=tmp_path / "other", unnorm_key="bridge_orig"))
    assert (
        "viola: the data's statistics are not those that the checkpoint acts with" in capsys.readouterr().err
    )
    assert other["unnorm_key"] == "bridge_orig"
    codec = read_codec(llava)
    for step, before in zip(other["steps"], own["steps"], strict=True):
        bins = np.array([step["bins"]])
        assert step["sent"] == decode(bins, codec.datasets["bridge_orig"])[0].tolist()
        assert step["recorded"] == before["recorded"]


def test_episodes_are_where_their_samples_are(llava: Path) -> None:
    parts: tuple[Literal["train", "val"], ...] = ("train", "val")
    for part in parts:
        reader = ConversationReader(llava, part)
        by_hand: dict[str, list[int]] = {}
        for i in range(len(reader)):
            by_hand.setdefault(reader[i].episode, []).append(i)
        assert len(by_hand) > 6
        found = {name: list(own) for name, own in stretches(reader, range(len(reader)))}
        assert found == by_hand
        for name, own in by_hand.items():
            assert list(find_episode(reader, name)) == own
        last = list(by_hand)[-1]
        # A sample's id, and what is shorter than an episode's: the first that fits.
        assert list(find_episode(reader, reader[by_hand[last][-1]].id)) == by_hand[last]
        assert list(find_episode(reader, None)) == by_hand[next(iter(by_hand))]
        for prefix in ("viola", "viola/train", "viola/train/1", "viola/train/1/"):
            first = next(own for name, own in by_hand.items() if name.startswith(prefix))
            assert list(find_episode(reader, prefix)) == first
        assert not find_episode(reader, "viola/train/0/9999")
        assert not find_episode(reader, "viol")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"part": "test"}, "--part test: give val (held-out episodes) or train"),
        ({"episode": "violla/train/0/3"}, "the data has no dataset 'violla'; did you mean viola?"),
        (
            {"episode": "viola/train/0/777"},
            "--episode viola/train/0/777: no such held-out episode; there are viola/",
        ),
        ({"unnorm_key": "kukka"}, "unknown --unnorm-key 'kukka'; did you mean kuka?"),
        ({"loading": Loading(device="gpu0")}, "--device gpu0: "),
    ],
)
def test_what_cannot_be_replayed_is_one_line(
    run_folder: Path, llava: Path, tmp_path: Path, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        run_replay(ReplayOptions(run_folder, llava, **({"out": tmp_path} | asked)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_episode_of_the_other_part_says_so(run_folder: Path, llava: Path, tmp_path: Path) -> None:
    trained = episode_of(llava, "kuka", "train")
    with pytest.raises(UserError, match=rf"^--episode {trained}: is a training episode; add --part train$"):
        run_replay(ReplayOptions(run_folder, llava, trained))
    options = ReplayOptions(run_folder, llava, trained, part="train", out=tmp_path, loading=CPU)
    assert document_of(options)["episode"] == trained


def test_a_folder_without_held_out_samples_says_what_to_do(
    run_folder: Path, data: Path, chunked: Path, tmp_path: Path
) -> None:
    convert(data, tmp_path / "all", "--only", "viola")
    for episode in (None, "viola"):
        with pytest.raises(UserError, match="holds no held-out sample; convert with --val-fraction, or use "):
            run_replay(ReplayOptions(run_folder, tmp_path / "all", episode))
    with pytest.raises(
        UserError, match=r"chunks of 3, but .* was trained with 1; convert the data as it was"
    ):
        run_replay(ReplayOptions(run_folder, chunked))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--out .*file: is no folder to write into"):
        run_replay(ReplayOptions(run_folder, tmp_path / "all", part="train", out=tmp_path / "file"))


def test_a_broken_frame_is_named(chunked_policy: Policy, chunked: Path, tmp_path: Path) -> None:
    broken = tmp_path / "llava"
    shutil.copytree(chunked, broken)
    for file in (broken / "val").glob("*.jsonl"):
        for number in range(len(file.read_text().splitlines())):
            edit_line(file, number, lambda line: line["image"].pop())
    with pytest.raises(
        UserError,
        match=r"^bridge_orig/train/\d+/\d+/\d+: has 1 frames, not one of each of secondary, primary",
    ):
        replayed_of(chunked_policy, broken)
