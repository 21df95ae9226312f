"""exp, expm1, log1p, tanh and erf of csrc/simd: no further from the truth than docs/reliability.md says."""

import math
import shutil

import pytest
from conftest import ROOT

pytest.importorskip("rich", reason="the bench extra is not installed")

import fused_ops
from benchmarks import function_accuracy as accuracy
from benchmarks.machine import isa

pytestmark = [
    pytest.mark.skipif(fused_ops.core.library.missing_reason is not None, reason="without the library: no kernel"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no compiler"),
    pytest.mark.skipif(isa().upper() not in accuracy.ISAS, reason="its flags are for x86"),
]
NAMES = [function.name for function in accuracy.FUNCTIONS]
SPECIAL = {  # at NaN, -inf and inf; None where it is not used
    "`exp_`": (math.nan, 0.0, None),
    "`exp_vec`": (math.nan, 0.0, None),
    "`exp_scaled`": (math.nan, 0.0, None),
    "`exp_close`": (math.nan, 0.0, math.inf),
    "`expm1_`": (math.nan, -1.0, None),
    "`log1p_below`": (math.nan, None, None),
    "`tanh_`": (math.nan, -1.0, 1.0),
    "`sigmoid_`": (math.nan, 0.0, 1.0),
    "`gauss`": (math.nan, 0.0, 0.0),
    "`normal_below`": (math.nan, 0.0, 1.0),
}


def documented():
    """Function -> instruction set -> the page's error."""
    table = accuracy.MARKER.search((ROOT / "docs" / "reliability.md").read_text())[0]
    header, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return {row[0]: {i: float(e) for i, e in zip(header[3:], row[3:], strict=True)} for row in rows}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    return {name: accuracy.build(name, folder) for name in accuracy.available()}


def test_the_page_has_every_function():
    assert list(documented()) == NAMES


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 1013])
@pytest.mark.parametrize("function", accuracy.FUNCTIONS, ids=lambda f: f.name.strip("`"))
def test_largest_errors(libraries, function, every):
    page = documented()[function.name]
    for name, library in libraries.items():
        error, at = accuracy.largest_error(library, function, every)
        assert error <= page[name] + 0.001, f"{name}: {error:.3f} ulp at {at!r}, the page has {page[name]}"
        assert error > page[name] / 4, f"{name}: {error:.3f} ulp, the page has {page[name]}: does it still count?"


@pytest.mark.parametrize("function", accuracy.FUNCTIONS, ids=lambda f: f.name.strip("`"))
def test_nan_and_infinities(libraries, function):
    for name, library in libraries.items():
        for x, expected in zip((math.nan, -math.inf, math.inf), SPECIAL[function.name], strict=True):
            if expected is None:
                continue
            found = library.value_at(NAMES.index(function.name), x)
            assert found == expected or (math.isnan(found) and math.isnan(expected)), f"{name} at {x}: {found}"


def test_flags_are_the_kernels():
    assert all("-O3" in flags and "-fno-math-errno" in flags for flags in accuracy.flags().values())
    assert list(accuracy.flags()) == list(accuracy.ISAS)
