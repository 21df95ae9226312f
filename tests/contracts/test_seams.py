"""Every call of this package under every system of PyTorch: the oracle's value and gradients, or the documented error.

``seams/cases.py`` has the calls, ``seams/oracles.py`` the right answers in plain PyTorch, ``seams/systems.py`` the
systems, ``seams/expectations.py`` what is refused and why. The cells that compile run for a few cases by default; the
others are marked slow. The table in docs/reliability.md is ``python -m tests.contracts.seams --write``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from seams import table
from seams.cases import BY_NAME, CASES
from seams.distributed import CHECKS
from seams.expectations import REFUSALS, refusal
from seams.systems import SYSTEMS
from torch.func import grad, jacfwd, jvp

import fused_ops

FOLDER = Path(__file__).parent


@pytest.fixture
def _no_input_is_changed():
    """Instead of the fixture of that name: what users run, without wrappers around the raw ops that a compiler sees."""


def _cells():
    for system in SYSTEMS.values():
        for case in CASES:
            if system.applies(case):
                marks = [pytest.mark.slow] if table.is_slow(system, case) else []
                yield pytest.param(system, case, id=f"{system.name}-{case}", marks=marks)


@pytest.mark.parametrize("system, case", list(_cells()))
def test_a_seam(system, case):
    reason = table.unavailable(system)
    if reason:
        pytest.skip(reason)
    expected = refusal(system, case)
    if expected is None:
        system.run(case)
        return
    with pytest.raises(expected.error, match=expected.message):
        system.run(case)


def test_every_refusal_is_of_some_cell():
    cells = [(s, c) for s in SYSTEMS.values() for c in CASES if s.applies(c)]
    for r in REFUSALS:
        assert any(refusal(s, c) is r for s, c in cells), r.because


def test_every_public_name_has_a_case():
    """But what is no call of an op: revert, patch and convert have cases or tests of their own."""
    text = " ".join(map(repr, CASES))
    functions = {"batch_norm": "bn-", "cross_entropy": "ce-", "linear_cross_entropy": "lce-"}
    for name in fused_ops.__all__:
        if name not in ("revert", "CrossEntropyOutput", "convert_backend", "report"):
            assert functions.get(name, name) in text, name


def _environment():
    where = os.pathsep.join([str(FOLDER.parent.parent), str(FOLDER)])
    return {**os.environ, "PYTHONPATH": where, "OMP_NUM_THREADS": "1"}


# On two processes.


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """The outcome of every distributed check, run once."""
    path = tmp_path_factory.mktemp("seams") / "result.json"
    command = [sys.executable, "-m", "seams.distributed", str(path)]
    result = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return json.loads(path.read_text())


@pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"
)
@pytest.mark.parametrize("check", CHECKS)
def test_on_two_processes(check, two_processes):
    assert not two_processes[check], two_processes[check]


# The values that were stated when the faults were found.


def test_nested_forward_mode_of_three_logits():
    x, v, t = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 0.0, 0.0]).double(), torch.tensor(2)

    def loss(z):
        return fused_ops.cross_entropy(z, t)

    second = jvp(lambda y: jvp(loss, (y,), (v,))[1], (x,), (v,))[1]
    assert second.item() == pytest.approx(0.0819251, rel=1e-6)
    assert jacfwd(jacfwd(loss))(x)[0, 0].item() == pytest.approx(0.0819251, rel=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_the_gradient_inside_a_compiled_function(backend, fullgraph):
    x, t = torch.randn(7, 6, dtype=torch.float64), torch.randint(0, 6, (7,))

    def of(function):
        return lambda x: grad(lambda y: function(y, t))(x)

    expected = of(F.cross_entropy)(x)
    assert expected.norm() > 0.1
    got = torch.compile(of(fused_ops.cross_entropy), backend=backend, fullgraph=fullgraph)(x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_normalizer_that_changes_with_the_input():
    """One number, used twice: inside the graph and as an option."""
    h, w = torch.randn(64, 16), torch.randn(500, 16)
    t = torch.randint(0, 500, (64,))

    def loss(s):
        return fused_ops.linear_cross_entropy(h * s, w, t, normalizer=s * 10, chunk_rows=16)

    compiled = torch.compile(loss)
    for s in (0.1, 0.2, 0.3, 0.4):
        expected = F.cross_entropy((h * s) @ w.t(), t, reduction="sum") / (s * 10)
        torch.testing.assert_close(compiled(s), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_with_other_releases_of_torch():
    """The default cells under other interpreters with a torch of their own (any release >= 2.10), if some are given."""
    others = [p for p in os.environ.get("FUSED_OPS_OTHER_PYTHONS", "").split(os.pathsep) if p]
    if not others:
        pytest.skip("FUSED_OPS_OTHER_PYTHONS names no interpreter with another torch >= 2.10")
    problems = []
    for python in others:
        if subprocess.run([python, "-c", "import pytest"], capture_output=True).returncode:
            problems.append(f"{python}: has no pytest")
            continue
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "a_seam", __file__]
        result = subprocess.run(command, env=_environment(), capture_output=True, text=True)
        if result.returncode:
            problems.append(f"{python}:\n{result.stdout[-4000:]}")
    assert not problems, "\n".join(problems)


def test_the_table_is_what_the_expectations_say():
    assert table.read() == table.lines(), "run: python -m tests.contracts.seams --write"


def test_the_cases_of_the_lists_exist():
    assert set(table.named_cases()) <= set(BY_NAME)
