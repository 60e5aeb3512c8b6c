"""The contents of a file as blocks: what is written, what stays a hole, and a digest that several threads find."""

from __future__ import annotations

import functools
import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np

from onnxcomp.weights import Buffer

__all__ = ["BLOCK_BYTES", "Block", "Digest", "blocks"]

BLOCK_BYTES = 1 << 20
_SKETCHED_BYTES = 64
_MOST_THREADS = 4  # more than one disk takes
_AHEAD = 16  # blocks that may wait for their digest: so many are in memory


@dataclass(frozen=True)
class Block:
    """`BLOCK_BYTES` of a file, fewer at its end; `zero` tells that all of them are zero."""

    parts: tuple[Buffer, ...]
    size: int
    zero: bool

    def digest(self) -> bytes:
        """SHA-256 of the bytes."""
        if self.zero:
            return _digest_of_zeros(self.size)
        state = hashlib.sha256()
        for part in self.parts:
            state.update(part)
        return state.digest()


def blocks(chunks: Iterable[Buffer]) -> Iterator[Block]:
    """Cut a stream of chunks of any size into blocks, without copying them."""
    parts: list[Buffer] = []
    size = 0
    for chunk in chunks:
        begin, left = 0, memoryview(chunk)
        while begin < len(chunk):
            part = left[begin : begin + BLOCK_BYTES - size]
            parts.append(part)
            begin, size = begin + len(part), size + len(part)
            if size == BLOCK_BYTES:
                yield _block(parts, size)
                parts, size = [], 0
    if parts:
        yield _block(parts, size)


def _block(parts: list[Buffer], size: int) -> Block:
    return Block(tuple(parts), size, all(map(_is_zero, parts)))


def _is_zero(part: Buffer) -> bool:
    """Whether all bytes are zero; of most parts a few bytes tell that they are not."""
    return not any(part[:_SKETCHED_BYTES]) and not np.frombuffer(part, np.uint8).max(initial=0)


@functools.cache
def _digest_of_zeros(size: int) -> bytes:
    return hashlib.sha256(bytes(size)).digest()


class Digest:
    """SHA-256 over the SHA-256 of each block: threads find those while the blocks are written."""

    def __init__(self) -> None:
        self._state = hashlib.sha256()
        self._waiting: deque[Future[bytes]] = deque()
        self._pool = ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, block: Block) -> None:
        """Take the next block. Waits where too many are in work."""
        if len(self._waiting) >= _AHEAD:
            self._state.update(self._waiting.popleft().result())
        self._waiting.append(self._pool.submit(block.digest))

    def hexdigest(self) -> str:
        """The digest of what was added so far, in hexadecimal."""
        while self._waiting:
            self._state.update(self._waiting.popleft().result())
        return self._state.hexdigest()
