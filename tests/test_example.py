"""The columns of an Example found in its bytes, beside protobuf's own parser."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxe_mix.example import byte_values, find_features, float_values, integer_values, num_values

NAMES = st.text(max_size=12)
VALUES = st.one_of(
    st.tuples(st.just("bytes_list"), st.lists(st.binary(max_size=300), max_size=5)),
    st.tuples(st.just("int64_list"), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5)),
    st.tuples(st.just("float_list"), st.lists(st.floats(width=32, allow_nan=False), max_size=5)),
)


def _example(features: dict[str, tuple[str, list[Any]]]) -> Any:
    from tensorflow_datasets.core.example_parser import tf_example_pb2

    example = tf_example_pb2.Example()
    for name, (kind, values) in features.items():
        getattr(example.features.feature[name], kind).value.extend(values)
        getattr(example.features.feature[name], kind).SetInParent()
    return example


@given(st.dictionaries(NAMES, VALUES, max_size=6))
def test_every_column_is_what_protobuf_reads(features: dict[str, tuple[str, list[Any]]]) -> None:
    payload = _example(features).SerializeToString()
    found = find_features(payload)
    assert set(found) == set(features)
    for name, (kind, values) in features.items():
        if kind == "bytes_list":
            assert list(map(bytes, byte_values(found[name]))) == values
        else:
            assert byte_values(found[name]) == []
            floats, whole = float_values(found[name]).tolist(), integer_values(found[name]).tolist()
            assert (floats, whole) == ((values, []) if kind == "float_list" else ([], values))
        assert num_values(found[name]) == len(values)


@given(st.dictionaries(NAMES, VALUES, min_size=1, max_size=4), st.data())
def test_an_example_cut_anywhere_is_refused_or_holds_less(
    features: dict[str, tuple[str, list[Any]]], data: st.DataObject
) -> None:
    """The outer length covers everything, so a cut is seen at once, unless nothing is left."""
    payload = _example(features).SerializeToString()
    cut = data.draw(st.integers(0, len(payload) - 1))
    if cut == 0:
        assert find_features(b"") == {}
        return
    with pytest.raises(ValueError, match=r"not a tf\.train\.Example"):
        find_features(payload[:cut])


@given(st.binary(max_size=200))
def test_bytes_that_are_no_example_never_do_worse_than_a_refusal(payload: bytes) -> None:
    try:
        for feature in find_features(payload).values():
            num_values(feature)
    except ValueError:
        pass


def test_of_a_name_that_comes_twice_the_last_one_counts() -> None:
    first, second = _example({"a": ("bytes_list", [b"x"])}), _example({"a": ("bytes_list", [b"y"])})
    payload = first.SerializeToString() + second.SerializeToString()
    from tensorflow_datasets.core.example_parser import tf_example_pb2

    assert list(map(bytes, byte_values(find_features(payload)["a"]))) == [b"y"]
    assert tf_example_pb2.Example.FromString(payload).features.feature["a"].bytes_list.value[:] == [b"y"]


def test_fields_that_nobody_knows_are_passed_over() -> None:
    """A later version may add some, of any wire type."""
    known = _example({"a": ("int64_list", [7])}).SerializeToString()
    strangers = b"\x28\x96\x01" + b"\x31" + bytes(8) + b"\x3d" + bytes(4) + b"\x42\x03abc"
    assert set(find_features(strangers + known + strangers)) == {"a"}
    with pytest.raises(ValueError, match="wire type 7"):
        find_features(b"\x0f")
    with pytest.raises(ValueError, match="a number without an end"):
        find_features(b"\xff" * 12)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5), st.lists(st.floats(width=32), max_size=5))
def test_numbers_in_fields_of_their_own_are_read_as_packed_ones_are(
    whole: list[int], real: list[float]
) -> None:
    """As writers of proto2 and some other languages do it."""
    from google.protobuf.internal.encoder import _VarintBytes  # type: ignore[attr-defined]

    def message(number: int, content: bytes) -> bytes:
        return b"".join((bytes([number << 3 | 2]), bytes(_VarintBytes(len(content))), content))

    each = b"".join(b"\x08" + _VarintBytes(n % 2**64) for n in whole)
    assert integer_values(memoryview(message(3, each))).tolist() == whole
    each = b"".join(b"\x0d" + struct.pack("<f", x) for x in real)
    assert np.array_equal(
        float_values(memoryview(message(2, each))), np.array(real, np.float32), equal_nan=True
    )
    with pytest.raises(ValueError, match="ends inside one"):
        float_values(memoryview(message(2, b"\x0a\x03abc")))
    with pytest.raises(ValueError, match="a number without an end"):
        integer_values(memoryview(message(3, b"\x0a\x02\xff\xff")))
