"""What the benchmarks say of the machine that they ran on, and that the largest of them runs."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

STEP = Path(__file__).parents[1] / "benchmarks" / "step.py"


def test_the_step_names_its_machine(monkeypatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    machine = runpy.run_path(str(STEP))["machine"]
    assert "cores" in machine() and machine().endswith(", not asked for by malloc")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert machine().endswith(", asked for by malloc")


def test_the_parts_of_a_step_are_told_by_the_names_of_its_operations(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(STEP.parent))
    parts = runpy.run_path(str(STEP.with_name("step_parts.py")))
    layer = "transformer/layer/0"
    named = {  # an operation of the compiled program, its name, and where its time counts
        "dot.1": (f"transpose(jvp(FlaxDistilBert))/{layer}/ffn/lin1/transpose", "student, backward", "products"),
        "ynn_fusion.2": (f"jvp(FlaxDistilBert)/{layer}/ffn/erfc", "student, forward", "GELU"),
        "ynn_fusion.3": ("jvp(FlaxBert)/layer/3/attention/self/vmap(BTNH)/dot_general", "teacher", "attention"),
        "fusion.4": ("jvp()/while/body/closed_call/exp", "head", "rest"),
        "add_fusion.5": ("add", "update", "rest"),
    }
    lines = [
        f'  %{op} = f32[2,3]{{1,0}} fusion(%a), metadata={{op_name="jit(step)/{x[0]}" id=1}}' for op, x in named.items()
    ]
    loop = '  %while.6 = (f32[]) while(%tuple), metadata={op_name="jit(step)/jvp()/while"}'
    found = parts["operations"]("\n".join([*lines, loop, "  %tuple.7 = (f32[]) tuple(%b)"]))
    assert list(found) == list(named)
    for op, (_, model, kind) in named.items():
        assert parts["kind_of"](parts["MODELS"], found[op]).startswith(model), op
        assert parts["kind_of"](parts["KINDS"], found[op]).startswith(kind), op


def timed(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a benchmark in the environment of a shell, without what commands of other tests set for their process."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("USE_")} | {"COLUMNS": "140"}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


@pytest.mark.weekly  # no user runs a benchmark; its step is that of a run
def test_a_step_of_both_libraries_is_the_same_and_is_timed() -> None:
    """The benchmark itself compares the losses of the first steps."""
    sizes = "--teacher-layers 2 --student-layers 1 --width 32 --heads 2 --vocab 300 --rows 8 --length 16 --rounds 2"
    command = [sys.executable, str(STEP), *sizes.split(), "--tokens", "masked", "--ways", "jaxdistill", "torch-eager"]
    done = timed(command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "torch-eager" in done.stdout and "of peak" in done.stdout


@pytest.mark.weekly  # as the step's; test_generate compares the text of both libraries
def test_both_libraries_write_the_same_text_and_are_timed() -> None:
    """The benchmark itself compares the texts."""
    sizes = "--layers 1 --prompts 2 --length 8 --new 4 --rounds 1"
    command = [sys.executable, str(STEP.with_name("generate.py")), *sizes.split()]
    done = timed(command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "of the text is equal" in done.stdout and "jaxdistill" in done.stdout
