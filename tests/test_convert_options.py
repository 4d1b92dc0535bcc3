"""Options of stage 2 that decide what a sample says: state, words, bins, statistics, data."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from convert import action_codec as codec
from convert.action_codec import read_codec
from convert.manifest import read_manifest
from convert.options import ConvertOptions
from convert.plan import find_datasets, open_folders, shard_jobs
from convert.prompt import Asking
from convert.reader import ConversationReader
from convert.shards import collect_actions
from oxe_mix.cards import load_cards
from oxe_mix.rlds import Episode, parse_features
from oxe_mix.tfrecord import read_records
from tests.conftest import OXE_MIX, run
from tests.converting import content_of, convert, lines_of, picture, viola_episode, viola_folder


@pytest.fixture(scope="module")
def bridge(bucket: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bridge_orig with its state, whose numbers change."""
    data = tmp_path_factory.mktemp("bridge") / "data"
    shutil.copytree(bucket / "bridge_dataset", data / "bridge_dataset")
    return data


def test_the_state_stands_in_the_prompt_in_bins_of_its_own(bridge: Path, tmp_path: Path) -> None:
    convert(bridge, tmp_path, "--state")
    own = read_codec(tmp_path)
    assert own.asking.state
    stats, seen = own.states["bridge_orig"], 0
    samples = {line["id"]: line for line in lines_of(tmp_path)}
    version = bridge / "bridge_dataset/1.0.0"
    tree = parse_features((version / "features.json").read_text(), "")
    states = []
    for index, file in enumerate(sorted(version.glob("*-train*"))):
        with file.open("rb") as stream:
            for number, record in enumerate(read_records(stream, "")):
                raw = Episode(record.payload, tree).array(("observation", "state")).astype(np.float64)
                # Six of the pose, a pad, the gripper: as the card says.
                state = np.concatenate([raw[:, :6], np.zeros((len(raw), 1)), raw[:, -1:]], axis=1)
                states.append(state[1:-1])
                for step in range(len(raw)):
                    line = samples.get(f"bridge_orig/train/{index}/{number}/{step}")
                    if line is None:
                        continue
                    marker, said, question = line["conversations"][0]["value"].split("\n")
                    assert (marker, question[:12]) == ("<image>", "What action ")
                    bins = np.array([[int(n) for n in said.removeprefix("State: ").split()]])
                    back = codec.decode(bins, stats)[0]
                    low, high = np.array(stats.q01), np.array(stats.q99)
                    assert (np.abs(back - np.clip(state[step], low, high)) <= (high - low) / 512 + 1e-6).all()
                    seen += 1
    assert seen == len(samples) > 50
    everything = np.concatenate(states)
    assert np.allclose(stats.q01, np.quantile(everything, 0.01, axis=0), atol=1e-6)
    proprio = json.loads((tmp_path / "dataset_statistics.json").read_text())["bridge_orig"]["proprio"]
    assert np.allclose(proprio["mean"], everything.mean(axis=0), atol=1e-6)
    assert len(stats.mask) == 8


def test_other_words_reach_the_codec_and_come_apart_again(bridge: Path, tmp_path: Path) -> None:
    convert(bridge, tmp_path, "--prompt", "How should the arm move to {instruction} now?")
    line = lines_of(tmp_path)[0]["conversations"][0]["value"]
    assert line.startswith("<image>\nHow should the arm move to ")
    asking = read_codec(tmp_path).asking
    assert asking.question(asking.instruction(line)) == line


@pytest.mark.parametrize(
    ("asking", "num_images", "state"),
    [(Asking(), 1, None), (Asking(template="{instruction}", state=True), 3, [1, 255])],
)
def test_a_question_gives_its_instruction_back(
    asking: Asking, num_images: int, state: list[int] | None
) -> None:
    asked = asking.question("Pick up the {odd} Block.", num_images, state)
    assert asked.count("<image>") == num_images
    assert asking.instruction(asked) == "pick up the {odd} block"


def test_a_question_with_the_state_is_not_asked_without_it() -> None:
    with pytest.raises(ValueError, match="state is missing"):
        Asking(state=True).question("go")
    with pytest.raises(ValueError, match="state is not part"):
        Asking().question("go", 1, [1])


def test_openvlas_bins_come_back_as_its_tokenizer_decodes_them(data: Path, tmp_path: Path) -> None:
    """Its rule: digitize on 256 edges, then the centre of the interval, the last one for the last index."""
    convert(data, tmp_path, "--binning", "openvla255", "--only", "viola")
    own = read_codec(tmp_path)
    assert own.binning == "openvla255"
    convert(data, tmp_path / "plain", "--only", "viola")
    edges = [-1 + 2 * i / 255 for i in range(256)]
    ours, plain = ConversationReader(tmp_path, "train"), ConversationReader(tmp_path / "plain", "train")
    stats = own.datasets["viola"]
    for i in range(len(ours)):
        bins = codec.text_to_bins(ours[i].answer, 7)
        normalized = codec.bins_to_normalized(bins, own.binning)[0]
        for a, i_bin in enumerate(bins[0].tolist()):
            low = min(i_bin, 254)
            assert normalized[a] == pytest.approx((edges[low] + edges[low + 1]) / 2)
        near = codec.bins_to_normalized(codec.text_to_bins(plain[i].answer, 7))[0]
        assert np.abs(normalized - near).max() <= 2 / 255 + 1e-9
        assert np.isfinite(codec.decode(bins, stats, own.binning)).all()


def test_statistics_of_train_leave_held_out_episodes_out(bucket: Path, tmp_path: Path) -> None:
    records = [viola_episode(["Go"] * 3, moves=[9.0, 9, 9]), *[viola_episode(["Go"] * 3) for _ in range(3)]]
    data = viola_folder(tmp_path / "data", bucket, records)
    for name, more in (("all", ()), ("train", ("--statistics", "train"))):
        convert(data, tmp_path / name, "--val-fraction", "1e-9", *more)
    everything = read_codec(tmp_path / "all").datasets["viola"]
    train = read_codec(tmp_path / "train").datasets["viola"]
    # The first record of the first shard is held out.
    assert (everything.max[0], everything.num_transitions, everything.num_trajectories) == (9, 12, 4)
    assert (train.max[0], train.num_transitions, train.num_trajectories) == (2, 9, 3)


def test_statistics_of_which_the_kill_left_half_are_read_again(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with the columns of one run in place of another's: the other's note is no proof of them."""
    records = [viola_episode(["Go"] * 3, moves=[9.0, 9, 9]), viola_episode(["Go"] * 3)]
    folders = open_folders((viola_folder(tmp_path / "data", bucket, records),))
    (own,) = find_datasets(folders, None, load_cards(), (), Asking())

    def collected(statistics: str) -> int:
        (job, *_) = shard_jobs(own, tmp_path / "out", ConvertOptions(statistics=statistics).rules, 0, 1e-9)
        collect_actions(job, tmp_path)
        return int(np.load(tmp_path / f"{job.stem}.actions.npy").shape[1])

    everything = collected("all")
    with monkeypatch.context() as patch:
        patch.setattr("convert.shards.write_json", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            collected("train")
    assert collected("all") == everything
    assert collected("train") < everything


def test_two_folders_are_converted_together_without_any_bucket(
    bucket: Path, data: Path, tmp_path: Path
) -> None:
    one = viola_folder(tmp_path / "one", bucket, [viola_episode(["Go"] * 3) for _ in range(2)])
    shutil.copytree(bucket / "kuka", tmp_path / "two/kuka")
    convert(one, tmp_path / "llava", "--data", str(tmp_path / "two"))
    assert {line["dataset"] for line in lines_of(tmp_path / "llava")} == {"viola", "kuka"}
    said = convert(one, tmp_path / "no", "--data", str(data), code=2)
    assert "viola is in another --data folder, too; keep one of them" in said
    mix = tmp_path / "mix.yaml"
    rows = "".join(f"- {{name: {name}, version: 0.1.0, fraction: 1}}\n" for name in ("kuka", "viola"))
    mix.write_text(f"name: two\ndatasets:\n{rows}")
    convert(one, tmp_path / "mixed", "--data", str(tmp_path / "two"), "--mix", str(mix))
    assert [d.name for d in read_manifest(tmp_path / "mixed").datasets] == ["kuka", "viola"]
    assert read_manifest(tmp_path / "mixed").lock_sha256 == ()


def test_only_some_of_what_was_downloaded(data: Path, tmp_path: Path) -> None:
    convert(data, tmp_path, "--only", "viola", "--only", "bridge_dataset")
    manifest = read_manifest(tmp_path)
    assert [d.name for d in manifest.datasets] == ["bridge_orig", "viola"]
    assert sum(d.share for d in manifest.datasets) == pytest.approx(1)


def test_the_corrected_recipe_is_taken_where_the_mix_asks_for_it(bucket: Path, tmp_path: Path) -> None:
    name = "iamlab_cmu_pickup_insert_converted_externally_to_rlds"
    shutil.copytree(bucket / name, tmp_path / "data" / name)
    written = {}
    for recipe in ("openvla", "corrected"):
        mix = tmp_path / f"{recipe}.yaml"
        mix.write_text(
            f"name: m\ndatasets:\n- {{name: {name}, version: 0.1.0, fraction: 1, recipe: {recipe}}}\n"
        )
        convert(tmp_path / "data", tmp_path / recipe, "--mix", str(mix))
        written[recipe] = read_manifest(tmp_path / recipe).datasets[0]
        assert written[recipe].recipe == recipe
    # A movement has no value at the first step.
    assert written["corrected"].steps.dropped == {"recipe": written["corrected"].episodes.total}
    assert "recipe" not in written["openvla"].steps.dropped


def test_frames_become_jpeg_or_smaller_only_where_asked_for(bucket: Path, tmp_path: Path) -> None:
    """viola's features.json says jpeg; what counts is what lies in the record."""
    png, jpeg = picture(224, 224, "PNG"), picture(224, 224)
    records = [viola_episode(["Go"] * 2, image=image) for image in (png, jpeg)]
    data = viola_folder(tmp_path / "data", bucket, records)

    def written(*words: str) -> list[bytes]:
        out = tmp_path / "_".join(words).replace(":", "")
        convert(data, out, *words)
        return [(out / "images" / line["image"]).read_bytes() for line in lines_of(out)][::2]

    assert written("--images", "keep") == [png, jpeg]
    assert written("--resize", "224") == [png, jpeg]
    turned, kept = written("--images", "jpeg:95")
    assert kept == jpeg
    assert Image.open(io.BytesIO(turned)).format == "JPEG"
    small = [Image.open(io.BytesIO(image)) for image in written("--resize", "100")]
    assert [(image.format, image.size) for image in small] == [("PNG", (100, 100)), ("JPEG", (100, 100))]


def test_what_will_be_written_is_told_before_and_a_full_disk_is_refused(data: Path, tmp_path: Path) -> None:
    from convert.estimate import Estimate, tell
    from oxe_mix.errors import UserError

    said = convert(data, tmp_path / "llava", "--stride", "2")
    first = said.splitlines()[0]
    guessed = int(first.split(" ")[1].replace(",", ""))
    written = read_manifest(tmp_path / "llava").num_samples
    assert "on disk" in first
    assert 0.7 * written < guessed < 1.4 * written
    with pytest.raises(UserError, match=r"about 9000\.0 TB will be written and only"):
        tell(Estimate(10, 9 * 10**15, 1.0), tmp_path / "not/yet/there", 1)


def test_the_manifest_counts_instructions_clips_and_what_hardly_moves(bucket: Path, tmp_path: Path) -> None:
    texts = ["Push it", "", "Push it"]
    records = [viola_episode(texts) for _ in range(3)] + [viola_episode(["Pull it"] * 3)]
    said = convert(viola_folder(tmp_path / "data", bucket, records), tmp_path / "llava")
    dataset = read_manifest(tmp_path / "llava").datasets[0]
    assert dataset.instructions.distinct == 2
    assert dataset.instructions.most_repeated == {"push it": 3, "pull it": 1}
    assert dataset.instructions.unlabelled_samples == 3
    assert dataset.near_constant == (3, 4, 5, 6)
    assert (dataset.weight_share, dataset.share) == (1, 1)
    assert "3 of 4 episodes have one instruction: 'push it'" in said
    assert "3 samples without an instruction got its episode's first" in said
    assert "dimensions near constant (99 % of the samples in one bin): 3, 4, 5, 6" in said


def test_how_many_values_are_clipped_is_told_by_dimension(bucket: Path, tmp_path: Path) -> None:
    """Of 300 steps, 1 % at each end lies outside the quantiles; the gripper's 5 is outside [0, 1]."""
    moves = np.random.default_rng(0).normal(size=300).tolist()
    record = viola_episode(["Go"] * 300, moves=moves)
    convert(viola_folder(tmp_path / "data", bucket, [record]), tmp_path / "llava")
    clipped = read_manifest(tmp_path / "llava").datasets[0].clipped
    stats = read_codec(tmp_path / "llava").datasets["viola"]
    outside = sum(not stats.q01[0] <= np.float32(m) <= stats.q99[0] for m in moves)
    assert clipped[0] == pytest.approx(outside / 300)
    assert 0.015 < clipped[0] < 0.03
    assert clipped[3:] == (0, 0, 0, 0)


def test_the_same_data_in_another_place_gives_the_same_bytes(bucket: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        data = viola_folder(tmp_path / name, bucket, [viola_episode(["Go"] * 3) for _ in range(3)])
        run(OXE_MIX, "convert", "--data", data, "--out", tmp_path / f"{name}-llava", "--layout", "tar")
    assert content_of(tmp_path / "one-llava") == content_of(tmp_path / "two-llava")
