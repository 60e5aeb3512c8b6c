"""What a model file may ask for before it is refused."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """What a model may ask for before it is rejected. All sizes in bytes.

    `proto_bytes` is protobuf's own limit. `skeleton_bytes` bounds what is left once the payloads are cut out.
    `depth` counts nested messages and is protobuf's own limit too: an If in an If costs three of them.
    `fields` bounds the fields read one by one, and with them the time.
    `ir_version` and `opset` (of the domain "") are the newest that onnxruntime 1.31 accepts.
    """

    proto_bytes: int = 2**31 - 1
    skeleton_bytes: int = 2**30
    depth: int = 100
    nodes: int = 1_000_000
    initializers: int = 1_000_000
    functions: int = 100_000
    attributes: int = 10_000_000
    fields: int = 20_000_000
    name_bytes: int = 65_536
    unknown_bytes: int = 2**28
    expanded_nodes: int = 1_000_000
    dense_bytes: int = 2**32
    trips: int = 10_000_000
    ir_version: int = 13
    opset: int = 26
