"""The HTML report: complete, well formed, harmless whatever the names in a model, and the same when made from JSON."""

from __future__ import annotations

import base64
import copy
import functools
import hashlib
import html.parser
import itertools
import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import onnxcomp
from onnxcomp import job
from onnxcomp.errors import RejectedError, UsageError, VerificationError
from onnxcomp.html_report import read_report, render
from onnxcomp.html_verdict import cards

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
VOID = {"meta", "link", "input", "br"}
NASTY = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "\"' onmouseover='alert(1)",
    "--><!-- {{ 7*7 }} {% raw %}",
    "שלום/\u202egnp.exe\u202c",
    "null\0bell\x07",
    "lone \ud800 surrogate",
    "long/" + "x" * 5000,
    "",
)


class Page(html.parser.HTMLParser):
    """Checks nesting while it reads, and collects what tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@functools.cache
def _resource(name: str) -> str:
    return (ROOT / "onnxcomp" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run.json and run.html of one optimization with everything in it."""
    place = tmp_path_factory.mktemp("run")
    onnxcomp.optimize(
        MODELS / "digits_resnet.onnx",
        place / "out.onnx",
        calib=MODELS / "data" / "digits_resnet.calib.npz",
        eval=MODELS / "data" / "digits_resnet.eval.npz",
        samples=40,
        passes="cleanup,fuse,quantize:ranges=minmax:rounding=nearest:bias-correction=no:islands=no",
        json=place / "run.json",
        report=place / "run.html",
        bench_seconds=0.2,
        size="50x",
        goal="size",
    )
    return place


@pytest.fixture
def data(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def hostile(folder: Path) -> dict[str, Any]:
    """A report in which every text, and every name that a model may choose, attacks."""
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    names = iter(NASTY * 1000)
    for layer in found["layers"]:
        layer["name"] = next(names)
        for side in ("original", "optimized"):
            if layer[side] is not None:
                layer[side].update(op=next(names), dtype=next(names))
    for one in found["histograms"]:
        one["tensor"] = next(names)
    for one in found["passes"]:
        one["name"] = next(names)
        one["options"] = {next(names): next(names)}
        one["refused"] = [{"where": next(names), "reason": next(names)} for _ in range(20)]
        one["reverted"] = next(names)
        one["details"] = {"t": next(names), "s": {n: [n] for n in NASTY}, "r": [{n: n for n in NASTY}], "l": [*NASTY]}
    for one in found["candidates"]:
        one["label"] = next(names)
    found["notes"] = found["unmet"] = found["verification"]["reasons"] = list(NASTY)
    found["verification"]["metrics"] = {n: m for m in found["verification"]["metrics"].values() for n in NASTY}
    found["verification"]["data"] = found["command"] = found["created"] = "".join(NASTY)
    found["environment"] = {**found["environment"], **{n: n for n in NASTY}, "onnxcomp": NASTY[0]}
    found["options"] = {n: [n] for n in NASTY}
    found["original"]["path"] = found["optimized"]["path"] = "".join(NASTY)
    for timed in found["benchmark"]["models"]:
        timed["kernels"] = {n: {"count": 1, "us": 2.0} for n in NASTY}
    return found


# --- what the page holds ----------------------------------------------------------------------------------------


def test_the_page_is_written_beside_the_json_and_made_again_from_it_byte_for_byte(cli, folder, tmp_path):
    ran = cli("report", folder / "run.json", "-o", tmp_path / "again.html")

    assert ran.code == 0, ran.err
    assert (tmp_path / "again.html").read_bytes() == (folder / "run.html").read_bytes()


def test_the_page_is_well_formed_with_unique_ids_and_everything_labelled(folder):
    page = Page((folder / "run.html").read_text(encoding="utf-8"))

    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert not [i for i, n in Counter(ids).items() if n > 1]
    references = [attrs[key] for _, attrs in page.tags for key in ("aria-labelledby", "for") if key in attrs]
    references += [str(a["href"])[1:] for a in page.all("a")]
    assert set(references) <= set(ids)
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all("scope" in th for th in page.all("th"))
    assert len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"] == "en"
    controls = [a["id"] for tag in ("input", "select") for a in page.all(tag)]
    assert set(controls) <= {label["for"] for label in page.all("label")}
    assert all(a.get("tabindex") == "0" for _, a in page.tags if a.get("role") == "region")


def test_headings_never_skip_a_level(folder):
    levels = [int(tag[1]) for tag, _ in Page((folder / "run.html").read_text()).tags if re.fullmatch("h[1-6]", tag)]

    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_the_page_loads_nothing_and_allows_only_its_own_style_and_script(folder):
    text = (folder / "run.html").read_text(encoding="utf-8")
    page = Page(text)

    policy = str(page.all("meta")[1]["content"])
    assert policy.startswith("default-src 'none'; ")
    for kind, name in (("style", "report.css"), ("script", "report.js")):
        assert f"{kind}-src 'sha256-{_digest(''.join(page.texts[kind]))}'" in policy
        assert "".join(page.texts[kind]) == _resource(name)
    assert not [a for _, a in page.tags for key in a if key in ("src", "style") or key.startswith("on")]
    assert {a["href"] for a in page.all("link")} == {"data:,"}
    assert not re.search(r"https?://|url\(|@import", text)


def test_the_three_numbers_are_those_of_the_json(folder, data):
    text = (folder / "run.html").read_text()

    factor = data["original"]["file_bytes"] / data["optimized"]["file_bytes"]
    low, high = data["benchmark"]["ci"]
    assert f"{factor:.2f}× smaller" in text
    assert f"95 % interval: {low:.2f} to {high:.2f} times as fast" in text
    low, high = data["verification"]["ci"]
    assert f"95 % interval of the drop: {100 * low:.2f} to {100 * high:.2f} points" in text
    assert "Target missed: --size 50x was asked for" in text


def test_layers_are_paired_measured_and_compared(data):
    rows = {row["name"]: row for row in data["layers"]}

    conv = rows["/3/first/Conv"]
    assert conv["original"]["bytes"] > 3 * conv["optimized"]["bytes"]
    assert conv["original"]["bits_per_weight"] == 32
    assert 8 <= conv["optimized"]["bits_per_weight"] < 9
    assert conv["original"]["macs"] == conv["optimized"]["macs"] > 0
    assert conv["original"]["us"] > 0 < conv["optimized"]["us"]
    assert 20 < conv["sqnr_db"] < 80
    assert rows["/3/first_norm/BatchNormalization"]["optimized"] is None
    for side in ("original", "optimized"):
        shares = [row[side]["time_share"] or 0 for row in rows.values() if row[side] is not None]
        assert 0.5 < sum(shares) <= 1.0001


def test_histograms_count_every_value_and_know_the_range(data):
    kinds = Counter(one["kind"] for one in data["histograms"])
    assert kinds["weight"] > 5 < kinds["activation"]
    weight = next(h for h in data["histograms"] if h["tensor"] == "/3/first/Conv")
    assert sum(weight["original"]) == sum(weight["optimized"]) == 24 * 24 * 9
    for one in data["histograms"]:
        if one["kind"] == "activation":
            assert one["low"] <= one["range"][0] <= 0 <= one["range"][1] <= one["high"]
            assert one["samples"] > 0


def test_models_timed_on_the_way_are_listed_and_the_section_is_absent_without(data):
    assert sum(c["kept"] for c in data["candidates"]) == 1
    assert 'id="candidates"' in render(data)
    assert 'id="candidates"' not in render({**data, "candidates": []})


def test_a_report_of_an_older_version_without_layers_is_shown(data):
    for key in ("layers", "layers_omitted", "histograms", "candidates", "command", "created", "options", "notes"):
        del data[key]

    Page(render(data))


def test_without_verification_and_benchmark_the_page_says_so(data):
    text = render({**data, "verification": None, "benchmark": None})

    Page(text)
    assert "Not verified" in text
    assert "Not measured" in text
    assert "<p class=\"badge\">Not verified</p>" in text


def _cards(data: dict[str, Any], **changes: Any) -> dict[str, dict[str, Any]]:
    for path, value in changes.items():
        part, _, key = path.partition("__")
        data[part][key] = value
    return {card["label"]: card for card in cards(data)}


@pytest.mark.parametrize(
    ("before", "after", "words", "tone"),
    [
        (4000, 1000, "4.00× smaller", "good"),
        (1000, 1500, "1.50× larger", "bad"),
        (1000, 999, "Same size", "same"),
        (1000, 1000, "Same size", "same"),
    ],
)
def test_size_in_words(data, before, after, words, tone):
    card = _cards(data, original__file_bytes=before, optimized__file_bytes=after)["Size"]

    assert (card["value"], card["tone"]) == (words, tone)


@pytest.mark.parametrize(
    ("verdict", "speedup", "words", "tone"),
    [
        ("faster", 2.0, "2.00× faster", "good"),
        ("slower", 0.5, "2.00× slower", "bad"),
        ("no measurable difference", 1.2, "No measurable difference", "same"),
    ],
)
def test_speed_in_words(data, verdict, speedup, words, tone):
    card = _cards(data, benchmark__verdict=verdict, benchmark__speedup=speedup)["Speed"]

    assert (card["value"], card["tone"]) == (words, tone)


@pytest.mark.parametrize(
    ("kind", "drop", "words"),
    [
        ("accuracy", 0.0125, "−1.25 points"),
        ("accuracy", -0.005, "+0.50 points"),
        ("accuracy", 0.0, "0.00 points"),
        ("agreement", 0.01, "99.00 % same decisions"),
        ("sqnr", 0.0001, "40.0 dB SQNR"),
        ("sqnr", 0.0, "No difference"),
        ("custom", 0.2, "0.200 lost"),
    ],
)
def test_quality_in_words(data, kind, drop, words):
    changes = {"verification__metric": kind, "verification__drop": drop, "verification__optimized": 0.99}

    assert _cards(data, **changes)["Quality"]["value"] == words


# --- hostile input ----------------------------------------------------------------------------------------------


def test_hostile_names_become_text(hostile):
    text = render(hostile)

    page = Page(text)
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert not page.all("img")
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "{{ 7*7 }}" in text
    assert not any(c in text for c in "\0\x07\u202e\ud800")
    assert "x" * 1000 not in text.partition("<pre")[0]  # only the command is there in full
    assert "".join(page.texts["script"]) == _resource("report.js")


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(st.characters(codec=None, categories=None), max_size=40), st.floats(allow_nan=False))
def test_any_text_and_any_number_gives_a_well_formed_page(folder, text, value):
    data = json.loads((folder / "run.json").read_text())
    data["layers"] = data["layers"][:3]
    data["histograms"] = data["histograms"][:2]
    for layer in data["layers"]:
        layer.update(name=text, error=abs(value), sqnr_db=value)
        layer["original"].update(op=text, dtype=text, us=abs(value), bits_per_weight=abs(value))
    for one in data["histograms"]:
        one.update(tensor=text, low=-abs(value), high=abs(value), range=[-abs(value), abs(value)], steps=[value, value])
    data["passes"][0]["details"] = {text: {text: value}, "x_db": {"a": abs(value), "b": 1.0}}
    data["benchmark"].update(ci=[value, value], noise_floor=abs(value))
    data["verification"].update(drop=value, ci=[value, value])

    page = Page(render(data))

    assert len(page.all("script")) == 1


def test_a_page_of_a_huge_model_stays_below_two_megabytes(data):
    layer = data["layers"][0]
    data["layers"] = [{**layer, "name": f"layer {i} " + "n" * 5000} for i in range(1000)]
    refused = [{"where": f"{i} " + "w" * 200, "reason": f"{i % 40} " + "r" * 700} for i in range(4000)]
    data["passes"] = [{**data["passes"][0], "refused": refused, "details": {"t": refused, "o": [*NASTY]}}] * 20
    (metric,) = data["verification"]["metrics"].values()
    data["verification"]["metrics"] = {f"output {i}": metric for i in range(2000)}
    data["notes"] = ["note " * 1000] * 5000

    assert len(render(data).encode()) < 2_000_000


def _broken(change: Any) -> Any:
    def apply(data: dict[str, Any]) -> str:
        change(data)
        return json.dumps(data)

    return apply


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda data: "", "is no valid JSON"),
        (lambda data: json.dumps(data)[:-100], "is no valid JSON"),
        (lambda data: "[" * 100_000, "nested too deeply"),
        (lambda data: "[]", "is no report of onnxcomp"),
        (lambda data: '{"schema_version": 1}', "is no report of onnxcomp"),
        (lambda data: json.dumps(data).replace('"macs": ', '"macs": NaN, "x": ', 1), "is not a number"),
        (lambda data: json.dumps({**data, "seconds": 0}).replace('"seconds": 0', '"seconds": 1e999'), "too large"),
        (lambda data: json.dumps({**data, "x": 10**30}), "too large"),
        (_broken(lambda d: d["original"].update(file_bytes="<script>")), "original.file_bytes"),
        (_broken(lambda d: d["layers"][0].update(original=7)), "layers"),
        (_broken(lambda d: d["passes"][0].update(rewrites=None)), "rewrites"),
        (_broken(lambda d: d.update(schema_version=2)), "schema_version"),
    ],
)
def test_what_is_no_report_is_rejected_in_one_sentence(cli, data, tmp_path, make, expected):
    (tmp_path / "bad.json").write_text(make(data))

    ran = cli("report", tmp_path / "bad.json")

    assert ran.code == 3
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert expected in ran.err
    assert not (tmp_path / "bad.html").exists()


def test_files_that_are_no_text_or_not_there_are_rejected(tmp_path):
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(RejectedError, match="UTF-8"):
        read_report(tmp_path / "binary.json")
    with pytest.raises(RejectedError, match="there is no report"):
        read_report(tmp_path / "missing.json")
    with pytest.raises(RejectedError, match="there is no report"):
        read_report(tmp_path)


# --- writing ----------------------------------------------------------------------------------------------------


def test_an_existing_page_is_kept_unless_forced(cli, folder, tmp_path):
    (tmp_path / "run.json").write_bytes((folder / "run.json").read_bytes())
    (tmp_path / "run.html").write_text("mine")

    assert cli("report", tmp_path / "run.json").code == 2
    assert (tmp_path / "run.html").read_text() == "mine"
    assert cli("report", tmp_path / "run.json", "--force").code == 0
    assert (tmp_path / "run.html").read_bytes() == (folder / "run.html").read_bytes()


def test_optimize_checks_the_report_path_before_it_works(cli, workshop):
    (workshop / "there.html").write_text("mine")

    for path in ("there.html", "nowhere/r.html", "model.onnx", "."):
        ran = cli("optimize", "model.onnx", "--report", path, "--bench-seconds", "0", "-q")
        assert ran.code in (2, 3), path
    ran = cli("optimize", "model.onnx", "--report", "r.html", "--json", "./r.html", "-q")
    assert ran.code == 2
    assert not (workshop / "model.opt.onnx").exists()
    assert (workshop / "there.html").read_text() == "mine"


def test_a_source_never_becomes_its_own_page(folder, tmp_path):
    (tmp_path / "run.html").write_bytes((folder / "run.json").read_bytes())

    with pytest.raises(UsageError, match="the JSON file itself"):
        onnxcomp.write_report(tmp_path / "run.html", force=True)


def test_the_page_names_the_command_quoted_for_a_shell(cli, workshop):
    shutil.copy("data.npz", "my data.npz")

    ran = cli("optimize", "model.onnx", "--calib", "my data.npz", "--report", "r.html", "--bench-seconds", "0", "-q")

    assert ran.code == 0, ran.err
    page = Page((workshop / "r.html").read_text())
    wanted = "onnxcomp optimize model.onnx --calib 'my data.npz' --report r.html --bench-seconds 0 -q"
    assert page.texts["pre"] == [wanted]


def test_from_python_the_page_names_the_call(workshop):
    made = onnxcomp.optimize(onnx.load("model.onnx"), "o.onnx", max_drop="2%", passes="cleanup", bench_seconds=0)

    wanted = "onnxcomp.optimize(<ModelProto>, 'o.onnx', max_drop='2%', passes='cleanup', bench_seconds=0)"
    assert made.command == wanted
    assert made.to_html().count("<h1>") == 1


def test_a_failed_verification_leaves_reports_that_say_so_and_no_model(workshop, monkeypatch):
    honest = job.Job.verify_result
    bad = ("output 'scores' is off by 3",)
    monkeypatch.setattr(job.Job, "verify_result", lambda s: replace(honest(s), verdict="failed", reasons=bad))

    with pytest.raises(VerificationError, match="no model was written"):
        onnxcomp.optimize("model.onnx", "o.onnx", json="r.json", report="r.html", bench_seconds=0)

    assert not (workshop / "o.onnx").exists()
    found = read_report(workshop / "r.json")
    assert (found["verification"]["verdict"], found["optimized"]["path"]) == ("failed", None)
    text = (workshop / "r.html").read_text()
    assert "does not do the job of the original. No model was written." in text
    assert "off by 3" in text


# --- looks ------------------------------------------------------------------------------------------------------


def _palette(block: str) -> dict[str, tuple[float, float, float]]:
    found = re.findall(r"--([\w-]+): #([0-9a-f]{6})", block)
    return {name: tuple(int(value[i : i + 2], 16) / 255 for i in (0, 2, 4)) for name, value in found}  # type: ignore[misc]


def _luminance(colour: tuple[float, float, float]) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def _contrast(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_texts_and_plots_stand_out_in_light_and_dark(scheme):
    colours = _palette(_resource("report.css").split("@media (prefers-color-scheme: dark)")[scheme].split("* {")[0])

    for name in ("text", "muted", "link"):
        for ground in ("page", "panel"):
            assert _contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for tone in ("good", "warn", "bad"):
        for ground in (f"{tone}-panel", "panel"):
            assert _contrast(colours[tone], colours[ground]) >= 4.5, (tone, ground)
            assert _contrast(colours["text"], colours[f"{tone}-panel"]) >= 4.5
    assert _contrast(colours["muted"], colours["same-panel"]) >= 4.5
    for series in ("before", "after"):
        assert _contrast(colours[series], colours["panel"]) >= 3


# --- in a browser -----------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
# Runs in the page after its own script, as a user with a keyboard would go; the outcome is an attribute of <html>.
DRIVER = """
const fire = (e, type) => e.dispatchEvent(new Event(type, {bubbles: true}));
const rows = () => [...document.querySelectorAll(".layers tbody tr")].filter((r) => !r.hidden);
const found = {};
found.fits = document.documentElement.scrollWidth <= window.innerWidth;
found.width = window.innerWidth;
const header = document.querySelector('.layers th[data-label="Bytes, optimized"]');
header.querySelector("button").focus();
found.focus = document.activeElement.className;
header.querySelector("button").click();
const column = header.dataset.column;
found.sorted = rows().map((r) => r.cells[column].dataset.value).filter((v) => v !== undefined).map(Number);
found.aria = header.getAttribute("aria-sort");
const filter = document.getElementById("layer-filter");
filter.value = "GEMM"; fire(filter, "input");
found.filtered = rows().length;
found.status = document.getElementById("layer-status").textContent;
const choice = document.getElementById("histogram-choice");
choice.value = "2"; fire(choice, "change");
found.histograms = [...document.querySelectorAll("[data-histogram]")].filter((f) => !f.hidden).length;
found.errors = window.failures;
found.requests = performance.getEntriesByType("resource").length;
document.documentElement.dataset.found = JSON.stringify(found);
"""
WATCH = """
window.failures = [];
addEventListener("error", (e) => failures.push(e.message));
addEventListener("securitypolicyviolation", (e) => failures.push(e.violatedDirective));
console.error = (...a) => failures.push(a.join(" "));
"""


def _browse(page: Path, *flags: str) -> str:
    assert CHROMIUM is not None
    profile = page.parent / "profile"
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", *flags]
    ran = subprocess.run([*command, f"file://{page}"], capture_output=True, text=True, timeout=120, check=True)
    return ran.stdout


def _driven(text: str, place: Path, *flags: str) -> dict[str, Any]:
    """What the driver found. Its two scripts are let in by their hashes; nothing else of the policy changes."""
    hashes = "".join(f"'sha256-{_digest(script)}' " for script in (WATCH, DRIVER))
    text = text.replace("script-src ", f"script-src {hashes}", 1)
    text = text.replace("<title>", f"<script>{WATCH}</script><title>", 1)
    place.write_text(text.replace("</body>", f"<script>{DRIVER}</script></body>"), encoding="utf-8")
    dumped = Page(_browse(place, *flags, "--dump-dom"))
    return json.loads(str(dumped.all("html")[0]["data-found"]))


@needs_browser
def test_in_a_browser_tables_sort_and_filter_and_one_histogram_shows(folder, tmp_path):
    found = _driven((folder / "run.html").read_text(), tmp_path / "page.html", "--window-size=1200,900")

    assert found["errors"] == []
    assert found["requests"] == 0
    assert found["focus"] == "sort"
    assert found["aria"] == "descending"
    assert len(found["sorted"]) > 10
    assert found["sorted"] == sorted(found["sorted"], reverse=True)
    assert found["filtered"] == 1
    assert found["status"].startswith("1 of ")
    assert found["histograms"] == 1


@needs_browser
def test_in_a_browser_hostile_names_do_nothing(hostile, tmp_path):
    changed = copy.deepcopy(hostile)
    changed["layers"][-1]["name"] = "gemm"

    found = _driven(render(changed), tmp_path / "page.html", "--window-size=500,900")

    assert found["errors"] == []
    assert found["requests"] == 0
    assert found["fits"], "the page scrolls sideways"


@needs_browser
def test_in_a_browser_without_javascript_all_tables_and_figures_are_there(folder, tmp_path):
    text = (folder / "run.html").read_text()
    shutil.copy(folder / "run.html", tmp_path / "page.html")

    silent = re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL)
    (tmp_path / "page.html").write_text(silent)
    page = Page(_browse(tmp_path / "page.html", "--dump-dom"))

    figures = [a for a in page.all("figure") if "data-histogram" in a]
    assert len(figures) > 10
    assert not [a for a in figures if "hidden" in a]
    assert len(page.all("table")) == len(Page(text).all("table"))


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_the_page_is_painted_in_the_scheme_of_the_system(folder, tmp_path, scheme):
    from PIL import Image

    shutil.copy(folder / "run.html", tmp_path / "page.html")
    flags = (f"--screenshot={tmp_path / 'shot.png'}", "--window-size=800,1200", "--hide-scrollbars")
    _browse(tmp_path / "page.html", *flags, f"--blink-settings=preferredColorScheme={int(scheme == 'light')}")

    with Image.open(tmp_path / "shot.png") as shot:
        corner = shot.convert("L").getpixel((5, 5))
        seen = len(shot.convert("RGB").getcolors(1 << 24))
    assert (corner > 128) is (scheme == "light")
    assert seen > 50
