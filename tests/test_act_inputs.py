"""Files that `oxe-mix act` is given: in which order, of which kinds, and what is refused in one line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from oxe_mix.errors import UserError
from oxe_mix.images import opened
from tests.serving import write_checkpoint
from train_llava.acting.act_command import ActOptions, run_act
from train_llava.acting.load import Loading
from train_llava.acting.pictures import pictures
from train_llava.loading import load_checkpoint, save_checkpoint

CPU = Loading(device="cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def _act(checkpoint: Path, **asked: Any) -> int:
    words: dict[str, Any] = {"instruction": "go", "unnorm_key": "viola", "loading": CPU} | asked
    return run_act(ActOptions(checkpoint, **words))


def test_names_sort_as_people_read_them(tmp_path: Path) -> None:
    names = ["left_2.png", "left_10.png", "right_1.png", "right_2.png", "x.png", "x1_b.png", "x²2.png"]
    for name in reversed(names):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    assert [Path(picture.name).name for picture in pictures(tmp_path)] == names


def test_a_picture_of_gigabytes_is_refused_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    Image.new("1", (20_000, 10_000)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match=r"large\.png: not an image that can be decoded \(Image size"):
        _act(checkpoint, images=(str(tmp_path / "large.png"),))


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it can still read
@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG"])
def test_whatever_is_broken_in_a_picture_is_one_kind_of_error(kind: str) -> None:
    stream = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").resize((24, 24)).save(stream, kind)
    whole = stream.getvalue()
    num_refused = 0
    for place in range(min(len(whole), 200)):
        for value in (0, 0x7F, 0xFF):
            broken = bytearray(whole)
            broken[place] = value
            try:
                with opened(bytes(broken)) as image:
                    image.convert("RGB")
            except ValueError:
                num_refused += 1
    assert num_refused > 10


def test_a_request_is_of_one_picture(checkpoint: Path, picture: Path) -> None:
    requests = picture.parent / "requests.jsonl"
    requests.write_text(json.dumps({"image": "."}))
    with pytest.raises(UserError, match=r"cannot be read|no such image|not an image"):
        _act(checkpoint, requests=requests)


def test_a_request_may_hold_every_character_of_json(
    checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = picture.parent / "requests.jsonl"
    line = json.dumps({"image": picture.name, "instruction": "go\u2028left\x85 now"}, ensure_ascii=False)
    requests.write_text(f"{line}\r\n\n{line}\n", encoding="utf-8", newline="")
    assert _act(checkpoint, requests=requests) == 0
    said = [json.loads(one)["image"] for one in capsys.readouterr().out.splitlines()]
    assert said == [f"{requests}:1", f"{requests}:3"]


def test_a_model_that_computes_no_numbers_is_told_in_one_line(picture: Path) -> None:
    broken = write_checkpoint(picture.parent / "broken")
    model, processor = load_checkpoint(broken)
    with torch.no_grad():
        model.model.language_model.norm.weight[3] = torch.nan
    save_checkpoint(broken, model, processor)
    with pytest.raises(UserError, match=r"the model computes no numbers \(nan\)"):
        _act(broken, images=(str(picture),))
