"""What a benchmark found: figures of a model, of models side by side, and of several settings, with their JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from onnxcomp.placement import FLOAT_KERNELS, INT8_KERNELS, Kernel, KernelRun

__all__ = ["SCHEMA_VERSION", "Benchmark", "Comparison", "ModelTiming"]

SCHEMA_VERSION = 1
_SHARED = (
    "provider", "threads", "streams", "batch", "shapes", "control", "control_ci", "noise_floor", "rounds", "pairs",
    "samples", "warmup_runs", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class ModelTiming:
    """One model's figures. Times in milliseconds, memory in bytes, kernels per run of the model.

    `ms` holds p50, p90 and p99 of single runs, None where the runs are too few for that tail. `load_ms`
    (creating the session) and `first_ms` (first inference) are medians over processes. `runs_per_second` counts the
    runs of all streams together. `peak_memory_bytes` is the peak resident memory of a process that only loads and
    runs this model, less what it held before; `resident_bytes` is that peak in all.

    Where a GPU runs the model, `ms` is without copies: `copy_in_ms` and `copy_out_ms` are what moving inputs and
    outputs takes besides, `device_bytes` the memory taken there, `build_ms` what building TensorRT's engine took
    (`load_ms` is then with that engine kept). None elsewhere, and where the system does not tell.

    Against the baseline: `speedup`, the ratio of latencies or with several streams of throughputs, with its 95 %
    interval `ci` from `pairs` paired measurements, and `verdict`; for the baseline itself these are None, None, 0
    and "baseline". `execution` is the proof of what ran where (`placement.Execution.to_json`), `fallback` what was
    to run on the provider and did not, None if all did.
    """

    path: str
    file_bytes: int
    runs: int
    ms: dict[str, float | None]
    runs_per_second: float
    load_ms: float
    first_ms: float
    peak_memory_bytes: int
    resident_bytes: int
    speedup: float | None
    ci: tuple[float, float] | None
    pairs: int
    verdict: str
    warmup_runs: int
    kernels: tuple[Kernel, ...]
    execution: Mapping[str, Any] = field(default_factory=dict)
    fallback: str | None = None
    copy_in_ms: float | None = None
    copy_out_ms: float | None = None
    device_bytes: int | None = None
    build_ms: float | None = None

    @property
    def nodes(self) -> tuple[KernelRun, ...]:
        """The nodes that ran, from the same profile as `kernels`."""
        rows = self.execution.get("nodes", ())
        return tuple(KernelRun(r["name"], r["op"], r["provider"], r["count"], r["us"]) for r in rows)

    @property
    def placement(self) -> dict[str, float]:
        """Share of the kernels' time by execution provider."""
        total = sum(k.microseconds for k in self.kernels)
        share: dict[str, float] = {}
        for kernel in self.kernels:
            share[kernel.provider] = share.get(kernel.provider, 0.0) + kernel.microseconds / max(total, 1e-12)
        return share

    @property
    def int8_kernels(self) -> int:
        """Kernels per run that computed on 8-bit integers."""
        return round(sum(k.count for k in self.kernels if k.op in INT8_KERNELS))

    @property
    def float_kernels(self) -> int:
        """Kernels per run that are the float counterpart of an int8 one."""
        return round(sum(k.count for k in self.kernels if k.op in FLOAT_KERNELS))

    def to_json(self) -> dict[str, Any]:
        by_op: dict[str, dict[str, float]] = {}
        for kernel in self.kernels:
            entry = by_op.setdefault(kernel.op, {"count": 0.0, "us": 0.0})
            entry["count"] += kernel.count
            entry["us"] += kernel.microseconds
        return {
            **vars(self),
            "ci": None if self.ci is None else list(self.ci),
            "kernels": by_op,
            "execution": dict(self.execution),
            "placement": self.placement,
            "int8_kernels": self.int8_kernels,
            "float_kernels": self.float_kernels,
        }


@dataclass(frozen=True)
class Benchmark:
    """Models side by side in one setting: `models[0]` is the baseline of the others.

    `provider` in short ("cpu"), `threads` of one run (0: all cores), `streams` concurrent runs, `batch` samples per
    run, None where nobody said, `shapes` those of the first feed. `control` is the speed-up of the baseline against
    itself with its interval `control_ci`, and `noise_floor` the largest relative difference which that interval
    allows: nothing smaller is called a difference. `rounds` are processes. `seconds` is the wall time of everything,
    child processes included.
    """

    provider: str
    threads: int
    models: tuple[ModelTiming, ...]
    control: float
    control_ci: tuple[float, float]
    noise_floor: float
    rounds: int
    seconds: float
    streams: int = 1
    batch: int | None = None
    shapes: Mapping[str, list[int]] = field(default_factory=dict)

    @property
    def setting(self) -> dict[str, Any]:
        """provider, threads, streams, batch."""
        return {"provider": self.provider, "threads": self.threads, "streams": self.streams, "batch": self.batch}

    def to_json(self) -> dict[str, Any]:
        """A JSON object; of two models, `optimized_ms`, `speedup` and the like speak of the second."""
        baseline, *others = self.models
        optimized = others[0] if len(others) == 1 else None
        shown = optimized or baseline
        return {
            **self.setting,
            "shapes": dict(self.shapes),
            "baseline_ms": baseline.ms["p50"],
            "optimized_ms": optimized and optimized.ms["p50"],
            "speedup": optimized and optimized.speedup,
            "ci": list(optimized.ci) if optimized and optimized.ci else None,
            "verdict": optimized and optimized.verdict,
            "samples": sum(m.runs for m in self.models),
            "pairs": sum(m.pairs for m in self.models),
            "placement": shown.placement,
            "int8_kernels": shown.int8_kernels,
            "control": self.control,
            "control_ci": list(self.control_ci),
            "noise_floor": self.noise_floor,
            "rounds": self.rounds,
            "warmup_runs": sum(m.warmup_runs for m in self.models),
            "seconds": self.seconds,
            "models": [m.to_json() for m in self.models],
        }


@dataclass(frozen=True)
class Comparison:
    """The same models in one or several settings. `hints` are sentences on what disturbs timing on this machine."""

    results: tuple[Benchmark, ...]
    environment: dict[str, Any]
    hints: tuple[str, ...]
    seconds: float

    @property
    def models(self) -> tuple[ModelTiming, ...]:
        """The rows of the table: every model in the first setting, then in the second, and so on."""
        return tuple(model for result in self.results for model in result.models)

    def to_json(self) -> dict[str, Any]:
        """The published JSON object (bench.schema.json). `models` has a row for each model and setting, with the
        setting and its noise floor in it; `settings` has what all models of a setting share.
        """
        rows, settings = [], []
        for result in self.results:
            shared = result.to_json()
            rows += [{**result.setting, "noise_floor": result.noise_floor, **m} for m in shared["models"]]
            settings.append({name: shared[name] for name in _SHARED})
        return {
            "schema_version": SCHEMA_VERSION,
            "models": rows,
            "settings": settings,
            "environment": self.environment,
            "hints": list(self.hints),
            "seconds": self.seconds,
        }
