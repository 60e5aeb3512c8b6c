from __future__ import annotations

import io
from types import SimpleNamespace

from rich.console import Console

from onnxcomp.cli_trust import show_layers


def test_the_names_of_layers_are_whole_in_a_file():
    error = SimpleNamespace(sqnr_db=40.0)
    name = "/encoder/layer.11/attention/self/LayerNormalization"
    layer = SimpleNamespace(node=name, op="LayerNormalization", relation="quantized", local=error, total=error)
    layer.amplification = 1.0
    console = Console(file=io.StringIO(), width=60)

    show_layers(console, [layer])  # type: ignore[list-item]

    assert name in console.file.getvalue()
