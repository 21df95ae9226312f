"""The kernels execute no more instructions than when they were last counted: a guard that needs no clock."""

from __future__ import annotations

import pytest

pytest.importorskip("rich", reason="the bench extra is not installed")

from benchmarks import instructions

NEW = "python -m benchmarks instructions"


def test_kernels_of_the_contract_headers_are_found():
    assert {"cross_entropy_forward", "cross_entropy_backward"} <= set(instructions.kernels())


@pytest.fixture(
    scope="module",
    params=[i if i == "AVX2" else pytest.param(i, marks=pytest.mark.slow) for i in instructions.ISAS],
)
def counted(request):
    reason = instructions.unavailable()
    if reason:
        pytest.skip(reason)
    kept = instructions.load()
    if kept["compiler"] != instructions.compiler():
        pytest.skip(f"counted with {kept['compiler']}, the library was built by {instructions.compiler()}")
    return kept["instructions"][request.param], instructions.count(request.param)


def test_no_kernel_executes_more_instructions(counted):
    before, after = counted
    assert before.keys() == after.keys(), f"other cases than in instructions.json; if that is meant: {NEW}"
    grown = {
        name: f"{before[name]:,} -> {n:,} ({n / before[name] - 1:+.1%})"
        for name, n in after.items()
        if n > before[name] * (1 + instructions.ALLOWANCE)
    }
    assert not grown, f"more instructions than kept (if that is worth it: {NEW}): {grown}"


def test_counts_are_of_the_kernels(counted):
    _, after = counted
    logits = 32 * 1000
    forward = after["cross_entropy 32x1000 float32 contiguous forward"]
    assert logits / 8 < forward < logits * 60  # at least one AVX2 instruction for each eight logits


def test_every_instruction_set_that_can_be_counted_is_held():
    assert tuple(instructions.load()["instructions"]) == instructions.ISAS
