"""Every kernel, dtype, instruction set and tail on tensors with an unreadable page right behind or right before them.

torch's allocations are served by tests/guard_pages/guard.c, so that inputs, outputs and workspaces are all guarded: a
vector loop that reads or writes one element too many ends the process. By default each instruction set takes every
11th call, from a start of its own; ``FUSED_OPS_FULL_GRID=1`` takes all of them.
"""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, skip_without
from opinfo_cases import FULL

import fused_ops

HERE = ROOT / "tests" / "guard_pages"
STRIDE = 1 if FULL else 11
ISAS = ["DEFAULT", "AVX2", "AVX512"]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the guard is for Linux"),
    pytest.mark.skipif(
        fused_ops.core.library.missing_reason is not None, reason="without the library there is no kernel"
    ),
]


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to build the guard with")
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, HERE / "guard.c"], check=True)
    return str(library)


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_outside_a_tensor_is_touched(isa, guard, run_python):
    skip_without(isa)
    start = ISAS.index(isa) % STRIDE
    result = run_python(
        str(HERE / "walk.py"),
        check=False,
        timeout=1200,
        LD_PRELOAD=guard,
        OMP_NUM_THREADS="1",
        ATEN_CPU_CAPABILITY=isa.lower(),
        FUSED_OPS_GUARD_STRIDE=f"{STRIDE},{start}",
    )
    last = result.stderr.strip().splitlines()[-3:]
    assert result.returncode == 0, f"exit status {result.returncode} in or after {last}"
    used, calls, _ = result.stdout.split()
    assert used == isa
    assert int(calls) > 30000 // STRIDE


@pytest.mark.parametrize("mode", [1, 2])
def test_the_guard_notices_one_byte(mode, guard, run_python):
    code = f"""
import ctypes, torch
ctypes.CDLL(None).guard_mode({mode})
t = torch.zeros(3)
assert t.sum() == 0
ctypes.string_at(t.data_ptr() + (12 if {mode} == 1 else -1), 1)
"""
    assert run_python("-c", code, check=False, LD_PRELOAD=guard).returncode == -11


def test_raw_ops_with_garbage_under_the_guard(guard, run_pytest):
    """The fuzzing of tests/contracts/test_raw_ops.py, every tensor guarded."""
    run_pytest(
        str(ROOT / "tests" / "contracts" / "test_raw_ops.py"),
        LD_PRELOAD=guard,
        GUARD_MODE="1",
        FUSED_OPS_FUZZ_CALLS="20000" if FULL else "150",
        FUSED_OPS_FUZZ_SEED="1",
        OMP_NUM_THREADS="1",
    )
