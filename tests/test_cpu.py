from __future__ import annotations

import pytest

from onnxcomp import cpu

INTEL = "processor : 0\nmodel name : X\nflags : fpu avx2 avx512f avx512_vnni avx_vnni\n"
OLD = "processor : 0\nflags\t\t: fpu avx2 fma\n"
BIG = "processor : 0\nFeatures : fp asimd asimddp i8mm\n"
LITTLE = "processor : 1\nFeatures : fp asimd asimddp\n"


def test_the_flags_of_an_x86_processor_are_read():
    assert cpu.parse_cpuinfo(INTEL) == {
        "avx2": True, "avx512_vnni": True, "avx_vnni": True, "amx_int8": False,
    }  # fmt: skip


def test_of_unlike_cores_only_what_all_have_counts():
    assert cpu.parse_cpuinfo(BIG + LITTLE) == {"asimddp": True, "i8mm": False}


def test_a_file_without_flags_says_nothing():
    assert cpu.parse_cpuinfo("processor : 0\nisa : rv64gc\n") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [(INTEL, True), (OLD, False), (BIG, True), ("Features : fp asimd", False), ("", None)],
)
def test_a_dot_product_is_found_missing_or_unknown(monkeypatch, text, expected):
    monkeypatch.setattr(cpu, "int8_instructions", lambda: cpu.parse_cpuinfo(text))

    assert cpu.has_int8_dot_product() is expected


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (INTEL, "without saturation"),
        (OLD, "AVX2 without VNNI"),
        (OLD, "7 bits"),
        ("flags : sse2", "SSE without VNNI"),
        ("Features : fp asimd", "gains little"),
        ("", "unknown"),
    ],
)
def test_the_meaning_for_int8_is_said(text, part):
    assert part in cpu.int8_meaning(cpu.parse_cpuinfo(text))


def test_the_smallest_quota_of_all_parent_groups_counts(tmp_path):
    inner = tmp_path / "user" / "job"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    (tmp_path / "user" / "cpu.max").write_text("150000 100000\n")
    table = tmp_path / "table"
    table.write_text("0::/user/job\n")

    assert cpu.cpu_quota(tmp_path, table) == 1.5


def test_the_quota_of_the_old_control_groups_is_read(tmp_path):
    group = tmp_path / "cpu" / "job"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("50000\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    table = tmp_path / "table"
    table.write_text("7:pids:/job\n4:cpu,cpuacct:/job\n")

    assert cpu.cpu_quota(tmp_path, table) == 0.5


@pytest.mark.parametrize("table", ["", "0::/gone\n", "nonsense\n"])
def test_without_control_groups_there_is_no_quota(tmp_path, table):
    file = tmp_path / "table"
    file.write_text(table)

    assert cpu.cpu_quota(tmp_path, file) is None


def test_this_machine_has_cores_and_memory():
    assert cpu.usable_cores() > 0
    assert cpu.memory_bytes() > 2**20
