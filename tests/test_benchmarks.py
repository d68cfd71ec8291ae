"""What the benchmarks say of the machine that they ran on."""

import runpy
from pathlib import Path

STEP = Path(__file__).parents[1] / "benchmarks" / "step.py"


def test_the_step_names_its_machine(monkeypatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    machine = runpy.run_path(str(STEP))["machine"]
    assert "cores" in machine() and machine().endswith(", not asked for by malloc")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert machine().endswith(", asked for by malloc")
