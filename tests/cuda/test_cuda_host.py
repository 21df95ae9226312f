"""The CUDA emulation itself: that it runs kernels as a GPU would and notices the faults that it is there to notice."""

import ctypes
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_host import CSRC, DTYPES, build, numbers, pointer

RACE = 719  # an error of the launch


def run_shift(library, barrier, order):
    out = torch.full((64,), -1, dtype=torch.int32)
    library.cuda_host_set_order(order)
    assert library.self_shift(barrier, pointer(out)) == (0 if barrier else RACE)
    return out


def test_a_missing_barrier_shows_in_another_order_of_threads(cuda_host):
    expected = (torch.arange(64, dtype=torch.int32) + 1) % 64
    right = [run_shift(cuda_host, 1, order) for order in range(4)]
    wrong = [run_shift(cuda_host, 0, order) for order in range(4)]
    assert all(torch.equal(r, expected) for r in right)
    assert not any(torch.equal(w, expected) for w in wrong)


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("kernel", ["shift", "show_lane", "shift_in_place", "twice", "other_block"])
def test_races_show_in_any_order_of_threads(cuda_host, kernel, order):
    cuda_host.cuda_host_set_order(order)
    out = torch.zeros(256, dtype=torch.int32)
    run = getattr(cuda_host, f"self_{kernel}")
    assert [run(right, pointer(out)) for right in (0, 1, 0)] == [RACE, 0, RACE]


def test_what_lies_beside_a_misaligned_vector_may_be_written(cuda_host):
    values = torch.arange(64 * 4 + 8, dtype=torch.float32)
    start = -(values.data_ptr() // 4) % 4
    cuda_host.cuda_host_set_order(0)
    assert cuda_host.self_straddle(pointer(values[start:])) == 0


def test_shared_memory_is_poisoned_before_each_block(cuda_host):
    run_shift(cuda_host, 1, 0)
    assert run_shift(cuda_host, 0, 0)[0] == -1  # thread 0 reads what thread 1 has not written yet


@pytest.mark.parametrize("order", range(4))
def test_warp_functions(cuda_host, order):
    out = torch.zeros(64, 4, dtype=torch.float64)
    cuda_host.cuda_host_set_order(order)
    assert cuda_host.self_warp_functions(pointer(out)) == 0
    i = torch.arange(64)
    assert out[:, 0].long().tolist() == (i ^ 8).tolist()
    assert out[:, 1].long().tolist() == [int(k) + (int(k) % 16 != 15) for k in i]
    assert out[:, 2].long().tolist() == (i // 8 * 8 + 3).tolist()
    assert out[:, 3].tolist() == [1.0] * 64


def test_launches_that_a_gpu_would_refuse(cuda_host):
    assert cuda_host.self_bad_launch() == 1


def test_a_barrier_that_some_threads_miss_ends_the_process(cuda_host, run_python):
    code = f"import ctypes, torch; ctypes.CDLL({cuda_host._name!r}).self_stuck()"
    result = run_python("-c", code, check=False)
    assert result.returncode != 0 and "never come" in result.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_of_16_bit_types_are_torchs(cuda_host, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    wide = torch.empty(values.shape)
    kind = ctypes.c_int64(DTYPES.index(dtype))
    cuda_host.self_widen(kind, pointer(bits), pointer(wide), ctypes.c_int64(bits.numel()))
    assert torch.equal(wide.view(torch.int32)[~values.isnan()], values.float().view(torch.int32)[~values.isnan()])
    assert wide[values.isnan()].isnan().all()
    ulp = (values.float().nextafter(torch.tensor(float("inf"))) - values.float()).nan_to_num()
    tried = torch.cat([values.float() * (1 + k / 512) + j * ulp for k in range(-3, 4) for j in (-1, 0, 1)])
    narrow = torch.empty(tried.shape, dtype=torch.int16)
    cuda_host.self_narrow(kind, pointer(tried), pointer(narrow), ctypes.c_int64(tried.numel()))
    expected = tried.to(dtype)
    keep = ~expected.isnan()
    assert torch.equal(narrow[keep], expected.view(torch.int16)[keep])
    assert narrow.view(dtype)[~keep].isnan().all()


def test_without_a_compiler_there_is_no_library(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build() is None
    assert list(numbers([1, 2])) == [1, 2]


@pytest.mark.parametrize("source", sorted(CSRC.glob("*/*_cuda.cpp")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_the_bindings_compile_for_a_gpu(source):
    """As setup.py compiles them beside nvcc: with the headers' part for CUDA, and nothing newer than torch 2.10's."""
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++17", f"-I{CSRC}", "-fsyntax-only", "-Wall", "-Wextra", "-Wno-attributes", "-Werror", "-DUSE_CUDA"]
    flags += ["-DFUSED_OPS_CUDA_MAJOR=13", "-DFUSED_OPS_CUDA_OLDEST=75", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += ["-isystem", str(Path(torch.__file__).parent / "include")]
    result = subprocess.run([*compiler, *flags, str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:2000]


def test_exponentials_are_good_to_the_last_place(cuda_host):
    x = torch.linspace(-87, 88.5, 200_003, dtype=torch.float32)
    found = torch.empty_like(x)
    cuda_host.self_exp(pointer(x), pointer(found), ctypes.c_int64(x.numel()))
    exact = x.double().exp()
    _, exponent = torch.frexp(exact)
    assert ((found.double() - exact).abs() / torch.exp2(exponent.double() - 24)).max() < 0.7
    ends = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 89.5, -104.5, -103.9, -100.0])
    found = torch.empty_like(ends)
    cuda_host.self_exp(pointer(ends), pointer(found), ctypes.c_int64(ends.numel()))
    torch.testing.assert_close(found, ends.exp(), rtol=0, atol=1.5e-45, equal_nan=True)


@pytest.mark.parametrize("first", [0.3, 3000.7])
def test_sums_of_a_thread_keep_what_float_would_round_off(cuda_host, first):
    """Also where the first value, which the others are taken from, is far from them all."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1 << 17, generator=generator) * 2 + 1.1
    x[0] = first
    found = torch.empty(2, dtype=torch.float64)
    cuda_host.self_moments(pointer(x), ctypes.c_int64(x.numel()), pointer(found))
    exact = x.double() - x[0].double()
    for ours, truth in zip(found, (exact.sum(), exact.square().sum()), strict=True):
        assert abs(ours - truth) < 1e-8 * abs(truth)  # a float rounds by up to 6e-8 in each of 16384 additions
