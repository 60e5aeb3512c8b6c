"""Blocks hold the bytes of a stream whatever the pieces it came in, and their digest does not depend on these."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp import atomic
from onnxcomp.blocks import BLOCK_BYTES, Digest, blocks

# What a stream is made of: lengths around the size of a block, zeros or not.
PIECES = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 300), st.integers(BLOCK_BYTES - 2, BLOCK_BYTES + 2), st.just(2 * BLOCK_BYTES + 1)),
        st.booleans(),
    ),
    max_size=5,
)


def stream(pieces: list[tuple[int, bool]]) -> Iterator[bytes]:
    yield from (bytes(size) if zero else b"\0" * (size // 2) + b"x" * (size - size // 2) for size, zero in pieces)


def by_hand(data: bytes) -> str:
    inner = (hashlib.sha256(data[i : i + BLOCK_BYTES]).digest() for i in range(0, len(data), BLOCK_BYTES))
    return hashlib.sha256(b"".join(inner)).hexdigest()


@settings(max_examples=60, deadline=None)
@given(PIECES)
def test_a_file_has_the_bytes_of_its_stream_and_the_digest_of_its_bytes(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[int, bool]]
) -> None:
    path, data = tmp_path_factory.mktemp("b") / "f", b"".join(stream(pieces))
    with Digest() as digest:
        assert atomic.write(path, stream(pieces), digest.add) == len(data)
        assert digest.hexdigest() == by_hand(data)
    assert path.read_bytes() == data


def test_blocks_are_full_but_the_last_and_know_whether_they_are_zero() -> None:
    whole = BLOCK_BYTES // 2
    found = list(blocks([bytes(whole), bytes(whole), b"x" * whole, bytes(whole - 1), b"y", b"", bytes(3)]))
    assert [(b.size, b.zero) for b in found] == [(BLOCK_BYTES, True), (BLOCK_BYTES, False), (3, True)]
    assert list(blocks([])) == list(blocks([b""])) == []


@pytest.mark.skipif(not hasattr(os.stat_result, "st_blocks"), reason="the system does not say what a file occupies")
def test_zeros_take_no_space(tmp_path: Path) -> None:
    (tmp_path / "hole").touch()
    os.truncate(tmp_path / "hole", 1 << 24)
    if (tmp_path / "hole").stat().st_blocks:
        pytest.skip("the file system knows no holes")
    atomic.write(tmp_path / "f", (bytes(1 << 20) for _ in range(16)))
    assert (tmp_path / "f").stat().st_size == 1 << 24
    assert (tmp_path / "f").stat().st_blocks == 0
