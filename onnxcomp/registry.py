"""Names of passes, and where each is. Nothing is imported before it is asked for.

Third parties add passes through the entry-point group `onnxcomp.passes`: the name of the entry point is the name of
the pass, its object a subclass of `onnxcomp.manager.Pass`.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from onnxcomp.errors import UsageError

if TYPE_CHECKING:
    from onnxcomp.manager import Pass

__all__ = ["BUILTIN", "load_pass", "pass_names", "suggest"]

BUILTIN = {
    "cleanup": "onnxcomp.passes.cleanup:Cleanup",
    "fold-constants": "onnxcomp.passes.fold_constants:FoldConstants",
    "fuse": "onnxcomp.passes.fuse:Fuse",
    "dead-channels": "onnxcomp.passes.dead_channels:DeadChannels",
    "equalize": "onnxcomp.passes.equalize:Equalize",
    "prune-channels": "onnxcomp.passes.prune_channels:PruneChannels",
    "prune-weights": "onnxcomp.passes.prune_weights:PruneWeights",
    "factorize": "onnxcomp.passes.factorize:Factorize",
    "quantize": "onnxcomp.passes.quantize:Quantize",
    "convert-fp16": "onnxcomp.passes.convert_fp16:ConvertFp16",
    "share-weights": "onnxcomp.passes.share_weights:ShareWeights",
    "pack": "onnxcomp.passes.pack:Pack",
    "unpack": "onnxcomp.passes.unpack:Unpack",
    "fuse-attention": "onnxcomp.passes.fuse_attention:FuseAttention",
}


@functools.cache
def _plugins() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group="onnxcomp.passes"):
        if point.name in BUILTIN or point.name in found:
            raise UsageError(f"the pass name {point.name!r} is taken twice; uninstall one: {point.value}")
        found[point.name] = point
    return found


def pass_names() -> list[str]:
    """All names, built-in passes first."""
    return [*BUILTIN, *sorted(_plugins())]


def load_pass(name: str) -> type[Pass]:
    """The class of a pass. Raises UsageError for an unknown name or a plug-in that is no pass."""
    from onnxcomp.manager import Pass

    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
        loaded = getattr(import_module(module), attribute)
    elif name in _plugins():
        try:
            loaded = _plugins()[name].load()
        except ImportError as error:
            raise UsageError(f"pass {name!r} is a plug-in that cannot be imported: {error}; remove it") from error
    else:
        raise UsageError(f"unknown pass {name!r}{suggest(name, pass_names())}; `onnxcomp passes` lists them")
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
        raise UsageError(f"the entry point for pass {name!r} gives {loaded!r}, which is no onnxcomp.manager.Pass")
    return loaded


def suggest(word: str, known: Iterable[str]) -> str:
    """" (did you mean 'x'?)" for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
