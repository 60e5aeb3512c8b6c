"""The command line: what is printed where, exit codes, and that it says what the numbers say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcomp.cli_commands import COMMANDS
from onnxcomp.options import Options
from onnxcomp.wording import count, number, size

OPTIMIZE = ("optimize", "model.onnx", "--calib", "data.npz", "--bench-seconds", "0", "-q")


def test_help_names_all_commands_and_the_exit_codes(capsys):
    from onnxcomp.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["--help"])

    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"\n    {name}" in out for name in COMMANDS)
    assert "130 interrupted" in out


def test_help_imports_nothing_heavy_and_is_fast(root):
    code = (
        "import sys; from onnxcomp.cli import main\n"
        "try: main(['optimize', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'rich', 'PIL'}.intersection(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    seconds = time.perf_counter() - begin

    assert done.stderr == "[]\n"
    assert seconds < 5  # 0.1 s on an idle machine; tests run beside others


def test_optimize_writes_a_verified_model_and_the_numbers_it_prints(cli, workshop, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")

    ran = cli(*OPTIMIZE, "--json", "report.json", "-o", "out.onnx")

    report = json.loads((workshop / "report.json").read_text())
    assert (ran.code, ran.err) == (0, "")
    assert report["optimized"]["file_bytes"] == (workshop / "out.onnx").stat().st_size
    for key in ("original", "optimized"):
        assert size(report[key]["file_bytes"]) in ran.out
        assert count(report[key]["nodes"]) in ran.out
    assert f"verdict: {report['verification']['verdict']}" in ran.out
    assert f"{100 * report['verification']['drop']:.2f} points" in ran.out
    assert all(p["name"] in ran.out for p in report["passes"])
    assert "wrote out.onnx" in ran.out


def test_optimize_writes_beside_the_model_and_leaves_the_input_alone(cli, workshop):
    before = (workshop / "model.onnx").read_bytes()

    assert cli(*OPTIMIZE).code == 0

    assert (workshop / "model.onnx").read_bytes() == before
    onnx.checker.check_model(workshop / "model.opt.onnx")


def test_json_to_standard_output_is_all_that_is_there(cli, workshop):
    ran = cli(*OPTIMIZE[:-1], "--json", "-")

    assert json.loads(ran.out)["schema_version"] == 1
    assert "quantize" in ran.err


def test_a_target_that_is_not_met_gives_5_and_the_best_model(cli, workshop):
    ran = cli(*OPTIMIZE, "--size", "50x")

    assert ran.code == 5
    assert ran.err.startswith("error: --size 50x was asked for, ")
    assert (workshop / "model.opt.onnx").exists()


def test_without_data_the_result_says_which_flag_unlocks_int8(cli, workshop):
    ran = cli("optimize", "model.onnx", "--bench-seconds", "0", "-q")

    assert ran.code == 0
    assert "verdict: unverified on real data" in ran.out
    assert "--calib DATA unlocks it" in ran.out


def test_a_recipe_gives_options_and_the_command_line_wins(cli, workshop):
    (workshop / "recipe.toml").write_text('passes = "cleanup"\nseed = 3\nbench-seconds = 0\n')

    ran = cli("optimize", "model.onnx", "--recipe", "recipe.toml", "--seed", "4", "--json", "-", "-q")

    options = json.loads(ran.out)["options"]
    assert (options["passes"], options["seed"]) == ("cleanup", 4)


@pytest.mark.parametrize(
    ("text", "size_in_bytes"),
    [("2GB", 2_000_000_000), ("512MiB", 512 << 20), ("1.5k", 1500), ("64", 64), (64, 64)],
)
def test_memory_is_given_in_any_unit(text, size_in_bytes):
    assert Options.make(memory=text).memory == size_in_bytes


def test_the_output_can_be_named_in_a_recipe(cli, workshop):
    (workshop / "recipe.toml").write_text('passes = ["cleanup", { name = "fuse" }]\noutput = "mine.onnx"\n')

    assert cli("optimize", "model.onnx", "--recipe", "recipe.toml", "--bench-seconds", "0", "-q").code == 0

    assert (workshop / "mine.onnx").exists()


def test_verify_passes_equal_models(cli, workshop):
    ran = cli("verify", "model.onnx", "model.onnx", "--data", "data.npz", "-q")

    assert ran.code == 0
    assert "verdict: within budget, 40 samples of data.npz" in ran.out


def test_a_changed_integer_output_is_told_in_elements(cli, workshop):
    for name, constant in (("a.onnx", 1), ("b.onnx", 2)):
        text = f"""<ir_version: 8, opset_import: ["" : 17]>
            g (float[batch, 4] x) => (int64[batch, 4] y) <float one = {{{constant}.0}}> {{
                scaled = Mul (x, one)
                y = Cast <to = 7> (scaled)
            }}"""
        onnx.save(onnx.parser.parse_model(text), workshop / name)
    np.savez("x.npz", x=np.ones((10, 4), np.float32))

    ran = cli("verify", "a.onnx", "b.onnx", "--data", "x.npz", "-q")

    assert ran.code == 4
    assert "changes of output y: 100.000 % of the elements" in ran.out
    assert "40 differ" in ran.out


def _other_model(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    weight = next(t for t in model.graph.initializer if t.name == "weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), "weight"))
    onnx.save(model, folder / "other.onnx")


def test_verify_fails_another_model_with_4_and_a_reason(cli, workshop):
    _other_model(workshop)

    ran = cli("verify", "model.onnx", "other.onnx", "--data", "data.npz", "-q")

    assert ran.code == 4
    assert "verdict: failed" in ran.out
    assert ran.err.startswith("error: quality (agreement)")


def test_verify_on_too_few_samples_gives_7(cli, workshop):
    ran = cli("verify", "model.onnx", "model.onnx", "--data", "data.npz", "--samples", "3", "-q")

    assert ran.code == 7
    assert "too few" in ran.err


def test_verify_json_holds_the_verdict_also_when_it_fails(cli, workshop):
    _other_model(workshop)

    ran = cli("verify", "model.onnx", "other.onnx", "--data", "data.npz", "--json", "-", "-q")

    assert ran.code == 4
    assert json.loads(ran.out)["verdict"] == "failed"


def test_bench_prints_one_table_over_all_settings_with_the_numbers_of_the_json(cli, workshop):
    words = ("--seconds", "0.2", "--batch", "1,4", "--threads", "1", "-q", "--json", "bench.json")
    ran = cli("bench", "model.onnx", "model.onnx", *words)

    found = json.loads((workshop / "bench.json").read_text())
    header, *rows = ran.out.split("\n\n")[0].splitlines()
    assert ran.code == 0
    assert header.split()[:2] == ["model", "batch"]
    assert len(rows) == len(found["models"]) == 4
    for row, model in zip(rows, found["models"], strict=True):
        assert model["path"] in row
        assert number(model["ms"]["p50"]) in row
        assert number(model["load_ms"]) in row
        assert size(model["file_bytes"]) in row
        assert model["verdict"] in row
    for setting in found["settings"]:
        assert f"{setting['control']:.3f}x" in ran.out


def test_inspect_prints_what_json_holds(cli, workshop):
    shown, data = cli("inspect", "model.onnx", "--nodes", "-q"), cli("inspect", "model.onnx", "--json", "-q")

    found = json.loads(data.out)
    assert found["parameters"] == 36 + 12 + 3
    assert "batch x 1 x 8 x 8" in shown.out
    assert all(name in shown.out for name in found["operators"])


def test_inspect_escapes_what_a_model_wants_to_do_to_the_terminal(cli, workshop):
    model = onnx.load("model.onnx")
    model.graph.node[0].name = "evil\x1b[2J\r\n[red]"
    model.producer_name = "\x07bell"
    onnx.save(model, "evil.onnx")

    out = cli("inspect", "evil.onnx", "--nodes", "-q").out

    assert "\x1b" not in out
    assert "\x07" not in out
    assert "\\x07bell" in out


def test_passes_lists_all_with_their_effects(cli):
    out = cli("passes").out

    assert all(name in out for name in ("cleanup", "fold-constants", "fuse", "quantize", "exact", "lossy"))


def test_passes_explains_one_with_options_and_defaults(cli):
    shown, data = cli("passes", "quantize"), cli("passes", "quantize", "--json")

    found = json.loads(data.out)
    assert found["needs_data"]
    for option in found["options"]:
        assert option["name"] in shown.out
    assert {"name": "skip", "type": "list of str, as a+b", "default": []} in found["options"]


def test_doctor_says_which_providers_work(cli):
    ran = cli("doctor", "--json", "-q")

    cpu = json.loads(ran.out)["providers"][0]
    assert (cpu["name"], cpu["works"]) == ("CPUExecutionProvider", True)


def test_the_python_function_makes_the_same_file(cli, workshop):
    import onnxcomp

    ran = cli(*OPTIMIZE, "--json", "-", "-o", "a.onnx")
    report = onnxcomp.optimize("model.onnx", "b.onnx", calib="data.npz", bench_seconds=0)

    assert report.optimized["sha256"] == json.loads(ran.out)["optimized"]["sha256"]


@pytest.mark.parametrize(
    ("end", "printed"),
    [("| true", "reading\n"), ("2>&1 | true", ""), (">&-", "reading\n"), ("2>&-", None)],
    ids=["output", "both", "closed output", "closed errors"],
)
def test_a_reader_that_has_gone_is_no_error(workshop, root, end, printed):
    command = f"{sys.executable} -m onnxcomp inspect model.onnx {end}; echo ${{PIPESTATUS[0]}}"

    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=_environment(root), check=False
    )

    assert done.stdout.splitlines()[-1] == "0"
    assert printed is None or done.stderr == printed


def test_tables_fit_80_columns_and_carry_no_colours_in_a_pipe(cli, workshop, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    out = cli("inspect", "model.onnx", "--nodes", "-q").out

    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out


def _environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root)}


def test_the_calibration_data_are_not_changed(cli, workshop):
    before = np.load("data.npz")["image"].copy()

    cli(*OPTIMIZE)

    assert np.array_equal(np.load("data.npz")["image"], before)
