"""What all tests share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._pytree import tree_flatten, tree_unflatten

ROOT = Path(__file__).parent.parent
NAMES = ROOT.parent / "shared" / "data" / "names.txt"


def check_derivatives(function, sample):
    """gradcheck and gradgradcheck, forward and reverse, of a sample's tensors that require grad."""
    leaves, spec = tree_flatten((sample.args, sample.kwargs))
    checked = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]

    def f(*tensors):
        values = list(leaves)
        for i, tensor in zip(checked, tensors, strict=True):
            values[i] = tensor
        args, kwargs = tree_unflatten(values, spec)
        outputs = tree_flatten(function(*args, **kwargs))[0]
        return tuple(o for o in outputs if isinstance(o, torch.Tensor) and o.is_floating_point())

    inputs = tuple(leaves[i] for i in checked)
    assert gradcheck(f, inputs, check_forward_ad=True)
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.fixture(autouse=True)
def _reproducible():
    """One thread (gradcheck is far slower with two) and one seed, whatever the test before did."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_python():
    """Runs Python code or arguments in a process of its own, with changed environment variables."""

    def run(*arguments, cwd=None, check=True, timeout=300, **environment):
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        result = subprocess.run(
            [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
        )
        if check and result.returncode != 0:
            pytest.fail(f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}")
        return result

    return run


@pytest.fixture(scope="session")
def cuda_host(tmp_path_factory):
    """The CUDA kernels, compiled once for the CPU by the emulation in tests/cuda_host."""
    import cuda_host

    library = cuda_host.build(tmp_path_factory.mktemp("cuda_host"))
    if library is None:
        pytest.skip("no C++ compiler to build the CUDA kernels for the CPU with")
    return library


@pytest.fixture(scope="session")
def host_ops(cuda_host):
    """The raw ops of the CUDA bindings on the CPU, by name."""
    from cuda_host import OPS, define_ops

    library = define_ops()
    yield {name: getattr(torch.ops.fused_ops_host, name).default for names in OPS.values() for name in names}
    library._destroy()
