"""Each malformed, hostile or odd model is refused with a ModelError or accepted, soon, in little memory."""

import importlib.util
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import onnx
import pytest

from onnxcomp.errors import ModelError
from onnxcomp.external import Storage
from onnxcomp.files import OpenFile
from onnxcomp.safety import check, custom_operators
from onnxcomp.wire import Limits, read_skeleton


def _load_cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("malformed", Path(__file__).with_name("malformed.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["malformed"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


malformed = _load_cases()


def scan(path: Path, *, allow_symlinks: bool = False) -> list[str]:
    """What is unusual about a model file."""
    file = OpenFile(path, "model")
    return check(read_skeleton(file).proto, Storage(file, allow_symlinks=allow_symlinks))


pytestmark = pytest.mark.skipif(os.name != "posix", reason="the cases need links, pipes and devices")


@pytest.fixture
def one_gibibyte() -> Iterator[None]:
    """Nothing may ask for more than a gibibyte of address space beyond what the test process has."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", sorted(malformed.CASES))
def test_case(name: str, tmp_path: Path, one_gibibyte: None) -> None:
    case = malformed.CASES[name]
    path = case.build(tmp_path)
    begin = time.process_time()
    if case.error is None:
        notes = scan(path, allow_symlinks=case.allow_symlinks)
        assert case.note is None or any(re.search(case.note, note) for note in notes), notes
        assert bool(notes) == (case.note is not None), notes
    else:
        with pytest.raises(ModelError, match=case.error):
            scan(path, allow_symlinks=case.allow_symlinks)
    assert time.process_time() - begin < 2


def _mutations(seed: int) -> Iterator[bytes]:
    """Cut off, with flipped bits, and with bytes copied over others."""
    generator = random.Random(seed)
    for good in (malformed.good().SerializeToString(), malformed.nested(3)):
        for _ in range(25):
            yield good[: generator.randrange(len(good))]
            flipped = bytearray(good)
            for _ in range(generator.choice((1, 3))):
                flipped[generator.randrange(len(good))] ^= 1 << generator.randrange(8)
            yield bytes(flipped)
            start, other = generator.randrange(len(good)), generator.randrange(len(good))
            yield good[:start] + good[other : other + 20] + good[start + 20 :]


def test_damaged_files_are_refused_or_accepted_but_never_fail_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    refused = 0
    for content in _mutations(0):
        path.write_bytes(content)
        begin = time.process_time()
        try:
            custom_operators(read_skeleton(path).proto)
            scan(path)
        except ModelError:
            refused += 1
        assert time.process_time() - begin < 1
    assert refused > 75


def test_the_zoo_is_accepted_without_custom_operators() -> None:
    models = sorted(Path("/work/shared/zoo/models").glob("*.onnx"))
    if not models:
        pytest.skip("the zoo is not here")
    for path in models:
        proto = read_skeleton(path).proto
        assert scan(path) == []
        assert custom_operators(proto) == []


def test_custom_operators_are_those_that_nobody_defines() -> None:
    model = malformed.parse(
        """g (float[1] x, bool c) => (float[1] y) {
            a = Affine (x)
            b = com.microsoft.Gelu (a)
            d = f.F (b)
            e = ai.onnx.ml.Normalizer (d)
            y = If (c) <then_branch = t () => (float[1] u) { u = com.acme.Inner (e) },
                        else_branch = s () => (float[1] v) { v = Unheard (e) }>
        }""",
        'ir_version: 10, opset_import: ["" : 9, "f" : 1, "com.acme" : 1]',
    )
    model.functions.add(name="F", domain="f").node.add(op_type="Outer", domain="com.acme")
    assert custom_operators(model) == [("", "Unheard"), ("com.acme", "Inner"), ("com.acme", "Outer")]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(nodes=1), "more than 1 nodes"),
        (Limits(attributes=1), "1 attributes"),
        (Limits(name_bytes=3), "longer than 3"),
        (Limits(expanded_nodes=2), "functions expanded the model has more than 2 nodes"),
        (Limits(opset=13), "opset 17; 1 to 13"),
        (Limits(ir_version=9), "IR version 10"),
    ],
)
def test_limits_are_kept(limits: Limits, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check(malformed.good(), None, limits)


def test_a_model_deeper_than_any_file_does_not_exhaust_the_stack() -> None:
    model = malformed.parse(malformed.RELU)
    graph = model.graph
    for level in range(200):
        graph.node.add(op_type="If", output=[f"o{level}"]).attribute.add(
            name="then_branch", type=onnx.AttributeProto.GRAPH
        )
        graph = graph.node[-1].attribute[0].g
        graph.output.add(name="x")
    with pytest.raises(ModelError, match="nested too deep"):
        check(model, None)
