"""LLaVA data of every form by index: what is read, what is sampled, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.frames import Frame
from oxe_mix.errors import UserError
from tests.conftest import ROOT
from train_llava import llava_index
from train_llava.llava_data import Conversation, LlavaData
from train_llava.llava_index import open_index

TURNS = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cup."}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/oxe-mix"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    for name in ("a/1.jpg", "a/2.jpg"):
        (folder / name).write_bytes(name.encode())
    return folder


def sample(name: object, **more: Any) -> dict[str, Any]:
    return {"id": name, "conversations": TURNS, **more}


def write(file: Path, samples: list[Any]) -> Path:
    is_lines = file.suffix == ".jsonl"
    file.write_text("".join(f"{json.dumps(s)}\n" for s in samples) if is_lines else json.dumps(samples))
    return file


def ids(data: LlavaData) -> list[str]:
    return [data[i].id for i in range(len(data))]


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_turns_images_and_texts_are_what_the_file_says(tmp_path: Path, images: Path, name: str) -> None:
    several = [
        {"from": "human", "value": "<image>\n<image>\nWhich is \"red\" {or} \\ 'blue' ]?\u2028é"},
        {"from": "gpt", "value": "The first."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": ""},
    ]
    one = [{"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "Look: <image>"}, TURNS[1]]
    rows = [
        {"id": 7, "image": ["a/1.jpg", "a/../a/2.jpg"], "conversations": several, "more": [[{}], "x"]},
        {"image": str(images / "a/1.jpg"), "conversations": one},
        {"id": "t", "image": None, "conversations": TURNS},
    ]
    data = LlavaData(write(tmp_path / name, rows), images)
    first, second = Frame(images / "a/1.jpg"), Frame(images / "a/2.jpg")
    assert [data[i] for i in range(len(data))] == [
        Conversation(
            "7",
            (
                ("human", several[0]["value"]),
                ("gpt", "The first."),
                ("human", "And?"),
                ("gpt", ""),
            ),
            (first, second),
        ),
        Conversation("d/1", (("human", "Look: <image>"), ("gpt", "A cup.")), (first,)),
        Conversation("t", (("human", "What is it?"), ("gpt", "A cup.")), ()),
    ]
    assert data[0].images[1].read() == b"a/2.jpg"
    for index in (-1, 3):
        with pytest.raises(IndexError):
            data[index]


def test_an_image_below_a_link_to_the_folder_is_inside(tmp_path: Path, images: Path) -> None:
    (tmp_path / "link").symlink_to(images)
    name = str(tmp_path / "link/a/1.jpg")
    row = {"id": 1, "image": name, "conversations": [{"from": "human", "value": "<image>"}, TURNS[1]]}
    data = LlavaData(write(tmp_path / "d.json", [row]), tmp_path / "link")
    assert data[0].images[0].read() == b"a/1.jpg"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from('\\"{}[],:'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.lists(st.dictionaries(st.text(max_size=4) | st.just('\\"'), JSON, max_size=4), max_size=6)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(OBJECTS, st.integers(1, 40), st.sampled_from([None, 0, 1, "\t"]), st.booleans())
def test_an_array_is_cut_into_its_elements_wherever_the_blocks_end(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[Any],
    block: int,
    indent: Any,
    ascii_only: bool,
) -> None:
    monkeypatch.setattr(llava_index, "_BLOCK", block)
    for file, text in (
        (tmp_path / "d.json", json.dumps(rows, indent=indent, ensure_ascii=ascii_only)),
        (tmp_path / "d.jsonl", "\n\r\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)),
    ):
        file.write_bytes(text.encode())
        index = llava_index.open_index(file, tmp_path / "cache" / str(hash(text)))
        assert [json.loads(index.read(i)) for i in range(index.num_samples)] == rows


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(OBJECTS, st.data(), st.sampled_from([b"", b"]", b"[", b"{", b"}", b",", b'"', b"x", b"\\"]))
def test_a_broken_array_is_refused_or_its_broken_element_is(
    tmp_path: Path, rows: list[Any], data: st.DataObject, put: bytes
) -> None:
    text = json.dumps(rows).encode()
    place = data.draw(st.integers(0, len(text) - 1))
    broken = text[:place] + put + text[place + 1 :]
    (tmp_path / "d.json").write_bytes(broken)
    try:
        index = open_index(tmp_path / "d.json", tmp_path / "cache" / str(hash(broken)))
        read = [json.loads(index.read(i)) for i in range(index.num_samples)]
    except ValueError:
        read = None
    try:
        whole = json.loads(broken)
    except ValueError:
        whole = None
    are_objects = isinstance(whole, list) and all(isinstance(row, dict) for row in whole)
    assert read == (whole if are_objects else None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "{}",
        "[1]",
        "[{}, 2]",
        '["{}"]',
        "[[{}]]",
        "[{}",
        "[{},]",
        "[{}{}]",
        "[{}] x",
        "[{}][{}]",
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d",
        '[{"a": "]}',
        "^[{}]",
        "null",
        '[{}"]',
        "[{}]\\",
    ],
)
def test_a_file_that_is_no_array_of_objects_is_refused_at_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(UserError, match=r"d\.json: not an array of JSON objects"):
        LlavaData(tmp_path / "d.json", None)


def test_the_index_is_kept_until_the_file_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "d.json", [sample(1)])
    assert ids(LlavaData(file, None)) == ["1"]
    made = list(cache.iterdir())
    assert len(made) == 1
    monkeypatch.setattr(llava_index, "_write", None)
    again = LlavaData(file, None)
    assert ids(pickle.loads(pickle.dumps(again))) == ["1"]  # as a loader's worker gets it
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    time_of_change = file.stat().st_mtime_ns
    file.write_text(f" {json.dumps([sample(1)])}".replace(": ", ":", 1))  # of the same size
    os.utime(file, ns=(time_of_change, time_of_change + 1))
    assert ids(LlavaData(file, None)) == ["1"]
    write(file, [sample(1), sample(2)])
    assert ids(LlavaData(file, None)) == ["1", "2"]
    assert len(list(cache.iterdir())) == 3
    file.unlink()
    with pytest.raises(UserError, match=r"d\.json: it or its index .* cannot be read"):
        again[0]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write here .*; set XDG_CACHE_HOME"):
        LlavaData(write(tmp_path / "d.json", [sample(1)]), None, cache=tmp_path / "file/x")


LISTING = "datasets:\n- json_path: {path}\n  sampling_strategy: {strategy}\n"


def listed(tmp_path: Path, strategy: str, num_samples: int = 11, seed: int = 0) -> list[int]:
    """What a strategy takes of samples 0, 1, …"""
    file = write(tmp_path / "d.json", [sample(i) for i in range(num_samples)])
    (tmp_path / "data.yaml").write_text(LISTING.format(path=file, strategy=strategy))
    return list(map(int, ids(LlavaData(tmp_path / "data.yaml", None, seed))))


@pytest.mark.parametrize(
    ("strategy", "taken"),
    [
        ("all", range(11)),
        ("first:3", range(3)),
        ("first:30", range(11)),
        ("first:10%", range(2)),  # 1.1 is rounded up, as LLaVA-NeXT does
        ("first:0.5%", range(1)),
        ("first:100%", range(11)),
        ("end:4", range(7, 11)),
        ("end:50%", range(5, 11)),
        ("end:12", range(11)),
    ],
)
def test_a_strategy_takes_exactly_what_llava_next_takes(tmp_path: Path, strategy: str, taken: range) -> None:
    assert listed(tmp_path, strategy) == list(taken)


def test_a_random_share_is_seeded_without_repeats_and_grows(tmp_path: Path) -> None:
    few, more = listed(tmp_path, "random:30", 100), listed(tmp_path, "random:45%", 100)
    assert len(set(more)) == 45
    assert few == more[:30]
    assert few != sorted(few)
    assert few == listed(tmp_path, "random:30", 100)
    assert set(few) != set(listed(tmp_path, "random:30", 100, seed=1))
    assert sorted(listed(tmp_path, "random:100%", 100)) == list(range(100))


def test_a_listing_is_all_its_files_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "here").mkdir()
    write(tmp_path / "data/a.json", [sample("a0"), sample("a1")])
    write(tmp_path / "data/b.json", [sample("b0"), sample("b1")])
    write(tmp_path / "here/c.jsonl", [sample("c0")])
    (tmp_path / "data/data.yaml").write_text(
        'datasets:\n- {json_path: "{a,b}.json", sampling_strategy: "end:1"}\n- {json_path: c.jsonl}\n'
    )
    monkeypatch.chdir(tmp_path / "here")
    data = LlavaData(tmp_path / "data/data.yaml", None)
    assert ids(data) == ["a1", "b1", "c0"]
    assert [(t.samples.file.name, t.samples.num_samples, len(t.numbers)) for t in data.files] == [
        ("a.json", 2, 1),
        ("b.json", 2, 1),
        ("c.jsonl", 1, 1),
    ]
    assert ids(LlavaData(Path("../data/{b,a}.json"), None)) == ["b0", "b1", "a0", "a1"]
    # The same name beside the listing and in the working folder: not for us to choose.
    write(tmp_path / "here/a.json", [sample("x")])
    with pytest.raises(
        UserError, match=r"a\.json: could be .*here/a\.json or .*data/a\.json; write it in full"
    ):
        LlavaData(tmp_path / "data/data.yaml", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: []\n", "data.yaml:1: datasets: "),
        ("- json_path: d.json\n", "data.yaml:1: file: "),
        ("files: []\n", "data.yaml:1: files: "),
        (
            LISTING.format(path="d.json", strategy="frist:3"),
            "'frist:3' is none of all, first:N, end:N, random:N",
        ),
        (
            LISTING.format(path="d.json", strategy="first"),
            r"data.yaml:3: datasets.0.sampling_strategy: 'first'",
        ),
        (LISTING.format(path="d.json", strategy="all:3"), "'all:3' is none of"),
        (LISTING.format(path="d.json", strategy="end:0"), "d.json: end:0 of 1 sample leaves none"),
        (LISTING.format(path="gone.json", strategy="all"), "data.yaml: gone.json: no such file"),
        ("datasets:\n- json_path: d.json\n  strategy: all\n", "data.yaml:3: datasets.0.strategy: "),
    ],
)
def test_a_wrong_listing_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "d.json", [sample(1)])
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        LlavaData(tmp_path / "data.yaml", None)
    assert message in str(error.value)


def test_a_file_of_another_kind_or_without_a_sample_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("a,b")
    for name, message in (("d.csv", "not LLaVA data"), ("gone.json", "cannot be read")):
        with pytest.raises(UserError, match=message):
            LlavaData(tmp_path / name, None)
    with pytest.raises(UserError, match="all of 0 samples leaves none"):
        LlavaData(write(tmp_path / "d.json", []), None)
    with pytest.raises(UserError, match="no such folder of images"):
        LlavaData(write(tmp_path / "e.json", [sample(1)]), tmp_path / "gone")


def _with(**change: Any) -> Callable[[], dict[str, Any]]:
    return lambda: sample(1) | change


ASKED = {"from": "human", "value": "<image>\nWhat?"}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (_with(image="a/1.jpg"), "1 images, but 0 times <image> in the turns"),
        (_with(conversations=[ASKED, TURNS[1]]), "0 images, but 1 times <image>"),
        (_with(image=["a/1.jpg", "a/2.jpg"], conversations=[ASKED, TURNS[1]]), "2 images, but 1 times"),
        (_with(image="../x.jpg", conversations=[ASKED, TURNS[1]]), "'../x.jpg' lies outside"),
        (_with(image="/etc/hosts", conversations=[ASKED, TURNS[1]]), "'/etc/hosts' lies outside"),
        (_with(image="a/../../images-2/x", conversations=[ASKED, TURNS[1]]), "lies outside"),
        (_with(image="", conversations=[ASKED, TURNS[1]]), "'' lies outside"),
        (_with(image=5, conversations=[ASKED, TURNS[1]]), "TypeError"),
        (_with(video="v.mp4"), "a video, which is not trained on"),
        (_with(conversations=[]), "turns by nobody do not alternate"),
        (_with(conversations=TURNS[:1]), "turns by human do not alternate"),
        (_with(conversations=[*TURNS, TURNS[1]]), "turns by human, gpt, gpt do not alternate"),
        (_with(conversations=[TURNS[0], {"from": "gpt", "value": "<image>"}]), "an answer holds <image>"),
        (_with(conversations=[TURNS[0], {"from": "robot", "value": "x"}]), "not a text of human, user, gpt"),
        (_with(conversations=[TURNS[0], {"from": "gpt", "value": None}]), "not a text of human"),
        (_with(conversations=[TURNS[0], {"from": "gpt"}]), "KeyError: 'content'"),
        (lambda: {"id": 3}, "KeyError: 'conversations'"),
        (_with(conversations=[TURNS[0], {"from": "gpt", "value": "\ud83d"}]), "surrogates not allowed"),
        (_with(image="\ud83d.jpg", conversations=[ASKED, TURNS[1]]), "surrogates not allowed"),
    ],
)
def test_a_sample_that_cannot_be_trained_on_is_named(
    tmp_path: Path, images: Path, made: Callable[[], dict[str, Any]], message: str
) -> None:
    data = LlavaData(write(tmp_path / "d.jsonl", [sample(0), made()]), images)
    assert data[0].id == "0"
    with pytest.raises(UserError) as error:
        data[1]
    assert message in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'd.jsonl'}: sample 2: not usable: ")
    assert "\n" not in str(error.value)


def test_broken_lines_and_images_without_a_folder_are_named(tmp_path: Path) -> None:
    row = sample(1, image="a.jpg", conversations=[ASKED, TURNS[1]])
    (tmp_path / "d.jsonl").write_text(f"{json.dumps(row)}\n[]\n{{broken\n")
    data = LlavaData(tmp_path / "d.jsonl", None)
    for index, message in enumerate(("no folder of images was given", "no JSON object", "JSONDecodeError")):
        with pytest.raises(UserError, match=f"sample {index + 1}: not usable: .*{message}"):
            data[index]


# In a process of its own, by its own peak: getrusage would count that of the process it came from.
PROBE = """\
import re, sys
from pathlib import Path
from train_llava.llava_data import LlavaData
from train_llava.mixture import Permutation
import numpy as np

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

LlavaData(Path(sys.argv[1]), None)[0]
before = peak()
data = LlavaData(Path(sys.argv[2]), None)
order = Permutation(len(data), 0)(np.arange(5000))
assert [data[int(i)].id for i in order] == [str(i) for i in order]
print(peak() - before, len(data))
"""


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, suffix: str) -> None:
    small = write(tmp_path / f"small{suffix}", [sample(0)])
    between, ends = ("\n", "") if suffix == ".jsonl" else (",\n", "[]")
    text = json.dumps(TURNS)
    rows = (f'{{"id": {i}, "conversations": {text}}}' for i in range(300_000))
    large = tmp_path / f"large{suffix}"
    large.write_text(f"{ends[:1]}{between.join(rows)}{ends[1:]}")
    done = subprocess.run(
        [sys.executable, "-c", PROBE, small, large], capture_output=True, text=True, cwd=ROOT, check=True
    )
    kilobytes, num_samples = map(int, done.stdout.split())
    assert num_samples == 300_000
    assert large.stat().st_size > 30e6
    assert 0 < kilobytes < 20_000
