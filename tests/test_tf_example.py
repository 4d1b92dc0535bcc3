"""Our tf.train.Example beside TFDS's copy of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxe_mix.record_mods import RecordMods
from oxe_mix.tf_example import Example
from tests.conftest import PYTHON, run

floats = st.lists(st.floats(width=32, allow_nan=False), max_size=5)
integers = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5)
column = st.one_of(
    floats.map(lambda values: ("float_list", values)),
    integers.map(lambda values: ("int64_list", values)),
    st.lists(st.binary(max_size=9), max_size=4).map(lambda values: ("bytes_list", values)),
)


@given(st.dictionaries(st.text(max_size=9), column, max_size=6))
def test_it_is_the_same_message(columns: dict[str, tuple[str, list[object]]]) -> None:
    from tensorflow_datasets.core.example_parser import tf_example_pb2

    own, theirs = Example(), tf_example_pb2.Example()
    for made in (own, theirs):
        for name, (kind, values) in columns.items():
            values_of = getattr(made.features.feature[name], kind)
            values_of.SetInParent()
            values_of.value.extend(values)
    payload = theirs.SerializeToString(deterministic=True)
    assert own.SerializeToString(deterministic=True) == payload
    assert Example.FromString(payload) == own


def test_bytes_that_are_none_are_told_as_other_damage_is() -> None:
    with pytest.raises(ValueError, match=r"^not a tf\.train\.Example$"):
        RecordMods("success").apply(b"\xff\xff\xff")


def test_what_runs_in_threads_does_not_import_tfds() -> None:
    """While TFDS is being imported, what other threads import is not found."""
    code = """
import sys
import pipelines.download
from oxe_mix.record_mods import RecordMods
assert RecordMods("success").apply(b'\\n\\r\\n\\x0b\\n\\x07success\\x12\\0') is None
assert "tensorflow_datasets" not in sys.modules
"""
    run(PYTHON, "-c", code)
