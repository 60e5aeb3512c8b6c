"""What gets installed, and what can be imported from where."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import onnxcomp
from onnxcomp.errors import UsageError
from onnxcomp.registry import load_pass, pass_names

ROOT = Path(__file__).resolve().parent.parent
INFO = f"onnxcomp-{onnxcomp.__version__}.dist-info"
FOLDERS = {"onnxcomp": "onnxcomp", "passes": "onnxcomp/passes", "calibration": "onnxcomp/calibration"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the wheel, built from a copy so that the checkout gets no build folder."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, symlinks=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(target), str(source)]
    if _has_setuptools():
        command.append("--no-build-isolation")
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    (built,) = target.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def _has_setuptools() -> bool:
    try:
        return int(importlib.metadata.version("setuptools").partition(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


def test_the_wheel_brings_one_package_and_its_metadata(wheel):
    assert {name.partition("/")[0] for name in wheel} == {"onnxcomp", INFO}


def test_the_wheel_holds_every_module_once_and_the_data_files(wheel):
    folders = FOLDERS.items()
    modules = {f"{place}/{path.name}" for folder, place in folders for path in (ROOT / folder).glob("*.py")}

    assert {name for name in wheel if name.startswith("onnxcomp/")} == modules | {
        "onnxcomp/py.typed",
        "onnxcomp/bench.schema.json",
        *(f"onnxcomp/report.{kind}" for kind in ("css", "html.j2", "js", "schema.json")),
    }


def test_the_wheel_brings_the_command(wheel):
    assert f"{INFO}/entry_points.txt" in wheel


def test_subpackages_come_from_the_root_of_the_checkout():
    code = "import onnxcomp.passes, onnxcomp.calibration; print(onnxcomp.passes.__name__)"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout == "onnxcomp.passes\n"


def test_nothing_else_becomes_importable_with_the_package(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(_links(tmp_path))!r}); import onnxcomp.passes.cleanup\n"
        "import importlib.util as u\n"
        "print([n for n in ('passes', 'calibration', 'models', 'tests') if u.find_spec(n)])"
    )

    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def _links(folder: Path) -> Path:
    """A folder like site-packages, with nothing but the package."""
    site = folder / "site"
    site.mkdir()
    (site / "onnxcomp").symlink_to(ROOT / "onnxcomp")
    return site


@pytest.mark.parametrize("folder", ["passes", "calibration"])
def test_a_mapped_folder_refuses_to_be_a_package_of_its_own(folder):
    spec = importlib.util.spec_from_file_location(folder, ROOT / folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None

    with pytest.raises(ImportError, match=f"import onnxcomp.{folder}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_every_public_name_is_there_and_stays_what_it_is():
    first = {name: getattr(onnxcomp, name) for name in onnxcomp.__all__}
    for module in (ROOT / "onnxcomp").glob("[a-z]*.py"):
        importlib.import_module(f"onnxcomp.{module.stem}")

    assert sorted(onnxcomp.__all__) == list(onnxcomp.__all__)
    assert all(map(callable, first.values()))
    assert {name: getattr(onnxcomp, name) for name in onnxcomp.__all__} == first


@pytest.mark.parametrize("name", sorted({p.stem for p in (ROOT / "onnxcomp").glob("[a-z]*.py")}))
def test_what_a_module_promises_is_there(name):
    module = importlib.import_module(f"onnxcomp.{name}")

    assert all(hasattr(module, promised) for promised in getattr(module, "__all__", ()))


def test_the_readme_has_the_commands_that_ci_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    fenced = dict(re.findall(r"<!-- (\w+-command) -->\n```sh\n(.+)\n```\n", text))

    assert fenced.keys() == {"main-command", "test-command"}
    assert "-m pytest" in fenced["test-command"]
    files = re.findall(r"models/\S+", fenced["main-command"])
    assert files
    assert all((ROOT / name).exists() for name in files)


PLUGIN = '''
"""A pass of somebody else."""
from dataclasses import dataclass
from typing import ClassVar
from onnxcomp.manager import Pass

@dataclass(frozen=True)
class Nothing(Pass):
    """Does nothing, `times` over."""
    name: ClassVar[str] = "nothing"
    effect: ClassVar[str] = "exact"
    times: int
    where: str | None = None

    def run(self, model, ctx):
        ctx.refuse("everywhere", "it is the purpose of this pass")
        return {"times": self.times}
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A package on the path whose metadata name a pass, and something that is none."""
    from onnxcomp import registry

    (tmp_path / "nothing_pass.py").write_text(PLUGIN)
    info = tmp_path / "nothing_pass-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nothing-pass\nVersion: 1.0\n")
    points = "[onnxcomp.passes]\nnothing = nothing_pass:Nothing\nbroken = nothing_pass:dataclass\n"
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    registry._plugins.cache_clear()
    yield
    registry._plugins.cache_clear()


def test_a_pass_of_another_package_runs_by_its_name(plugin, cli, workshop):
    ran = cli("optimize", "model.onnx", "--passes", "cleanup,nothing:times=3", "--bench-seconds", "0", "-q")

    assert ran.code == 0
    assert "times 3" in ran.out
    assert "1 left alone: it is the purpose of this pass" in ran.out


def test_passes_of_other_packages_are_listed_after_our_own(plugin, cli):
    assert pass_names()[0] == "cleanup"
    found = json.loads(cli("passes", "nothing", "--json", "-").out)
    assert found["summary"] == "Does nothing, `times` over."
    assert found["options"] == [
        {"name": "times", "type": "int", "default": "required"},
        {"name": "where", "type": "str or none", "default": None},
    ]


def test_an_entry_point_that_is_no_pass_is_named(plugin):
    with pytest.raises(UsageError, match=r"'broken' gives .* which is no onnxcomp.manager.Pass"):
        load_pass("broken")


def test_one_broken_plug_in_does_not_hide_the_list_of_passes(plugin, cli):
    ran = cli("passes")

    assert ran.code == 0
    assert "quantize" in ran.out
    assert "broken" in ran.out
