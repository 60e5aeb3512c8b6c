"""The processor: its int8 instructions, the cores and memory that this process may use, and what disturbs
timing.

Everything is read from files and system calls; nothing here starts a process. Linux is read fully, macOS and
Windows as far as they say.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "cpu_model", "has_int8_dot_product", "int8_instructions", "int8_meaning", "load_hints", "memory_bytes",
    "usable_cores",
]  # fmt: skip

_X86 = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8")
_ARM = ("asimddp", "i8mm")
# Any of these multiplies 8-bit integers and adds four products in 32 bits at once.
_DOT_PRODUCT = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
_DARWIN = {
    "avx2": b"hw.optional.avx2_0",
    "avx512_vnni": b"hw.optional.avx512vnni",
    "asimddp": b"hw.optional.arm.FEAT_DotProd",
    "i8mm": b"hw.optional.arm.FEAT_I8MM",
}
_WINDOWS_ARM_DOT_PRODUCT = 43  # PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE of winnt.h


def has_int8_dot_product() -> bool | None:
    """Whether this CPU has int8 dot-product instructions (VNNI, AMX, ARM dotprod); None if it cannot be
    told.
    """
    flags = int8_instructions()
    return None if flags is None else any(flags.get(name, False) for name in _DOT_PRODUCT)


def int8_instructions() -> dict[str, bool] | None:
    """The instruction sets that decide int8 speed and saturation on this CPU; None if they cannot be told."""
    try:
        if sys.platform == "linux":
            return parse_cpuinfo(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
        if sys.platform == "darwin":
            names = _ARM if platform.machine() == "arm64" else _X86
            return {name: _sysctl(_DARWIN[name]) for name in names if name in _DARWIN}
        if sys.platform == "win32" and platform.machine().upper() == "ARM64":
            return {"asimddp": _windows_feature(_WINDOWS_ARM_DOT_PRODUCT)}
    except (OSError, AttributeError):
        return None
    return None


def parse_cpuinfo(text: str) -> dict[str, bool] | None:
    """The same from the text of /proc/cpuinfo; of cores that differ (big and little), what all of them
    have.
    """
    cores = []
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            cores.append((key.strip(), frozenset(value.split())))
    if not cores:
        return None
    names = _X86 if cores[0][0] == "flags" else _ARM
    return {name: all(name in flags for _, flags in cores) for name in names}


def int8_meaning(instructions: Mapping[str, bool] | None) -> str:
    """One sentence: what these instructions mean for u8 activations times s8 weights."""
    if instructions is None:
        return (
            "This CPU's int8 instructions are unknown: u8 x s8 products may saturate in pairs at 16 bits, "
            "so weights should be restricted to 7 bits."
        )
    found = [name for name in _DOT_PRODUCT if instructions.get(name)]
    if found:
        names = ", ".join(found)
        return f"int8 dot products ({names}): u8 x s8 is summed in 32 bits, fast and without saturation."
    if "asimddp" in instructions:
        return "No int8 dot products (asimddp): int8 does not saturate, but gains little over float."
    width = "AVX2" if instructions.get("avx2") else "SSE"
    return (
        f"{width} without VNNI: the sum of two u8 x s8 products saturates at 16 bits, so weights have to be "
        "restricted to 7 bits (-64..64) to keep accuracy; expect less gain than with VNNI."
    )


def cpu_model() -> str | None:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or None


def usable_cores() -> float:
    """Cores that this process may use: its affinity, and less where a control group's quota allows less."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    quota = cpu_quota()
    return cores if quota is None else min(cores, quota)


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), table: Path = Path("/proc/self/cgroup")) -> float | None:
    """The smallest quota of CPU time, in cores, over this process's control groups (v1 and v2) and their
    parents.
    """
    quotas = []
    for folder in _groups(root, table, "cpu"):
        limit, period = _words(folder / "cpu.max") or (
            _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us") or ["max", "1"]
        )
        if limit.isdigit() and int(period) > 0:
            quotas.append(int(limit) / int(period))
    return min(quotas, default=None)


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, and less where a control group allows less."""
    import psutil

    return min([int(psutil.virtual_memory().total), *_memory_limits()])


def load_hints() -> tuple[str, ...]:
    """Sentences on what would disturb a benchmark on this machine now."""
    hints = []
    cores = usable_cores()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5 * cores:
        hints.append(f"the load average is {load:.1f} on {cores:g} cores: other processes disturb the timing")
    governor = _words(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"))
    if governor and governor[0] != "performance":
        hints.append(
            f"the CPU frequency governor is {governor[0]}: "
            "`sudo cpupower frequency-set -g performance` makes the timing steadier"
        )
    quota = cpu_quota()
    if quota is not None and quota < (os.cpu_count() or 1):
        hints.append(f"a control group limits this process to {quota:g} cores and interrupts runs")
    return tuple(hints)


def _memory_limits(root: Path = Path("/sys/fs/cgroup"), table: Path = Path("/proc/self/cgroup")) -> list[int]:
    limits = []
    for folder in _groups(root, table, "memory"):
        value = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes") or ["max"]
        if value[0].isdigit():
            limits.append(int(value[0]))
    return limits


def _groups(root: Path, table: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups of this process for `controller`, with their parents.

    A line of /proc/self/cgroup is "0::/path" for version 2 and "N:controllers:/path" for version 1, where the
    controller has a tree of its own. Inside a container the path may not exist under `root`; its root does.
    """
    try:
        lines = table.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            base = root
        elif controller in controllers.split(","):
            base = root / controller
        else:
            continue
        here = Path(path.lstrip("/"))
        yield from (base / part for part in (here, *here.parents))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _sysctl(name: bytes) -> bool:
    """An integer of macOS's sysctl, as a truth value; False where the system does not know the name."""
    import ctypes

    value, size = ctypes.c_int(0), ctypes.c_size_t(4)
    library: Any = ctypes.CDLL(None)
    status = library.sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return bool(status == 0 and value.value)


def _windows_feature(number: int) -> bool:
    import ctypes

    return bool(ctypes.windll.kernel32.IsProcessorFeaturePresent(number))  # type: ignore[attr-defined,unused-ignore]
