"""The versions that decoders need, and the way back: IR version and opset of a model before it was packed.

What has to be known for that is noted in the model's metadata. Where nodes had to be rewritten for the newer opset,
that is the old structure, compressed. It is used only if raising it again gives the very structure that is there: then
nobody changed the model since, and the old structure means the same as what is there.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import onnx

from onnxcomp.errors import ModelError, OnnxcompError
from onnxcomp.graph import Model
from onnxcomp.opset import upgrade
from onnxcomp.serde import export_model, import_model
from onnxcomp.storage import DOMAIN, OPSET

__all__ = ["LOWEST_IR", "drop_original", "raise_versions", "restore_versions"]

LOWEST_IR = 8  # the first with local functions
_STANDARD = ("", "ai.onnx")
_LARGEST = 1 << 26  # bytes of a structure


def raise_versions(model: Model) -> list[str]:
    """Raise IR version and opset to what decoders need, and note in the metadata how to go back.

    Returns remarks. Raises ModelError if the model cannot be raised.
    """
    ir, opset, notes = model.header.ir_version, model.opset, []
    inputs = list(model.graph.listed["input"]) if ir < 4 else []
    record: dict[str, Any] = {}
    if opset < OPSET:
        original = export_model(model)
        rewritten = upgrade(model, OPSET)
        notes = [f"the decoders need opset {OPSET}, the model had {opset}", *rewritten]
        if rewritten:
            held = {id(weight): place for place, weight in enumerate(export_model(model)[1])}
            places = [held.get(id(weight), -1) for weight in original[1]]
            text = base64.b85encode(zlib.compress(_bytes(original[0]), 9)).decode()
            record["original"] = [text, places]
        else:
            record["opset"] = [opset, OPSET]
    model.header.ir_version = max(model.header.ir_version, LOWEST_IR)
    if ir != model.header.ir_version:
        record["ir"] = [ir, model.header.ir_version]
    if inputs and "original" not in record:
        record["inputs"] = 1 if inputs == _all_inputs(model) else inputs
    if record:
        _write(model, record)
    return notes


def drop_original(model: Model, budget: int) -> list[str]:
    """Forget the structure before the upgrade if it takes more bytes than `budget`, or not all tensors survived."""
    record = _record(model)
    if "original" not in record:
        return []
    text, places = record["original"]
    if len(text) <= budget and min(places, default=0) >= 0:
        return []
    _take(model)
    return [f"unpacked, the model will be one of opset {OPSET}: the nodes before the upgrade are not kept"]


def restore_versions(model: Model) -> None:
    """Take the domain out of an unpacked model, and go back to the versions that it had, unless it was changed since.

    Raises ModelError if somebody damaged the note.
    """
    record = _record(model)
    _take(model)
    model.functions = [f for f in model.functions if f.header.domain != DOMAIN]
    headers: list[Any] = [model.header, *(f.header for f in model.functions)]
    for header in headers:
        _replace(header.opset_import, [o for o in header.opset_import if o.domain != DOMAIN])
    if "original" in record:
        original = _original(model, *record["original"])
        if original is not None:
            model.become(original)
        return
    before, after = record.get("opset", [0, 0])
    for entry in (entry for header in headers for entry in header.opset_import):
        if entry.domain in _STANDARD and entry.version == after:
            entry.version = before
    before, after = record.get("ir", [0, 0])
    if model.header.ir_version == after and model.opset == record.get("opset", [model.opset])[0]:
        model.header.ir_version = before
        names = record.get("inputs")
        listed = _all_inputs(model) if names == 1 else names or []
        model.graph.listed["input"] = {str(name): place for place, name in enumerate(listed)}


def _original(model: Model, text: str, places: list[int]) -> Model | None:
    """The model before the upgrade, with the tensors of `model`; None unless the upgrade of it gives `model`."""
    proto, payloads = export_model(model)
    try:
        stream = zlib.decompressobj()
        structure = onnx.ModelProto.FromString(stream.decompress(base64.b85decode(text), _LARGEST))
        if not stream.eof:
            raise ValueError("the structure is cut off")
        weights = [payloads[place] for place in places]
        raised = import_model(_copy(structure), weights)
        upgrade(raised, OPSET)
        raised.header.ir_version = max(raised.header.ir_version, LOWEST_IR)
        same = _bytes(export_model(raised)[0]) == _bytes(proto)
        return import_model(structure, weights) if same else None
    except (ValueError, IndexError, zlib.error, OnnxcompError) as error:
        raise ModelError(f"the metadata entry {DOMAIN!r} is damaged: {error}; remove it to unpack the model") from error


def _all_inputs(model: Model) -> list[str]:
    """The inputs as files of IR version 3 usually list them: initializers behind the true inputs."""
    return [t.name for t in model.graph.inputs] + [i.name for i in model.graph.initializers]


# --- the note --------------------------------------------------------------------------------------------------


def _write(model: Model, record: dict[str, Any]) -> None:
    model.header.metadata_props.add(key=DOMAIN, value=json.dumps(record, separators=(",", ":")))


def _take(model: Model) -> None:
    _replace(model.header.metadata_props, [p for p in model.header.metadata_props if p.key != DOMAIN])


def _record(model: Model) -> dict[str, Any]:
    """What `raise_versions` noted. Raises ModelError if somebody else changed it."""
    note = next((p.value for p in model.header.metadata_props if p.key == DOMAIN), "{}")
    try:
        record = json.loads(note)
        pairs = [record.get("opset", [1, 1]), record.get("ir", [3, 3])]
        text, places = record.get("original", ["", []])
        sound = all(len(p) == 2 and all(isinstance(v, int) and 0 < v < 1000 for v in p) for p in pairs)
        sound = sound and isinstance(text, str) and all(isinstance(p, int) for p in places)
        if sound and (record.get("inputs", 1) == 1 or isinstance(record["inputs"], list)):
            return dict(record)
    except (ValueError, TypeError, AttributeError):
        pass
    raise ModelError(f"the metadata entry {DOMAIN!r} is damaged: {note[:80]!r}; remove it to unpack the model")


def _bytes(proto: onnx.ModelProto) -> bytes:
    return bytes(proto.SerializeToString(deterministic=True))


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def _replace(field: Any, messages: list[Any]) -> None:
    copies = [type(m).FromString(m.SerializeToString()) for m in messages]
    del field[:]
    field.extend(copies)
