"""Every runnable test model of the onnx package keeps its outputs and interface through the lossless pipeline.

Each node case runs as it is, with all inputs but the first as initializers, and with all inputs as initializers: only
then is there something to fold. Results are bit-equal after the exact passes (ONNX Runtime without optimizations), and
within 1e-3 after `fuse`. A failure names the pass and the rewrite that did it. Run with `-rA` or `-s` to see
what was skipped.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.conformance import Case, Skipped, check, explained, frozen, lowered

CHUNKS = 40
DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
# Node cases that neither ONNX Runtime nor the reference evaluator of onnx 1.23 runs.
NOT_RUN: frozenset[str] = frozenset()


@functools.cache
def node_cases():
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        return sorted(collect_testcases(None), key=lambda c: c.name)


def variants(found):
    proto = lowered(found.model)
    case = Case(found.name, proto, dict(zip([i.name for i in proto.graph.input], found.data_sets[0][0], strict=False)))
    return [c for c in (case, frozen(case, 1), frozen(case, 0)) if c is not None]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_node_cases(chunk):
    failures, skipped, compared = [], {}, 0
    for found in node_cases()[chunk::CHUNKS]:
        for case in variants(found):
            try:
                check(case)
                compared += 1
            except Skipped as reason:
                skipped[case.name] = str(reason)
            except Exception as error:
                failures.append(explained(error))
    print(f"compared {compared}, skipped {len(skipped)}: {skipped}")
    assert not failures, f"{len(failures)} of {compared + len(failures)} failed:\n" + "\n".join(failures)
    assert {name.partition("/")[0] for name in skipped} <= NOT_RUN


def test_enough_is_compared():
    count = len(node_cases())
    kinds = Counter(str(next((o.version for o in c.model.opset_import if not o.domain), 0)) for c in node_cases())

    assert count - len(NOT_RUN) > 1500, f"{count} node cases, by opset: {kinds}"


def packaged(kind):
    return sorted(p.name for p in (DATA / kind).iterdir() if p.is_dir())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["simple", "pytorch-converted", "pytorch-operator"])
def test_packaged_models(kind):
    failures, skipped, compared = [], {}, 0
    for name in packaged(kind):
        proto = lowered(onnx.load(DATA / kind / name / "model.onnx"))
        try:
            for folder in sorted((DATA / kind / name).glob("test_data_set_*")):
                check(Case(name, proto, read_inputs(proto, folder)))
                compared += 1
        except Skipped as reason:
            skipped[name] = str(reason)
        except Exception as error:
            failures.append(explained(error))
    print(f"compared {compared}, skipped {len(skipped)}: {skipped}")
    assert not failures, "\n".join(failures)
    assert compared > len(packaged(kind)) / 2


def read_inputs(proto, folder):
    found = {}
    for place, value in enumerate(proto.graph.input):
        path = folder / f"input_{place}.pb"
        if path.exists():
            data = path.read_bytes()
            if value.type.HasField("sequence_type"):
                found[value.name] = numpy_helper.to_list(onnx.SequenceProto.FromString(data))
            else:
                found[value.name] = numpy_helper.to_array(onnx.TensorProto.FromString(data))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", sorted((DATA / "light").glob("*.onnx")), ids=lambda p: p.stem)
def test_light_models(path):
    proto = onnx.load(path)
    value = next(i for i in proto.graph.input if i.name not in {t.name for t in proto.graph.initializer})
    kind = value.type.tensor_type
    shape = [d.dim_value or 1 for d in kind.shape.dim]
    feeds = {value.name: np.random.default_rng(0).random(shape).astype(helper.tensor_dtype_to_np_dtype(kind.elem_type))}

    check(Case(path.stem, proto, feeds))
