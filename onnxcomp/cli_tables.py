"""How the results of `inspect` and `doctor` are printed, and what is said about speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from onnxcomp.cli_layout import remarks, say, table
from onnxcomp.timing import SAME
from onnxcomp.wording import (
    count,
    dimensions,
    interval,
    percent,
    plain,
    ratio,
    size,
)

if TYPE_CHECKING:
    from onnxcomp.bench_results import ModelTiming
    from onnxcomp.environment import Doctor

__all__ = ["int8_text", "show_doctor", "show_inspection", "speed_text"]

_PRODUCTS = ("Conv", "MatMul", "Gemm", "Attention", "LSTM")


def speed_text(timing: ModelTiming, noise_floor: float) -> str:
    """A speed-up in words: "2.02x faster (95 %: 1.98 to 2.06)". `noise_floor` is a relative difference."""
    if timing.speedup is None or timing.ci is None:
        return timing.verdict
    sure = f"95 %: {interval(timing.ci)}"
    low, high = timing.ci
    if timing.verdict == SAME and not low <= 1 <= high:
        sure += f", noise: {percent(noise_floor, 0)}"  # the interval alone would say something else
    if timing.verdict == "faster":
        return f"{ratio(timing.speedup)} faster ({sure})"
    return f"{timing.verdict} ({ratio(timing.speedup)}, {sure})"


def int8_text(timing: ModelTiming) -> str:
    """How many of the products ran as int8: "20 of 20 weighted operators ran as int8", "" where none did."""
    from onnxcomp.placement import INT8_KERNELS

    int8 = sum(k.count for k in timing.kernels if k.op in INT8_KERNELS and any(p in k.op for p in _PRODUCTS))
    every = round(int8) + timing.float_kernels
    return f"{round(int8)} of {every} weighted operators ran as int8" if round(int8) else ""


def show_inspection(console: Console, found: Mapping[str, Any], *, nodes: bool = False) -> None:
    """What is in a model. `found` is the JSON object of an Inspection."""
    console.print(_facts(found))
    say(console)
    console.print(_ports(found))
    say(console)
    operators = table("operator", ">nodes")
    for name, times in found["operators"].items():
        operators.add_row(plain(name), count(times))
    console.print(operators)
    say(console)
    if found["largest"]:
        console.print(_largest(found["largest"]))
        say(console)
    if nodes:
        console.print(_nodes(found["layers"]))
        say(console)
    outlook = table("pass", ">could", "")
    for one in found["passes"]:
        outlook.add_row(plain(one["pass"]), count(one["candidates"]), plain(one["note"]))
    console.print(outlook)
    remarks(console, found["notes"])
    remarks(
        console, (f"MACs unknown: {u['where']} ({u['op']}): {u['reason']}" for u in found["macs_unknown"])
    )


def _facts(found: Mapping[str, Any]) -> Table:
    facts = table("", "")
    parameters = found["parameters"]
    opsets = ", ".join(f"{domain} {version}" for domain, version in found["opsets"].items())
    types = ", ".join(f"{dtype} {size(n)}" for dtype, n in found["bytes_by_type"].items())
    at_least = "at least " if found["macs_unknown"] else ""
    quantization = found["quantization"]
    for name, text in (
        ("file", f"{found['path']} ({size(found['file_bytes'])})"),
        ("produced by", f"{found['producer'] or 'unknown'}, IR {found['ir_version']}, opset {opsets}"),
        ("parameters", f"{count(parameters)}, {percent(found['sparsity'], 1)} of them zero"),
        ("tensors", types or "none"),
        ("MACs", f"{at_least}{count(found['macs'])}"),
        ("nodes", count(found["nodes"])),
        ("8 bits or less", f"{quantization['quantized']} of {quantization['weighted']} weighted nodes"),
    ):
        facts.add_row(name, plain(text))
    return facts


def _ports(found: Mapping[str, Any]) -> Table:
    ports = table("", "name", "type", "dimensions")
    for kind in ("inputs", "outputs"):
        for port in found[kind]:
            kind_of = kind.removesuffix("s")
            ports.add_row(
                kind_of, plain(port["name"]), plain(port["dtype"] or "?"), dimensions(port["shape"])
            )
    return ports


def _largest(tensors: Sequence[Mapping[str, Any]]) -> Table:
    largest = table("largest tensors", "type", "shape", ">bytes")
    for t in tensors:
        largest.add_row(plain(t["name"]), plain(t["dtype"]), dimensions(t["shape"]), size(t["bytes"]))
    return largest


def _nodes(layers: Sequence[Mapping[str, Any]]) -> Table:
    rows = table("node", "operator", "weight", ">parameters", ">MACs", ">share")
    for layer in layers:
        shape = layer["weight_shape"]
        weight = "" if shape is None else f"{plain(layer['dtype'])} {dimensions(shape, 'x')}"
        share = percent(layer["share"], 1) if layer["share"] else ""
        macs = count(layer["macs"]) if layer["macs"] != 0 else ""
        parameters = count(layer["parameters"]) if layer["parameters"] else ""
        rows.add_row(plain(layer["node"]), plain(layer["op"]), weight, parameters, macs, share)
    return rows


def show_doctor(console: Console, found: Doctor) -> None:
    """Versions and hardware, providers that work, int8, and what to install."""
    facts = table("", "")
    for key, value in found.environment.items():
        if key == "memory_bytes":
            facts.add_row("memory", size(value))
        elif key == "instructions":
            have = [name for name, there in (value or {}).items() if there]
            facts.add_row("instructions", "unknown" if value is None else ", ".join(have) or "none for int8")
        else:
            facts.add_row(key, plain("not found" if value is None else value))
    facts.add_row("int8", plain(found.int8))
    console.print(facts)
    say(console)
    providers = table("provider", "works", "")
    for one in found.providers:
        providers.add_row(plain(one.name), "yes" if one.works else "no", plain(one.detail))
    console.print(providers)
    say(console)
    packages = table("optional package", "version", "for")
    for package in found.packages:
        missing = plain(f"{package.purpose}: {package.install}")
        text = plain(package.purpose) if package.version is not None else missing
        packages.add_row(plain(package.name), plain(package.version or "missing"), text)
    console.print(packages)
    remarks(console, found.hints, "hint")
