"""Every malformed, hostile or odd model is refused with a ModelError or accepted, soon and in little memory."""

import importlib.util
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxcomp.errors import ModelError
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
    begin = time.perf_counter()
    if case.error is None:
        notes = check(read_skeleton(path).proto, path.parent, path, allow_symlinks=case.allow_symlinks)
        assert case.note is None or any(re.search(case.note, note) for note in notes), notes
        assert bool(notes) == (case.note is not None), notes
    else:
        with pytest.raises(ModelError, match=case.error):
            check(read_skeleton(path).proto, path.parent, path, allow_symlinks=case.allow_symlinks)
    assert time.perf_counter() - begin < 2
