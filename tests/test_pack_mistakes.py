"""What `oxe-mix pack` says of wrong folders and cards, and the page that explains it all."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

from oxe_mix.cards import OpName
from oxe_mix.errors import UserError
from tests.conftest import OXE_MIX, PYTHON, ROOT, run
from tests.test_pack import CARD, EXAMPLE, pack, rows_of, write_rows

PAGE = (ROOT / "docs/add-a-robot.md").read_text()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The example's episodes, to be spoilt."""
    return Path(shutil.copytree(EXAMPLE / "episodes", tmp_path / "episodes"))


def _set(episode: str, row: int, column: str, cell: str) -> Callable[[Path], None]:
    """Put a cell into steps.csv; row 0 is the header."""

    def change(source: Path) -> None:
        rows = rows_of(source / episode)
        rows[row][rows[0].index(column)] = cell
        write_rows(source / episode, rows)

    return change


def _drop_frame(source: Path) -> None:
    (source / "0002/image/0004.jpg").unlink()


def _swap(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda source: (source / name).write_bytes(data)


def _frame(width: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (width, 64)).save(out, kind)
    return out.getvalue()


def _drop_column(source: Path) -> None:
    write_rows(source / "0001", [row[:-1] for row in rows_of(source / "0001")])


def _rename_action(source: Path) -> None:
    for folder in source.iterdir():
        file = folder / "steps.csv"
        file.write_text(file.read_text().replace("action.", "actions."))


def _short_row(source: Path) -> None:
    rows = rows_of(source / "0003")
    write_rows(source / "0003", [*rows[:4], rows[4][:3], *rows[5:]])


def _semicolons(source: Path) -> None:
    file = source / "0001/steps.csv"
    file.write_text(file.read_text().replace(",", ";"))


def _folder_for_a_frame(source: Path) -> None:
    (source / "0001/image/0002.jpg").unlink()
    (source / "0001/image/0002.jpg").mkdir()


def _add_column(source: Path) -> None:
    rows = rows_of(source / "0000")
    write_rows(source / "0000", [[*row, "instruction" if i == 0 else "a"] for i, row in enumerate(rows)])


def _empty_column(source: Path) -> None:
    (source / "0001/instruction.txt").unlink()
    rows = rows_of(source / "0001")
    write_rows(source / "0001", [[*row, "instruction" if i == 0 else " "] for i, row in enumerate(rows)])


WHOLE = (EXAMPLE / "episodes/0000/image/0000.jpg").read_bytes()
PROBLEMS: list[tuple[Callable[[Path], object], str]] = [
    (_drop_frame, "0002/image: 10 frames for 11 rows of steps.csv; after 0003.jpg comes 0005.jpg"),
    (lambda s: (s / "0002/image/0000.jpg").unlink(), "0002/image: 10 frames for 11 rows of steps.csv"),
    (_swap("0001/image/0010.jpg", WHOLE), "0001/image: 11 frames for 10 rows of steps.csv"),
    (_swap("0001/image/3.jpg", WHOLE), "0001/image/3.jpg: the same number as 0003.jpg; keep one of them"),
    (
        _swap("0001/image/notes.txt", b"x"),
        "0001/image/notes.txt: no frame; only .jpg, .jpeg, .png may be here",
    ),
    (
        _swap("0001/image/0002.jpg", WHOLE[:-40]),
        "0001/image/0002.jpg: no whole JPEG or PNG (image file is truncated",
    ),
    (_swap("0001/image/0002.jpg", b""), "0001/image/0002.jpg: no whole JPEG or PNG (it starts with b'')"),
    (
        _swap("0001/image/0002.jpg", WHOLE + b"x"),
        "0001/image/0002.jpg: other bytes follow the end of the JPEG",
    ),
    (
        _swap("0001/image/0002.jpg", _frame(32)),
        "0001/image/0002.jpg: 32x64 JPEG, but this camera's first frame is 64x64 JPEG",
    ),
    (
        _swap("0001/image/0002.jpg", _frame(64, "PNG")),
        "0001/image/0002.jpg: 64x64 PNG, but this camera's first frame is 64x64 JPEG",
    ),
    (
        _swap("0000/image/0000.jpg", _frame(64, mode="CMYK")),
        "0000/image/0000.jpg: pixels of kind CMYK; save it as",
    ),
    (lambda s: (s / "0003/image").rename(s / "0003/img"), "0003/image: no such folder; expected the frames"),
    (_set("0003", 4, "state.y", "left"), "0003/steps.csv:5: column state.y: 'left' is no number"),
    (_set("0003", 4, "state.y", "1_0"), "0003/steps.csv:5: column state.y: '1_0' is no number"),
    (
        _set("0003", 4, "state.y", "0,5"),
        "0003/steps.csv:5: column state.y: '0,5' is no number; write decimals with a point",
    ),
    (_set("0003", 4, "state.y", " "), "0003/steps.csv:5: column state.y: empty, expected a number"),
    (_set("0003", 4, "state.y", "NaN"), "0003/steps.csv:5: column state.y: 'NaN' is not finite"),
    (_set("0003", 4, "state.y", "-inf"), "0003/steps.csv:5: column state.y: '-inf' is not finite"),
    (_set("0003", 4, "state.y", "1e39"), "0003/steps.csv:5: column state.y: 1e39 is too large for float32"),
    (_set("0003", 0, "state.y", "state.x"), "0003/steps.csv:1: column state.x stands there twice"),
    (
        _rename_action,
        "0000/steps.csv:1: no column for the card's key [action]; expected action.NAME or action; "
        "did you mean actions?",
    ),
    (_drop_column, "0001/steps.csv:1: lacks action.gripper, unlike "),
    (_short_row, "0003/steps.csv:5: 3 cells, the header has 15"),
    (_semicolons, "0001/steps.csv:1: columns are not parted by commas; save it with commas"),
    (_swap("0001/steps.csv", b""), "0001/steps.csv: empty; expected a row of column names"),
    (_swap("0001/steps.csv", b"state.x,action.x\n"), "0001/steps.csv: no steps, only column names"),
    (_swap("0001/steps.csv", "größe\n".encode("latin-1")), "0001/steps.csv: not UTF-8 text"),
    (_swap("0001/steps.csv", b'a,b\n"1,2\n'), "0001/steps.csv: not CSV ("),
    (_swap("0001/instruction.txt", b" \r\n"), "0001/instruction.txt: empty; write what the robot was to do"),
    (
        lambda s: (s / "0001/instruction.txt").unlink(),
        "0001/instruction.txt: no such file, and steps.csv has no column instruction",
    ),
    (_add_column, "0000/instruction.txt: steps.csv has a column instruction as well; keep one of them"),
    (_folder_for_a_frame, "0001/image/0002.jpg: cannot be read (Is a directory)"),
    (_empty_column, "0001/steps.csv: column instruction is empty at every step"),
    (lambda s: (s / "0001/steps.csv").unlink(), "0001: no steps.csv, so this is no episode"),
    (lambda s: [f.rename(s.parent / f.name) for f in list(s.iterdir())], "no episodes; expected "),
    (
        lambda s: s.rename(s.parent / "elsewhere"),
        "no such folder; expected a folder with one folder for each",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), PROBLEMS, ids=[message for _, message in PROBLEMS])
def test_what_is_wrong_is_named_with_its_place_and_nothing_is_written(
    source: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(source)
    with pytest.raises(UserError) as refused:
        pack(source)
    lines = str(refused.value).splitlines()
    where = f"{source}/" if message[0].isdigit() else f"{source}: "
    assert lines[0].startswith(f"{where}{message}"), lines
    assert len(lines) == 1 or message.startswith(("0000/steps.csv", "0000/image"))
    left = [path.name for path in (source.parent / "data").rglob("*")]
    assert left in ([], [".oxe-mix.busy"])


def test_all_that_is_wrong_is_said_at_once_a_line_each(source: Path) -> None:
    _set("0000", 3, "action.x", "?")(source)
    for row in range(1, 7):
        _set("0003", row, "action.z", "")(source)
    _drop_frame(source)
    _swap("0002/instruction.txt", b"")(source)
    done = run(OXE_MIX, "pack", source, "--card", CARD, "--out", source.parent / "data", code=2)
    # The first episode decides what the others are held to, so it has to be right first.
    assert done.stderr.splitlines() == [
        f"error: {source}/0000/steps.csv:4: column action.x: '?' is no number"
    ]
    _set("0000", 3, "action.x", "0")(source)
    done = run(OXE_MIX, "pack", source, "--card", CARD, "--out", source.parent / "data", code=2)
    place = f"error: {source}/"
    assert done.stderr.splitlines() == [
        f"{place}0002/instruction.txt: empty; write what the robot was to do, as one sentence",
        f"{place}0002/image: 10 frames for 11 rows of steps.csv; after 0003.jpg comes 0005.jpg",
        *(f"{place}0003/steps.csv:{row}: column action.z: empty, expected a number" for row in (2, 3, 4)),
        f"{place}0003/steps.csv: 3 more cells like these",
    ]
    for number in range(30):
        (source / f"1{number:03d}").mkdir()
        (source / f"1{number:03d}/steps.csv").write_text("")
    with pytest.raises(UserError, match="and 16 problems more") as refused:
        pack(source)
    assert len(str(refused.value).splitlines()) == 21


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("dims: 7", "dims: 6", 20, "the recipe comes to 7 columns, dims says 6"),
        ("decode: utf8", "decode: int32_codepoints", 28, "int32_codepoints: pack writes text; use utf8"),
        ("version: 1.0.0", "version: v1", 3, "'v1' is no version for TFDS; write it as 1.0.0"),
        ("{primary: image,", "{primary: null,", 9, "no camera; a conversation needs a frame"),
        ("[language_instruction]", "[action, text]", 2, "action and action.text cannot both be features"),
        ("clip01]", "clip10]", 23, "'clip10' is unknown; allowed:"),
    ],
)
def test_a_card_that_does_not_fit_is_named_with_its_line(
    source: Path, old: str, new: str, line: int, message: str
) -> None:
    spoilt = CARD.read_text().replace(old, new, 1)
    if line == 20:
        spoilt = spoilt.replace(
            "true, true, true, true, true, true, false", "true, true, true, true, true, false"
        ).replace("units: [m, ", "units: [")
    file = source.parent / "my_robot.yaml"
    file.write_text(spoilt)
    with pytest.raises(UserError) as refused:
        pack(source, file)
    assert re.match(rf"{re.escape(str(file))}:{line}: .*{re.escape(message)}", str(refused.value)), (
        refused.value
    )
    assert not (source.parent / "data/my_robot").exists()


def _shown() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_the_pages_commands_run_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "PATH": f"{Path(PYTHON).parent}:{os.environ['PATH']}"}
    said = ""
    for command in _shown():
        words = shlex.split(command)
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        said += done.stdout
    assert [shlex.split(command)[1] for command in _shown()][:3] == ["pack", "convert", "check"]
    for shown in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL):
        for line in shown.splitlines():
            assert re.sub(r"\d+\.\d s.*", "", line) in said, line
    lines = (tmp_path / "llava/conversations/my_robot-train-00000-of-00001.jsonl").read_text().splitlines()
    assert len(lines) == 41
    image = json.loads(lines[12])["image"]
    assert (tmp_path / "llava/images" / image).read_bytes() == (
        EXAMPLE / "episodes/0001/image/0001.jpg"
    ).read_bytes()


def test_the_examples_readme_shows_the_pages_first_commands() -> None:
    shown = re.findall(r"```bash\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)
    assert shown[0].splitlines() == _shown()[:3]


def test_every_op_of_the_vocabulary_stands_in_the_pages_table() -> None:
    table = re.findall(r"^\| `([a-z0-9_]+)`", PAGE[PAGE.index("## The ops") :], re.MULTILINE)
    assert sorted(table) == sorted([*get_args(OpName), "slice"])


def test_the_page_explains_every_line_of_the_card_as_it_stands() -> None:
    shown = "".join(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
    plain = [line.split("#")[0].rstrip() for line in CARD.read_text().splitlines()]
    assert [line for line in shown.splitlines() if line.strip()] == [line for line in plain if line.strip()]


def test_the_pages_messages_are_those_that_are_given() -> None:
    mistakes = PAGE[PAGE.index("## Common mistakes") :]
    messages = re.findall(r"^\| [^|]+ \| `([^`]+)`", mistakes, re.MULTILINE)
    given = [message for _, message in PROBLEMS]
    assert len(messages) >= 8
    for message in messages:
        assert any(message.removeprefix("…/") == own.rstrip() for own in given), message
