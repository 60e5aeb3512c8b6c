"""The architecture as a rule: which module may import what, and who may print."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    f"{package}.{path.stem}".removesuffix(".__init__"): path
    for package, folder in (
        ("onnxcomp", "onnxcomp"),
        ("onnxcomp.passes", "passes"),
        ("onnxcomp.calibration", "calibration"),
    )
    for path in sorted((ROOT / folder).glob("*.py"))
}
MAPPED = ("onnxcomp.passes", "onnxcomp.calibration")
ABOVE = {
    *("api", "bench", "environment", "inspection", "optimizer"),
    *("options", "report", "verdict", "verification"),
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


@functools.cache
def imports(module: str, *, at_start: bool = False) -> frozenset[str]:
    """Absolute names of the modules that `module` imports; `at_start`: only those that come with its own import."""
    tree = TREES[module]
    late = {id(n) for f in ast.walk(tree) if _is_late(f) for n in ast.walk(f)} if at_start else set()
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in late:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name if name in FILES else node.module for name in names)
    return frozenset(found)


def _is_late(node: ast.AST) -> bool:
    """Functions, and what is there for type checkers only."""
    guard = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    return guard or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def _is_cli(module: str) -> bool:
    return module in ("onnxcomp.cli", "onnxcomp.__main__") or module.startswith("onnxcomp.cli_")


def _importers(package: str) -> set[str]:
    return {m for m in FILES if any(i == package or i.startswith(package + ".") for i in imports(m))}


def test_there_are_modules_to_check():
    assert len(FILES) > 40


def test_only_runtime_imports_onnxruntime():
    assert _importers("onnxruntime") == {"onnxcomp.runtime"}


def test_only_elements_imports_onnx_graphsurgeon():
    assert _importers("onnx_graphsurgeon") == {"onnxcomp.elements"}


def test_only_the_command_line_imports_rich_and_argparse():
    assert all(map(_is_cli, _importers("rich") | _importers("argparse")))


@pytest.mark.parametrize("module", FILES)
def test_only_the_command_line_prints(module):
    calls = {ast.unparse(n.func) for n in ast.walk(TREES[module]) if isinstance(n, ast.Call)}

    assert _is_cli(module) or not calls & {"print", "sys.stdout.write", "sys.stderr.write"}


@pytest.mark.parametrize("module", FILES)
def test_imports_are_absolute_and_by_the_name_of_the_package(module):
    relative = [n for n in ast.walk(TREES[module]) if isinstance(n, ast.ImportFrom) and n.level]

    assert not relative
    assert not {i.partition(".")[0] for i in imports(module)} & {"passes", "calibration", "tests", "models"}


@pytest.mark.parametrize("module", [m for m in FILES if not m.startswith("onnxcomp.passes")])
def test_the_core_knows_no_pass_but_by_name(module):
    assert not [i for i in imports(module) if i.startswith("onnxcomp.passes")]


@pytest.mark.parametrize("module", [m for m in FILES if m.startswith(MAPPED)])
def test_passes_and_calibration_stay_below_what_uses_them(module):
    used = {i.removeprefix("onnxcomp.") for i in imports(module)}

    assert not used & ABOVE
    assert not any(map(_is_cli, imports(module)))


def test_calibration_knows_no_passes_and_the_graph_knows_no_runtime():
    assert not [m for m in FILES if m.startswith("onnxcomp.calibration") and _passes(m)]
    for module in ("graph", "errors", "io", "serde", "wire", "shapes", "weights", "manager", "registry"):
        assert "onnxcomp.runtime" not in imports(f"onnxcomp.{module}"), module


def _passes(module: str) -> list[str]:
    return [i for i in imports(module) if i.startswith("onnxcomp.passes")]


def test_modules_do_not_import_each_other_in_a_circle():
    edges = {m: {i for i in imports(m, at_start=True) if i in FILES and i != m} for m in FILES}
    while free := [m for m, needs in edges.items() if not needs & edges.keys()]:
        for module in free:
            del edges[module]

    assert not edges


def test_errors_import_nothing_of_the_package():
    assert not [i for i in imports("onnxcomp.errors") if i.startswith("onnxcomp")]


def test_the_mapped_folders_are_flat():
    for folder in ("passes", "calibration"):
        nested = [p for p in (ROOT / folder).iterdir() if p.is_dir() and p.name != "__pycache__"]
        assert not nested, folder
