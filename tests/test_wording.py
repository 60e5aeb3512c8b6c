"""How numbers, names and progress are put into words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from onnxcomp import cli_layout
from onnxcomp.cli_progress import Progress
from onnxcomp.cli_tables import speed_text
from onnxcomp.timing import SAME
from onnxcomp.wording import count, interval, number, percent, plain, short_names, size, summarize, tally


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_999, "1.00 MB"),
        (1_586_509, "1.59 MB"),
        (2_300_000_000, "2.30 GB"),
        (None, "-"),
    ],
)
def test_sizes_have_three_significant_digits(value, text):
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (1.5754, "1.58"),
        (12.345, "12.3"),
        (12345.6, "12,346"),
        (0.000012345, "1.23e-05"),
        (float("inf"), "∞"),
        (float("nan"), "-"),
        (None, "-"),
    ],
)
def test_numbers_have_three_significant_digits(value, text):
    assert number(value) == text


def test_counts_are_in_full_below_a_million():
    assert [count(v) for v in (393_778, 59_204_544, None)] == ["393,778", "59.2 M", "-"]


def test_shares_and_intervals():
    assert percent(0.99752) == "99.75 %"
    assert interval((-0.0024, 0.0024), 100) == "-0.24 to 0.24"


def test_control_and_invisible_characters_are_escaped():
    text = plain("conv\x1b[31m\nred‮gnp\u200b[bold]")

    assert text == "conv\\x1b[31m red\\u202egnp\\u200b[bold]"


def test_files_of_the_same_name_are_told_apart_by_their_folder():
    assert short_names(["a/m.onnx", "b/m.onnx"]) == ["a/m.onnx", "b/m.onnx"]
    assert short_names(["a/m.onnx", "b/n.onnx"]) == ["m.onnx", "n.onnx"]
    assert short_names(["m.onnx", "m.onnx"]) == ["1: m.onnx", "2: m.onnx"]


def test_reasons_are_counted_and_the_most_frequent_is_named():
    assert tally(["a"]) == "1 left alone: a"
    assert tally(["a", "b", "a"]) == "3 left alone, mostly: a (2)"


def test_details_show_plain_values_only():
    assert summarize({"float_islands": 3, "sqnr": 47.3456, "steps": {"a": 1}}) == "float islands 3, sqnr 47.3"


@pytest.mark.parametrize(
    ("speedup", "ci", "verdict", "text"),
    [
        (2.02, (1.98, 2.06), "faster", "2.02x faster (95 %: 1.98 to 2.06)"),
        (0.77, (0.72, 0.81), "slower", "slower (0.77x, 95 %: 0.72 to 0.81)"),
        (1.0, (0.9, 1.1), SAME, f"{SAME} (1.00x, 95 %: 0.90 to 1.10)"),
        (1.24, (1.09, 1.29), SAME, f"{SAME} (1.24x, 95 %: 1.09 to 1.29, noise: 31 %)"),
        (None, None, "baseline", "baseline"),
    ],
)
def test_a_speed_up_is_told_with_its_interval_and_the_noise_that_hides_it(speedup, ci, verdict, text):
    timing = SimpleNamespace(speedup=speedup, ci=ci, verdict=verdict)

    assert speed_text(timing, 0.31) == text


def test_brackets_in_names_are_not_markup(capsys):
    table = cli_layout.table("node")
    table.add_row(plain("[red]conv[/red]"))

    cli_layout.Output().print(table)

    assert "[red]conv[/red]" in capsys.readouterr().out


# --- progress ---


def test_progress_in_a_log_is_one_line_per_step(capsys):
    with Progress() as progress:
        progress(0.0, "pass 1/2 fuse")
        progress(0.5, "pass 1/2 fuse: half")
        progress(0.0, "compared 1 samples")
        progress(0.0, "compared 2 samples")

    assert capsys.readouterr().err == "pass 1/2 fuse\ncompared 1 samples\n"


def test_quiet_progress_says_nothing(capsys):
    with Progress(quiet=True) as progress:
        progress(0.0, "verifying")

    assert capsys.readouterr().err == ""


class _Terminal:
    """A stream that says that it is a terminal."""

    encoding = "utf-8"

    def __init__(self):
        self.written = ""

    def write(self, text):
        self.written += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_progress_on_a_terminal_is_a_bar_that_shows_names_as_they_are(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = _Terminal()

    with Progress(stream=terminal) as progress:
        progress(0.5, "verifying [bold]\x1b[2J")

    assert "verifying [bold]\\x1b[2J" in terminal.written


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = _Terminal()

    with Progress(stream=terminal) as progress:
        progress(0.0, "verifying")

    assert terminal.written == "verifying\n"
