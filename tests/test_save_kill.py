"""A process that is killed while it overwrites a model leaves the old one or the new one, whole."""

import hashlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxcomp.graph import Model
from onnxcomp.io import load, save
from onnxcomp.serde import from_proto

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")

VALUES = (1, 2, 3)


def model(value: int) -> onnx.ModelProto:
    """Three weights of 400 kB together, all elements `value`, so that a mixture of two versions shows."""
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 17]> g (float[1] x) => (float[1] y) { y = Relu(x) }'
    )
    for i, elements in enumerate((70_000, 30_000, 300)):
        proto.graph.initializer.append(numpy_helper.from_array(np.full(elements, value, np.float32), f"w{i}"))
    return proto


def digest(path: Path) -> str:
    state = hashlib.sha256()
    for tensor in load(path).graph.initializers:
        state.update(tensor.weight.digest())
    return state.hexdigest()


def overwrite_for_ever(path: Path, models: list[Model], seed: int) -> None:
    generator = random.Random(seed)
    while True:
        save(generator.choice(models), path, overwrite=True, external_data=generator.random() < 0.5)


def kill_again_and_again(folder: Path, kills: int, most: float) -> None:
    path, generator = folder / "m.onnx", random.Random(0)
    models, allowed = [from_proto(model(value)) for value in VALUES], set()
    for one in models:
        save(one, path, overwrite=True)
        allowed.add(digest(path))
    context = multiprocessing.get_context("fork")
    seen, drafts, external = set(), 0, 0
    for seed in range(kills):
        writer = context.Process(target=overwrite_for_ever, args=(path, models, seed))
        writer.start()
        time.sleep(generator.uniform(0.002, most))
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        found = digest(path)
        assert found in allowed, f"after kill {seed} the file is neither old nor new"
        seen.add(found)
        drafts += any(".tmp-" in p.name for p in folder.iterdir())
        external += len(onnx.load(path, load_external_data=False).graph.initializer[0].external_data) > 0
    assert seen == allowed
    assert drafts > kills // 10, "the kills did not hit the writing"
    assert 0 < external < kills
    save(models[0], path, overwrite=True)
    assert [p.name for p in folder.iterdir()] == ["m.onnx"]


def test_200_kills(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, 200, 0.1)


@pytest.mark.slow
def test_2000_kills(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, 2000, 0.2)
