"""TFRecords without TensorFlow, beside TensorFlow's own reader and writer."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxe_mix.tfrecord import TFRecordError, frame, read_records


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_what_is_framed_is_read_back(payloads: list[bytes]) -> None:
    stream = io.BytesIO(b"".join(map(frame, payloads)))
    assert [record.payload for record in read_records(stream, "x")] == payloads


@given(st.binary(min_size=1, max_size=60), st.data())
def test_every_flipped_bit_is_found(payload: bytes, data: st.DataObject) -> None:
    framed = bytearray(frame(payload))
    bit = data.draw(st.integers(0, 8 * len(framed) - 1))
    framed[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(TFRecordError, match="x: record 0 at byte 0: "):
        list(read_records(io.BytesIO(bytes(framed)), "x"))


@given(st.binary(min_size=1, max_size=60), st.data())
def test_a_file_that_ends_early_is_found_with_record_and_offset(payload: bytes, data: st.DataObject) -> None:
    first, second = frame(b"first"), frame(payload)
    cut = data.draw(st.integers(1, len(second) - 1))
    records = read_records(io.BytesIO(first + second[:cut]), "some/file")
    assert next(records).payload == b"first"
    with pytest.raises(TFRecordError, match=f"some/file: record 1 at byte {len(first)}: "):
        next(records)


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "HTML page"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "gzip"),
    ],
)
def test_what_is_no_tfrecord_is_called_by_its_name(start: bytes, what: str) -> None:
    with pytest.raises(TFRecordError, match=what):
        list(read_records(io.BytesIO(start), "x"))


@pytest.mark.parametrize("length", [0x8B1F, 0x8B1F + 65536, 0x3C])
def test_a_length_that_looks_like_another_file_is_still_a_record(length: int) -> None:
    """The first bytes of a file are its first record's length: these begin like gzip, and like `<`."""
    payload = b"x" * length
    assert next(read_records(io.BytesIO(frame(payload)), "x")).payload == payload


def test_tensorflow_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow", reason="needs the extra tf")
    payloads = [b"", b"one", bytes(range(256)) * 40]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.write_bytes(b"".join(map(frame, payloads)))
    with tf.io.TFRecordWriter(str(theirs)) as writer:
        for payload in payloads:
            writer.write(payload)
    assert [record.numpy() for record in tf.data.TFRecordDataset(str(ours))] == payloads
    assert ours.read_bytes() == theirs.read_bytes()
    with theirs.open("rb") as stream:
        assert [record.payload for record in read_records(stream, "x")] == payloads
