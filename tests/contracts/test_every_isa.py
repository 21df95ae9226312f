"""The tests of edges and corners once more, with the kernels of instruction sets that this processor does not choose.

One process for each, since the choice is made once in a process. The error rule under every instruction set is in the
tests of each op.
"""

import pytest
from conftest import ROOT, skip_without

import fused_ops

FILES = [
    "contracts/test_corners.py",
    "cross_entropy/test_cross_entropy_layouts.py",
    "cross_entropy/test_cross_entropy_small.py",
]


@pytest.mark.skipif(fused_ops.core.library.missing_reason is not None, reason="without the library there is no kernel")
@pytest.mark.parametrize(
    ("tests", "isa"),
    [
        ("not slow", "AVX2"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("not slow", "DEFAULT"), ("slow", "AVX2"), ("slow", "DEFAULT"))
        ),
    ],
)
def test_every_isa(tests, isa, run_pytest):
    skip_without(isa)
    run_pytest(*(str(ROOT / "tests" / file) for file in FILES), "-m", tests, ATEN_CPU_CAPABILITY=isa.lower())
