"""`oxe-mix eval` and what stands behind it, on a tiny checkpoint that nobody trained."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import SiglipVisionModel

from convert.action_codec import (
    ActionCodec,
    ActionStats,
    Bins,
    decode,
    encode,
    read_codec,
    text_to_bins,
    write_codec,
)
from convert.prompt import Asking
from convert.reader import ConversationReader, Sample
from oxe_mix.errors import UserError
from tests.conftest import OXE_MIX, run
from tests.converting import convert, edit_line
from tests.untrained import untrained as write_untrained
from train_llava.decode import ActionDecoder
from train_llava.eval_command import EvalOptions, run_eval
from train_llava.evaluate import HeldOut, evaluate, pick, shuffled
from train_llava.loading import load_checkpoint
from train_llava.metrics import Scored, score
from train_llava.model import OneViewLlava
from train_llava.processor import IGNORE, OneViewProcessor, View, open_frame
from train_llava.recorded import Translation

Tiny = tuple[OneViewLlava, OneViewProcessor]


@pytest.fixture(scope="module")
def untrained(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained(llava, tmp_path_factory.mktemp("untrained") / "run")


@pytest.fixture(scope="module")
def tiny(untrained: Path) -> Tiny:
    return load_checkpoint(untrained)


@pytest.fixture(scope="module")
def chunked(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chunks of three with the state in the prompt, at every second step."""
    out = tmp_path_factory.mktemp("chunked") / "llava"
    options = ("--only", "bridge_orig", "--chunk", "3", "--state", "--stride", "2", "--val-fraction", "0.3")
    convert(data, out, *options)
    return out


def held_out(llava: Path, **options: Any) -> HeldOut:
    return HeldOut(ConversationReader(llava, "val"), read_codec(llava), **options)


def report_of(tiny: Tiny, llava: Path, **options: Any) -> dict[str, Any]:
    return evaluate(*tiny, read_codec(llava), held_out(llava, **options))


def by_hand(tiny: Tiny, llava: Path, indices: list[int]) -> dict[str, Any]:
    """The same report, sample by sample."""
    model, processor = tiny
    reader, codec = ConversationReader(llava, "val"), read_codec(llava)
    decoder, other = ActionDecoder(model, processor, codec), shuffled(reader.ranges, 0)
    rows: dict[str, list[Any]] = {}
    losses: list[list[float]] = [[], []]
    for index in indices:
        sample, before = reader[index], reader[index - 1] if index else None
        follows = before is not None and before.episode == sample.episode
        target = text_to_bins(sample.answer, codec.action_dim)
        last = target[0]
        if before is not None and follows:
            last = text_to_bins(before.answer, codec.action_dim)[
                min(sample.step - before.step, codec.chunk) - 1
            ]
        row = [decode(target, codec.datasets[sample.dataset]), target]
        for i, shown in enumerate((sample, reader[int(other[index])])):
            views = [processor.view(open_frame(frame)) for frame in shown.frames]
            row.append(decoder.predict([sample.question], views, [sample.dataset]).bins[0])
            tokens = [processor.num_view_tokens(view.size) for view in views]
            ids, labels = processor.conversation_ids(
                [("human", sample.question), ("gpt", sample.answer)], tokens
            )
            pixels = torch.from_numpy(processor.frames(views)["pixel_values"])
            with torch.no_grad():
                logits = model(torch.tensor([ids]), pixels).logits[0].log_softmax(dim=-1)
            losses[i] += [-float(logits[t - 1, labels[t]]) for t in range(len(ids)) if labels[t] != IGNORE]
        rows.setdefault(sample.dataset, []).append((*row, last, not follows))
    scored = [
        Scored(
            name,
            codec.datasets[name],
            codec.datasets[name],
            *(np.array(part) for part in zip(*own, strict=True)),
        )
        for name, own in rows.items()
    ]
    loss = {"model": float(np.mean(losses[0])), "shuffled_images": float(np.mean(losses[1]))}
    return score(codec.binning, scored) | {"loss": loss}


def flat(report: Any, path: str = "") -> dict[str, Any]:
    """Every figure of a report by its place."""
    if isinstance(report, dict):
        return {place: v for k, value in report.items() for place, v in flat(value, f"{path}/{k}").items()}
    if isinstance(report, list):
        return {place: v for i, value in enumerate(report) for place, v in flat(value, f"{path}/{i}").items()}
    return {path: -1 if report is None else report}


def close(report: dict[str, Any], other: dict[str, Any]) -> None:
    assert flat(report) == pytest.approx(flat(other), rel=1e-5)


def test_a_folder_is_scored_as_it_is_sample_by_sample(tiny: Tiny, llava: Path) -> None:
    indices = list(range(len(ConversationReader(llava, "val"))))
    report = report_of(tiny, llava, batch=7)
    close(report, by_hand(tiny, llava, indices))
    assert set(report["datasets"]) == set(read_codec(llava).datasets)
    assert report["loss"]["model"] != report["loss"]["shuffled_images"]
    assert report["l1"]["model"] != report["l1"]["shuffled_images"]
    close(report, report_of(tiny, llava, batch=64))
    assert not tiny[0].training
    tiny[0].train()
    report_of(tiny, llava, samples=1)
    assert tiny[0].training
    tiny[0].eval()


def test_some_samples_keep_the_step_before_them(tiny: Tiny, llava: Path) -> None:
    reader = ConversationReader(llava, "val")
    picked = pick(reader.ranges, 20)
    assert [len(own) for own in picked.values()] != [1] * len(picked)
    indices = [int(index) for own in picked.values() for index in own]
    assert any(reader[i - 1].episode == reader[i].episode for i in indices if i)
    report = report_of(tiny, llava, samples=20, batch=8)
    assert report["samples"] == len(indices) == 20
    close(report, by_hand(tiny, llava, indices))
    one = report_of(tiny, llava, only=("viola",))
    close(one["datasets"], {"viola": report_of(tiny, llava)["datasets"]["viola"]})


def test_chunks_with_the_state_in_the_prompt(tiny: Tiny, chunked: Path) -> None:
    reader = ConversationReader(chunked, "val")
    report = report_of(tiny, chunked)
    assert len(report["l1_by_step"]["model"]) == 3
    close(report, by_hand(tiny, chunked, list(range(len(reader)))))


def _count_passes(rank: int, run_folder: Path, llava: Path, out: Path) -> None:
    """One of two ranks: its report and how often its model was asked for anything."""
    torch.set_num_threads(1)
    store = f"file://{out}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model, processor = load_checkpoint(run_folder)
    passes: list[int] = []
    for layer in (model.model.vision_tower, model.model.language_model):
        layer.register_forward_pre_hook(lambda *_: passes.append(1))
    report = evaluate(model, processor, read_codec(run_folder), held_out(llava, samples=30, batch=6))
    (out / f"{rank}.json").write_text(json.dumps({"report": report, "passes": len(passes)}))
    torch.distributed.destroy_process_group()


def test_two_ranks_make_the_same_passes_and_come_to_the_same_report_as_one(
    tiny: Tiny, untrained: Path, llava: Path, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_count_passes, args=(r, untrained, llava, tmp_path)) for r in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(100)
        assert rank.exitcode == 0
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    # Five batches are three for the first rank and two for the second, which asks once more: three rounds of
    # two ways to ask. An answer is seven passes of the language model and one of the vision tower; a loss is
    # one of each.
    assert first["passes"] == second["passes"] == 3 * 2 * (7 + 1 + 2)
    assert first["report"] == second["report"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = report_of(tiny, llava, samples=30, batch=6)
    torch.set_num_threads(threads)
    assert first["report"] == alone


class _Watching(ConversationReader):
    """Counts the views that are in memory whenever a sample is read."""

    most = 0

    def __getitem__(self, index: int) -> Sample:
        alive = sum(type(thing) is View for thing in gc.get_objects())
        self.most = max(self.most, alive)
        return super().__getitem__(index)


def test_no_more_than_two_batches_of_frames_are_kept(tiny: Tiny, llava: Path) -> None:
    gc.collect()
    gc.freeze()  # what there is already need not be looked through each time
    reader = _Watching(llava, "val")
    evaluate(*tiny, read_codec(llava), HeldOut(reader, read_codec(llava), batch=3))
    gc.unfreeze()
    assert len(reader) > 20
    assert 3 <= reader.most <= 2 * 2 * 3


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.one_of(st.none(), st.integers(1, 300)),
)
def test_picked_samples_are_spread_over_datasets_and_episodes(sizes: list[int], samples: int | None) -> None:
    ends = np.cumsum(sizes)
    ranges = {f"d{i}": range(end - size, end) for i, (size, end) in enumerate(zip(sizes, ends, strict=True))}
    picked, total = pick(ranges, samples), sum(sizes)
    assert sum(map(len, picked.values())) == min(samples or total, total)
    for name, own in picked.items():
        samples_of, width = ranges[name], len(ranges[name]) / len(own)
        places = np.arange(len(own)) * width
        assert (own >= samples_of.start + np.floor(places)).all()  # each in its part of the dataset
        assert (own < samples_of.start + places + width).all()
        if samples is not None and len(sizes) <= samples < total:
            share = 1 + (samples - len(sizes)) * (len(samples_of) - 1) / (total - len(sizes))
            assert abs(len(own) - share) < 1
    if samples is None or samples >= len(sizes):
        assert set(picked) == set(ranges)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(0, 5))
def test_shuffled_frames_are_all_of_a_dataset_and_never_the_samples_own(sizes: list[int], seed: int) -> None:
    ends = np.cumsum(sizes)
    ranges = {f"d{i}": range(end - size, end) for i, (size, end) in enumerate(zip(sizes, ends, strict=True))}
    instead = shuffled(ranges, seed)
    for own in ranges.values():
        shown = instead[own.start : own.stop]
        assert sorted(shown) == list(own)
        assert len(own) < 2 or (shown != np.array(own)).all()
    assert (instead == shuffled(ranges, seed)).all()


def stats(low: list[float], high: list[float]) -> ActionStats:
    zero = (0.0,) * len(low)
    mask = (True,) * (len(low) - 1) + (False,)
    low_, high_ = tuple(low), tuple(high)
    return ActionStats(
        q01=low_,
        q99=high_,
        mean=low_,
        std=zero,
        min=low_,
        max=high_,
        mask=mask,
        num_transitions=1,
        num_trajectories=1,
    )


# Of the middle dimension all but a few values are one: its quantiles are equal, and it is not constant.
NARROW = stats([-1, 0.3, 0], [1, 0.3, 1]).model_copy(update={"min": (-1.0, -5.0, 0.0)})
WIDE = stats([-3, -4, 0], [2, 4, 1])


def codec_of(own: ActionStats, **more: Any) -> ActionCodec:
    return ActionCodec(action_dim=3, datasets={"arm": own}, **more)


def sample(step: int, bins: Bins, episode: str = "e", question: str = "go") -> Sample:
    answer = "".join(f"<ACTION_{i}>" for i in bins.ravel())
    return Sample(f"{episode}/{step}", "arm", episode, step, question, answer, (), ())


actions = arrays(np.int64, (1, 3), elements=st.integers(128, 255))


@settings(max_examples=60)
@given(actions, st.sampled_from(["uniform256", "openvla255"]))
@example(np.full((1, 3), 255), "openvla255")  # which decodes as 254 does
def test_bins_of_the_same_statistics_stay_and_others_say_the_same_action(bins: Bins, binning: Any) -> None:
    same = Translation(codec_of(NARROW, binning=binning), "arm", codec_of(NARROW, binning=binning), "arm")
    recording = same.recording(sample(0, bins), None)
    assert (recording.target == bins).all()
    assert recording.last is None
    assert (recording.actions == decode(bins, NARROW, binning)).all()
    other = Translation(codec_of(NARROW, binning=binning), "arm", codec_of(WIDE, binning=binning), "arm")
    moved = other.recording(sample(0, bins), None)
    assert (moved.actions == recording.actions).all()
    assert (moved.target == encode(recording.actions, WIDE, binning)).all()
    # All of it lies inside the wide range: half a bin of 5, 8 and 2 units is all that is lost.
    off = np.abs(decode(moved.target, WIDE, binning) - recording.actions)
    assert (off <= np.array([5, 8, 2]) / 255 / 2 + 1e-6).all()


def test_the_last_action_is_the_one_right_before_the_chunk() -> None:
    own = codec_of(NARROW, chunk=3)
    translation = Translation(own, "arm", own, "arm")
    before, now = np.arange(130, 139).reshape(3, 3), np.full((3, 3), 200)
    for gap, row in ((1, 0), (2, 1), (3, 2), (9, 2)):  # past the chunk its last action is the last one known
        last = translation.recording(sample(5 + gap, now), sample(5, before)).last
        assert last is not None
        assert last.tolist() == before[row].tolist()
    assert translation.recording(sample(6, now), sample(5, before, "another")).last is None
    with pytest.raises(UserError, match=r"e/6: an answer of 1 actions, not of 3"):
        translation.recording(sample(6, now[:1]), None)
    with pytest.raises(UserError, match=r"e/6: step 0, dimension 2: bin 7 is below a gripper's range"):
        translation.recording(sample(6, np.array([[200, 200, 7]] * 3)), None)


def test_the_state_is_written_in_the_bins_that_the_model_knows() -> None:
    asking = Asking(template="Now {instruction}!", state=True)
    data, model = (codec_of(WIDE, asking=asking, states={"arm": own}) for own in (NARROW, WIDE))
    asked = asking.question("take it", 2, [140, 128, 255])
    answer = np.full((1, 3), 200)
    translated = Translation(data, "arm", model, "arm").recording(sample(0, answer, question=asked), None)
    state = encode(decode(np.array([[140, 128, 255]]), NARROW), WIDE)[0]
    assert translated.question == asking.question("take it", 2, state.tolist())
    assert translated.question.count("<image>") == 2
    assert state.tolist() == [158, 137, 255]
    same = Translation(data, "arm", data, "arm").recording(sample(0, answer, question=asked), None)
    assert same.question == asked


def test_statistics_of_the_checkpoints_own_are_measured_in_robot_units(tiny: Tiny, llava: Path) -> None:
    """Twice the range: the same tokens are twice the movement, and the recorded action stays what it is."""
    measured = read_codec(llava)
    wide = {
        name: own.model_copy(
            update={"q01": tuple(2 * v for v in own.q01), "q99": tuple(2 * v for v in own.q99)}
        )
        for name, own in measured.datasets.items()
    }
    codec = measured.model_copy(update={"datasets": wide})
    same = evaluate(*tiny, measured, held_out(llava))["datasets"]["bridge_orig"]
    other = evaluate(*tiny, codec, held_out(llava))["datasets"]["bridge_orig"]
    assert other["moving"] == same["moving"]
    reader = ConversationReader(llava, "val")
    decoder = ActionDecoder(*tiny, measured)
    off = []
    for index in reader.ranges["bridge_orig"]:
        row = reader[index]
        views = [tiny[1].view(open_frame(frame)) for frame in row.frames]
        said = decoder.predict([row.question], views, ["bridge_orig"]).bins[0]
        recorded = decode(text_to_bins(row.answer, 7), measured.datasets["bridge_orig"])
        off.append(np.abs(decode(said, wide["bridge_orig"]) - recorded)[0])
    assert other["l1_robot_units"]["model"] == pytest.approx(np.mean(off, axis=0).tolist())
    assert other["accuracy"]["model"] != same["accuracy"]["model"]


def options(**given: Any) -> EvalOptions:
    """The command's own defaults, on the CPU."""
    usual: dict[str, Any] = {"part": "val", "samples": None, "batch": 32, "device": "cpu", "out": None}
    return EvalOptions(**(usual | {"only": (), "unnorm_keys": ()} | given))


def said(*command: str | Path, code: int = 0) -> str:
    done = run(OXE_MIX, "eval", *command, code=code)
    if code == 0:
        assert not [
            line for line in done.stderr.splitlines() if not line.startswith(("evaluate: ", "warning: "))
        ]
        return done.stdout
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_the_command_scores_a_checkpoint_and_writes_what_it_found(
    untrained: Path, llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "run/checkpoints/step-40"
    shutil.copytree(untrained, checkpoint)
    text = said("--checkpoint", checkpoint, "--data", llava, "--batch", "16", "--samples", "30")
    lines = text.splitlines()
    assert (
        lines[0] == f"{checkpoint} (step 40) on 30 held-out samples of 6 datasets in {llava}, batches of 16"
    )
    assert lines[1].startswith("30 held-out samples  ")
    assert lines[-1] == f"next: oxe-mix replay --checkpoint {checkpoint} --data {llava} to look at an episode"
    assert lines[-2] == f"result: {checkpoint / 'eval-llava.json'}"
    assert lines[-3].startswith("30 samples scored in ")
    found = json.loads((checkpoint / "eval-llava.json").read_text())
    tiny = load_checkpoint(untrained)
    close(found["report"], report_of(tiny, llava, samples=30, batch=16))
    assert found["checkpoint"]["step"] == 40
    hashes = found["checkpoint"]["weights_sha256"]
    assert hashes == {"model.safetensors": _sha256(checkpoint / "model.safetensors")}
    assert found["data"]["manifest_sha256"] == _sha256(llava / "manifest.json")
    assert found["asked"]["samples"] == 30
    model = f"{found['report']['l1']['model']:.3f}"
    assert lines[3].split()[:2] == ["model", model]
    units = found["report"]["datasets"]["viola"]["l1_robot_units"]["model"]
    viola = next(line for line in lines if line.startswith("viola"))
    assert viola.split()[-7:] == [f"{value:.4f}" for value in units]
    # Training samples go to a file of their own.
    asked = options(checkpoint=checkpoint, data=llava, part="train", only=("viola",), samples=5)
    assert run_eval(asked) == 0
    assert "on 5 training samples of 1 dataset in " in capsys.readouterr().out
    assert list(json.loads((checkpoint / "eval-llava-train.json").read_text())["report"]["datasets"]) == [
        "viola"
    ]
    assert not list(checkpoint.glob(".*.tmp"))


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_command_says_what_training_said_of_the_same_data(
    checkpoint: Path, llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as each of the two ranks had
    said("--checkpoint", checkpoint, "--data", llava, "--out", tmp_path / "out.json")
    trained = json.loads((checkpoint / "evaluation.json").read_text())
    found = json.loads((tmp_path / "out.json").read_text())
    close(found["report"], trained["held_out"])
    assert found["checkpoint"]["step"] == 12


def test_the_command_asks_in_batches_of_the_size_it_was_given(
    untrained: Path, llava: Path, tmp_path: Path
) -> None:
    sizes: list[int] = []

    def note(module: torch.nn.Module, args: Any) -> None:
        if isinstance(module, SiglipVisionModel):
            sizes.append(len(args[0]))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    run_eval(options(checkpoint=untrained, data=llava, samples=10, batch=4, out=tmp_path / "out.json"))
    handle.remove()
    assert sizes == [4] * 8 + [2] * 4  # each batch for answers and for the loss, with its frames and others


def test_another_datasets_statistics_can_stand_in(
    untrained: Path, llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(untrained, run_folder)
    codec = read_codec(llava)
    without = {name: own for name, own in codec.datasets.items() if name not in ("viola", "kuka")}
    write_codec(run_folder, codec.model_copy(update={"datasets": without}))
    refused = said("--checkpoint", run_folder, "--data", llava, code=2)
    assert "does not know kuka, viola; " in refused or "does not know viola, kuka; " in refused
    assert "=KEY, KEY one of bridge_orig, fractal20220817_data, " in refused
    out, words = (
        tmp_path / "out.json",
        {"checkpoint": run_folder, "data": llava, "out": tmp_path / "out.json"},
    )
    assert run_eval(options(**words, only=("viola",), unnorm_keys=("viola=bridge_orig",))) == 0
    assert capsys.readouterr().err.startswith("warning: viola: the data's statistics are not those that the ")
    found = json.loads(out.read_text())
    assert found["data"]["unnorm_keys"] == {"viola": "bridge_orig"}
    own = held_out(llava, only=("viola",), keys={"viola": "bridge_orig"})
    close(found["report"], evaluate(*load_checkpoint(untrained), read_codec(llava), own))
    # What the checkpoint knows by the same name needs no key.
    assert run_eval(options(**words, only=("bridge_orig",), samples=2)) == 0
    assert "warning" not in capsys.readouterr().err  # on a busy machine there is progress


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--part", "test"), "--part test: give val (held-out samples) or train"),
        (("--only", "violla"), "--only violla: has no held-out sample; did you mean viola?"),
        (("--unnorm-key", "viola"), "--unnorm-key viola: give NAME=KEY"),
        (("--unnorm-key", "vola=kuka"), "the data has no vola; did you mean viola?"),
        (("--unnorm-key", "viola=kukka"), "the checkpoint has no kukka; did you mean kuka?"),
        (("--out", "/"), "--out /: is a folder; name a file"),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    untrained: Path, llava: Path, words: tuple[str, ...], message: str
) -> None:
    assert message in said("--checkpoint", untrained, "--data", llava, *words, code=2)


def test_a_device_that_is_not_there_is_refused(untrained: Path, llava: Path) -> None:
    with pytest.raises(UserError, match=r"^--device gpu0: "):
        run_eval(options(checkpoint=untrained, data=llava, device="gpu0"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 4}, "chunks of 1, but RUN was trained with 4; convert the data as it was converted"),
        ({"binning": "openvla255"}, "binning uniform256, but RUN was trained with openvla255"),
        (
            {"asking": {"cameras": ["wrist", "primary"]}},
            "cameras primary, but RUN was trained with wrist, primary",
        ),
        ({"asking": {"state": True}}, "the robot's state in the prompt: no, but RUN was trained with yes"),
        ({"asking": {"template": "Do {instruction}"}}, "but RUN was trained with 'Do {instruction}'"),
        (
            {"action_dim": 3, "datasets": {"viola": WIDE.model_dump()}},
            "of width 7, but RUN was trained with 3",
        ),
    ],
)
def test_a_checkpoint_of_other_tokens_is_refused(
    llava: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    raw = json.loads((llava / "action_codec.json").read_text())
    (tmp_path / "action_codec.json").write_text(json.dumps(raw | change))
    line = said("--checkpoint", tmp_path, "--data", llava, code=2)
    assert line.startswith(f"error: {llava}: ")
    assert message.replace("RUN", str(tmp_path)) in line


def test_grippers_and_movements_must_be_in_the_same_places(llava: Path, tmp_path: Path) -> None:
    raw = json.loads((llava / "action_codec.json").read_text())
    raw["datasets"]["viola"]["mask"] = [True] * 7
    (tmp_path / "action_codec.json").write_text(json.dumps(raw))
    line = said("--checkpoint", tmp_path, "--data", llava, code=2)
    assert "viola: movements and gripper are not the dimensions that they are in viola" in line


def test_a_folder_without_held_out_samples_says_what_to_do(
    untrained: Path, data: Path, tmp_path: Path
) -> None:
    convert(data, tmp_path / "all", "--only", "viola")
    line = said("--checkpoint", untrained, "--data", tmp_path / "all", code=2)
    assert line.endswith("holds no held-out sample; convert with --val-fraction, or use --part train\n")


def test_a_run_that_has_not_ended_names_its_last_checkpoint(llava: Path, tmp_path: Path) -> None:
    for step in (9, 10, 100):
        (tmp_path / f"checkpoints/step-{step}").mkdir(parents=True)
    line = said("--checkpoint", tmp_path, "--data", llava, code=2)
    assert line.endswith(
        f"the run has not ended; give one of its checkpoints, as {tmp_path}/checkpoints/step-100\n"
    )


def test_a_warning_where_held_out_episodes_may_have_been_trained_on(
    untrained: Path, llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(untrained, run_folder)
    raw = json.loads((llava / "manifest.json").read_text())
    asked = options(checkpoint=run_folder, data=llava, samples=1, out=tmp_path / "out.json")
    warned = []
    for fraction, seed in ((0.1, raw["seed"]), (0.05, raw["seed"]), (0.1, raw["seed"] + 1)):
        changed = raw | {"seed": seed, "asked": raw["asked"] | {"val_fraction": fraction}}
        (run_folder / "data_manifest.json").write_text(json.dumps(changed))
        run_eval(asked)
        warned.append(capsys.readouterr().err)
    assert warned[0] == ""
    assert "by this data's seed training held out 5.0% of the episodes, the data 10.0%" in warned[1]
    assert "by this data's seed training held out 0.0% of the episodes, the data 10.0%" in warned[2]


def test_a_broken_sample_is_named(tiny: Tiny, llava: Path, tmp_path: Path) -> None:
    broken = tmp_path / "llava"
    shutil.copytree(llava, broken)
    file = sorted((broken / "val").glob("viola-*.jsonl"))[0]
    edit_line(file, 0, lambda line: line["conversations"][1].update(value="<ACTION_1>"))
    with pytest.raises(UserError, match=r"^viola/train/\d+/\d+/\d+: 1 action tokens are no whole number"):
        report_of(tiny, broken)
    line = json.loads(sorted((llava / "val").glob("kuka-*.jsonl"))[0].read_text().splitlines()[0])
    (broken / "images" / line["image"]).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"not an image that can be decoded"):
        report_of(tiny, broken, only=("kuka",))
    nothing = replace(held_out(llava), only=("none",))
    with pytest.raises(ValueError, match="no sample to score"):
        evaluate(*tiny, read_codec(llava), nothing)
