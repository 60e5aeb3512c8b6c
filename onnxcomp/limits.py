"""What a model file may ask for before it is refused."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """What a model may ask for before it is refused. Sizes are in bytes.

    - `proto_bytes`: the model file; protobuf itself can hold no more.
    - `skeleton_bytes`: what is left of it once the payloads are cut out; `structure_bytes`: the same without
      long strings and lists of numbers. Small messages take many times their size in memory.
    - `depth`: messages inside each other, as protobuf itself allows; an If in an If costs three.
    - `fields`: fields that are read one by one, and with them the time.
    - `expanded_nodes`: nodes once every call of a function is replaced by its body.
    - `dense_bytes`: one tensor that constants alone make; `trips`: runs of one loop body.
    - `ir_version`, `opset` (of the domain ""): the newest that onnxruntime 1.31 accepts.
    """

    proto_bytes: int = 2**31 - 1
    skeleton_bytes: int = 2**29
    structure_bytes: int = 2**26
    depth: int = 100
    nodes: int = 1_000_000
    initializers: int = 1_000_000
    functions: int = 100_000
    attributes: int = 10_000_000
    fields: int = 5_000_000
    name_bytes: int = 65_536
    unknown_bytes: int = 2**28
    expanded_nodes: int = 1_000_000
    dense_bytes: int = 2**32
    trips: int = 10_000_000
    ir_version: int = 13
    opset: int = 26
