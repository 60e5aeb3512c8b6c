"""The noise floor: how much a model differs from itself when only the way of computing changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import OnnxcompError
from onnxcomp.metrics import Role, Tolerance, measure
from onnxcomp.quality import is_float
from onnxcomp.runtime import Session

if TYPE_CHECKING:
    import onnx

__all__ = ["Noise", "flatten", "measure_noise", "tolerances"]

Array = npt.NDArray[Any]

# Element type of the computation, coarsest first: (share of the output's rms, share of the element). One
# operator keeps float32 to about 1.3e-6; these are for whole networks whose operators were regrouped.
_FLOORS = {
    "bfloat16": (8e-3, 4e-2),
    "float16": (1e-3, 5e-3),
    "tf32": (1e-3, 1e-3),
    "float": (1e-6, 1e-4),
    "double": (1e-12, 1e-9),
}


@dataclass(frozen=True)
class Noise:
    """Differences of a model to itself, per output.

    `absolute` is the largest |a - a'| of float outputs, `share` the largest share of changed elements of the
    others. `random` are the outputs that change between two equal runs by more than the tolerance of their
    type.
    """

    absolute: Mapping[str, float]
    share: Mapping[str, float]
    random: tuple[str, ...] = ()


def measure_noise(
    session: Session,
    variants: Sequence[Callable[[], Session]],
    feeds: Sequence[Mapping[str, Array]],
    floor: Tolerance,
) -> Noise:
    """Run `feeds` twice in `session`, and once in each variant: the same model under other options.

    A variant that does not open or run is left out. Variants are opened one after the other, so that two
    sessions at most are in memory. `floor` is the tolerance of the element type.
    """
    expected = [flatten(session, session.run(feed)) for feed in feeds]
    absolute: dict[str, float] = {}
    share: dict[str, float] = {}
    random: set[str] = set()

    def compare(other: Session, repeated: bool) -> None:
        for feed, before in zip(feeds, expected, strict=True):
            after = flatten(other, other.run_again(feed))
            for name in before.keys() & after.keys():
                a, b = before[name], after[name]
                if a.shape != b.shape:
                    random.update({name} if repeated else ())
                    continue
                role: Role = "values" if is_float(a) else "discrete"
                errors = measure(role, a, b, count=1, tolerance=floor).errors
                table, value = (absolute, errors.max_abs) if role == "values" else (share, 1 - errors.equal)
                table[name] = max(table.get(name, 0.0), value)
                if repeated and (errors.excess > 1 or errors.lost or (role == "discrete" and errors.unequal)):
                    random.add(name)

    compare(session, repeated=True)
    for variant in variants:
        try:
            compare(variant(), repeated=False)
        except OnnxcompError:
            continue
    return Noise(absolute, share, tuple(sorted(random)))


def tolerances(proto: onnx.ModelProto, provider: str) -> Tolerance:
    """The tolerance of the coarsest float type of weights, inputs and outputs; float32 on a GPU is TF32."""
    from onnx import TensorProto

    elements = {tensor.data_type for tensor in proto.graph.initializer}
    elements |= {v.type.tensor_type.elem_type for v in [*proto.graph.input, *proto.graph.output]}
    found = {TensorProto.DataType.Name(e).lower() for e in elements}
    if provider not in ("cpu", "CPUExecutionProvider") and "float" in found:
        found.add("tf32")
    coarsest = next((name for name in _FLOORS if name in found), "float")
    return Tolerance(0.0, *_FLOORS[coarsest])


def flatten(session: Session, outputs: Sequence[Any]) -> dict[str, Array]:
    """Outputs by name as arrays. What is not a tensor is taken apart: a sequence gives NAME[0], NAME[1], ...,
    a map NAME.keys and NAME.values, a sequence of maps with the same keys (scikit-learn's ZipMap) NAME.keys
    and a matrix NAME.values with a row per map; an empty optional gives nothing.
    """
    flat: dict[str, Array] = {}
    for spec, value in zip(session.outputs, outputs, strict=True):
        flat |= _leaves(spec.name, value)
    return flat


def _leaves(name: str, value: Any) -> dict[str, Array]:
    if value is None:
        return {}
    if isinstance(value, dict):
        keys = sorted(value)
        return {f"{name}.keys": np.array(keys), f"{name}.values": np.array([value[k] for k in keys])}
    if isinstance(value, list):
        if value and all(isinstance(v, dict) and v.keys() == value[0].keys() for v in value):
            keys = sorted(value[0])
            return {
                f"{name}.keys": np.array(keys),
                f"{name}.values": np.array([[v[k] for k in keys] for v in value]),
            }
        return {k: leaf for i, item in enumerate(value) for k, leaf in _leaves(f"{name}[{i}]", item).items()}
    return {name: np.asarray(value)}
