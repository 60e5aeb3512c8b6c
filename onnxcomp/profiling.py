"""What ONNX Runtime made of a model: the kernels that ran, the provider of every node, the graph after optimization."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from onnxcomp.placement import Execution, Kernel, read_profile
from onnxcomp.runtime import open_session

if TYPE_CHECKING:
    import onnx

__all__ = ["executed_kernels", "execution", "optimized_graph"]

Array = npt.NDArray[Any]


def execution(
    model: Any,
    feeds: Mapping[str, Array],
    *,
    provider: str = "cpu",
    threads: int = 1,
    runs: int = 4,
    provider_options: Mapping[str, str] | None = None,
) -> Execution:
    """Profile `runs` runs in a session of its own: the provider of every node, and the kernels that ran.

    One more run comes before; it allocates and packs, and is left out. Errors are those of `open_session`.
    """
    with tempfile.TemporaryDirectory(prefix="onnxcomp-profile-") as folder:
        session = open_session(
            model,
            provider=provider,
            threads=threads,
            profile=os.path.join(folder, "run"),
            config={"session.record_ep_graph_assignment_info": "1"},  # versions that do not know it ignore it
            provider_options=provider_options,
        )
        for _ in range(runs + 1):
            session.run(feeds)
        events = json.loads(Path(session.native.end_profiling()).read_text(encoding="utf-8"))
    return Execution(read_profile(events, runs), _assigned(session.native))


def executed_kernels(
    model: Any, feeds: Mapping[str, Array], *, provider: str = "cpu", threads: int = 1, runs: int = 4
) -> list[Kernel]:
    """The kernels of `execution`, most expensive first."""
    return execution(model, feeds, provider=provider, threads=threads, runs=runs).kernels


def optimized_graph(model: Any) -> onnx.ModelProto:
    """The model as ONNX Runtime optimizes it when it loads it on the CPU, without the values of large tensors.

    Errors are those of `open_session`.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix="onnxcomp-optimized-") as folder:
        path = os.path.join(folder, "model.onnx")
        config = {
            "session.optimized_model_external_initializers_file_name": "model.data",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        }
        open_session(model, config=config, optimized=path)
        return onnx.load(path, load_external_data=False)


def _assigned(native: Any) -> tuple[tuple[str, str, str], ...] | None:
    if not hasattr(native, "get_provider_graph_assignment_info"):
        return None
    return tuple(
        (subgraph.ep_name, node.name, node.op_type)
        for subgraph in native.get_provider_graph_assignment_info()
        for node in subgraph.get_nodes()
    )
