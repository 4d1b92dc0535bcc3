"""What a policy server reads from the network: arrays, maps, fields, and what each limit says."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from convert.prompt import Asking
from oxe_mix.errors import UserError
from train_llava.acting import json_numpy
from train_llava.acting.arrays import DTYPES, Packed, RequestError, fields_of, unpacked
from train_llava.acting.incoming import Caps, incoming
from train_llava.acting.msgpack_numpy import pack, unpack
from train_llava.acting.obs_keys import obs_keys
from train_llava.acting.observation import ObservationError

FRAME = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
KEYS = obs_keys(Asking(cameras=("primary", "wrist"), state=True))
ARRAY = {b"__ndarray__": True, b"data": b"\0" * 4, b"dtype": "<f4", b"shape": [1]}
any_array = st.sampled_from(DTYPES).flatmap(
    lambda dtype: arrays(np.dtype(dtype), array_shapes(max_dims=4, max_side=4))
)


def _of_msgpack(message: Any) -> dict[str, object]:
    return fields_of(unpack(message if isinstance(message, bytes) else msgpack.packb(message)))


@given(any_array)
def test_an_array_comes_back_bit_for_bit_from_both_encodings(array: np.ndarray[Any, Any]) -> None:
    inner = {"deep": array}
    text = f'{{"a": {json_numpy.dumps(array)}, "b": {{"deep": {json_numpy.dumps(array)}}}}}'
    for found in (
        fields_of(unpack(pack({"a": array, "b": inner}))),
        fields_of(json_numpy.loads(text.encode())[0]),
    ):
        for path in ("a", "b/deep"):
            back = found[path]
            assert isinstance(back, np.ndarray)
            assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


@pytest.mark.parametrize(
    "dtype", ["|O", "O", "|V8", "<c8", "<U3", "|S4", ">f4", "<M8[s]", "|b1", "f4", [["x", "<f4"]], 7, None]
)
def test_types_that_are_not_plain_numbers_are_refused_by_name(dtype: Any) -> None:
    with pytest.raises(RequestError, match=r"^image: arrays of type .* are not taken"):
        _of_msgpack({"image": ARRAY | {b"dtype": dtype}})


@pytest.mark.parametrize("shape", [[-1], [0], [1, True], [1.0], ["1"], [1] * 5, "1", 3, None, [2**40], [[1]]])
def test_shapes_that_are_none_are_refused(shape: Any) -> None:
    with pytest.raises(RequestError, match=r"^image: shape .* is none"):
        _of_msgpack({"image": ARRAY | {b"shape": shape}})


def test_bytes_that_do_not_fill_the_shape_are_refused() -> None:
    with pytest.raises(RequestError, match=r"^image: <f4 \[2, 3\] is 24 bytes, 4 were sent"):
        _of_msgpack({"image": ARRAY | {b"shape": [2, 3]}})
    with pytest.raises(RequestError, match=r"is 85,070,591,\S+ bytes, 4 were sent"):
        _of_msgpack({"image": ARRAY | {b"shape": [2**31] * 4}})
    with pytest.raises(RequestError, match=r"^image: has no bytes"):
        _of_msgpack({"image": ARRAY | {b"data": [1, 2]}})
    with pytest.raises(RequestError, match=r"^image: is not base64"):
        unpacked(Packed("AAAA?AA==", "<f4", [1]), "image")


def _nested(depth: int) -> Any:
    value: Any = {"image": 1}
    for _ in range(depth):
        value = {"images": value}
    return value


# The header of a list that says it holds four billion values, again and again: gigabytes, were it believed.
BOMB = b"\x81\xa5image" + b"\xdd\xff\xff\xff\xff" * 1000


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (b"", "is not msgpack"),
        (b"\xc1", "is not msgpack"),
        (msgpack.packb({"a": 1}) + b"\0", "is not msgpack"),
        (msgpack.packb({"prompt": "a"})[:-1], "is not msgpack"),
        (b"\x81\xa1a\xa1\xff", "is not msgpack"),  # text that is not UTF-8
        (BOMB, "is not msgpack"),
        (b"\x91" * 5000, "is not msgpack"),
        (msgpack.packb({"a": msgpack.ExtType(5, b"x")}), "is not msgpack"),
        (msgpack.packb({7: 1}, strict_types=False), "is not msgpack"),
        (b"\x82\xa1a\x01\xa1a\x02", "a key that is given twice"),
        (msgpack.packb([1]), "is no map of fields"),
        (msgpack.packb({"a": [0] * 1100}), "exceeds max_array_len"),
        (msgpack.packb({"a": [[]] * 300}), "has more than 256 maps and lists"),
        (msgpack.packb({f"{i}": 1 for i in range(65)}), "has more than 64 fields"),
        (msgpack.packb(_nested(5)), "maps are nested deeper than 4"),
        (msgpack.packb({b"raw": 1}), "has the key b'raw', which is no text"),
        (msgpack.packb({"a/b": 1, "a": {"b": 1}}), "a/b: is given twice"),
        (msgpack.packb({"a": {b"__npgeneric__": True, b"data": "x", b"dtype": "<U1"}}), "no plain number"),
    ],
)
def test_messages_that_are_no_request_are_refused(message: bytes, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        _of_msgpack(message)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"a": 1, "a": 2}', "given twice"),
        (b"[" * 3000, "more maps, lists and values"),
        (b"[" * 1000, "is not JSON"),
        (b"[" + b"1," * 20_000 + b"1]", "more maps, lists and values"),
        (b'"text"', "is no map of fields"),
        (b'{"encoded": 3}', "is the whole request as text"),
        (b'{"encoded": "{}", "image": 1}', "is the whole request as text"),
        (b'{"image": {"__numpy__": "AAAA", "dtype": "|O", "shape": [1]}}', "arrays of type '|O'"),
        (b'{"image": {"__numpy__": 5, "dtype": "<f4", "shape": [1]}}', "has no bytes"),
    ],
)
def test_bodies_that_are_no_request_are_refused(body: bytes, says: str) -> None:
    with pytest.raises(RequestError, match=says.replace("|", r"\|")):
        fields_of(json_numpy.loads(body)[0])


def test_json_numpy_is_written_as_that_package_writes_it() -> None:
    array = np.array([[1, 2]], np.float32)
    expected = {"__numpy__": base64.b64encode(array.tobytes()).decode(), "dtype": "<f4", "shape": [1, 2]}
    assert json.loads(json_numpy.dumps(array)) == expected
    inner = json.dumps({"image": expected, "instruction": "go"})
    assert json_numpy.loads(json.dumps({"encoded": inner}).encode()) == (
        json_numpy.loads(inner.encode())[0],
        True,
    )


def test_every_name_of_openpi_and_openvla_means_what_it_does_there() -> None:
    state = np.array([1.0, 2.0])
    for fields in (
        {"images/primary": FRAME, "images/wrist": FRAME + 1, "state": state, "prompt": "go"},
        {
            "observation/image": FRAME,
            "observation/wrist_image": FRAME + 1,
            "observation/state": state,
            "prompt": "go",
        },
        {"image": FRAME, "images/wrist": FRAME + 1, "state": [1, 2.0], "instruction": "go"},
    ):
        seen = incoming(fields | {"unnorm_key": "viola", "seed": np.array(3)}, KEYS, Caps()).observation
        assert (seen.images["primary"] == FRAME).all()
        assert (seen.images["wrist"] == FRAME + 1).all()
        assert seen.state is not None
        assert seen.state.tolist() == [1, 2]
        assert (seen.instruction, seen.unnorm_key, seen.seed) == ("go", "viola", 3)


def test_what_openpi_sends_of_every_robot_is_ignored_by_a_checkpoint_without_it() -> None:
    wrist_only = obs_keys(Asking(cameras=("wrist",)))
    assert wrist_only["image"] == wrist_only["observation/wrist_image"] == "wrist"
    assert wrist_only["observation/state"] == "ignore"
    seen = incoming({"image": FRAME, "observation/state": object(), "prompt": "go"}, wrist_only, Caps())
    assert seen.observation.state is None


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("image", FRAME[..., 0], "image: is uint8 [2, 3]; give uint8 [H, W, 3]"),
        ("image", FRAME.astype(np.float32), "image: is float32 [2, 3, 3]; give uint8"),
        ("image", "a.jpg", "image: is str; give uint8"),
        ("image", np.zeros((11, 10, 3), np.uint8), "image: has 110 pixels; at most 100"),
        ("prompt", "x" * 31, "prompt: has 31 characters; at most 30"),
        ("prompt", b"go", "prompt: is bytes; give text"),
        ("unnorm_key", 3, "unnorm_key: is int; give text"),
        ("state", [1, True], "state: is list; give numbers [S]"),
        ("state", np.zeros((2, 2)), "state: is float64 [2, 2]; give numbers [S]"),
        ("state", np.zeros(2000), "state: has 2,000 numbers; at most 1,024"),
        ("seed", -1, "seed: give a whole number"),
        ("seed", True, "seed: give a whole number"),
        ("seed", 1.0, "seed: give a whole number"),
        ("promt", "go", "promt: unknown field; did you mean prompt?"),
        ("instruction", "go", "says already: prompt"),
    ],
)
def test_a_field_that_will_not_do_is_named(field: str, value: object, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        incoming({"prompt": "go", field: value}, KEYS, Caps(image_pixels=100, text_length=30))
    assert says in str(caught.value)


def test_a_complaint_of_the_policy_has_the_words_of_the_request() -> None:
    seen = incoming({"observation/image": FRAME, "instruction": "go"}, KEYS, Caps())
    assert str(seen.refused(ObservationError("instruction", "is empty"))) == "instruction: is empty"
    assert (
        str(seen.refused(ObservationError("images", "none of wrist"))) == "observation/image: none of wrist"
    )
    assert str(seen.refused(ObservationError("state", "missing"))) == "state: missing"


def test_a_file_of_keys_is_added_to_the_known_ones(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(
        "observation/exterior_image_1_left: primary\ntask: prompt\ngripper: ignore\nimage: wrist\n"
    )
    keys = obs_keys(Asking(cameras=("primary", "wrist")), file)
    assert keys["observation/exterior_image_1_left"] == "primary"
    assert keys["image"] == "wrist"
    assert keys["prompt"] == "prompt"
    seen = incoming({"task": "go", "gripper": 1}, keys, Caps()).observation
    assert seen.instruction == "go"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cam: primry\n", "keys.yaml:1: cam: 'primry' is unknown; did you mean primary?"),
        (
            "a: prompt\ncam: wrist\n",
            "keys.yaml:2: cam: the checkpoint takes no wrist; it takes primary, prompt",
        ),
        ("a: prompt\nq: state\n", "keys.yaml:2: q: the checkpoint takes no state; it takes primary"),
        ("5: prompt\n", "keys.yaml:1: 5: expected a mapping"),
        ("cam: [primary]\n", "keys.yaml:1: cam: ['primary'] is unknown"),
        ("- primary\n", "keys.yaml: expected a mapping"),
        ("", "keys.yaml: expected a mapping"),
        ("a: [\n", "keys.yaml:2: not valid YAML"),
        ("a: prompt\na: seed\n", "'a' is written twice"),
    ],
)
def test_a_file_of_keys_that_will_not_do_is_a_line_each(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        obs_keys(Asking(), file)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
