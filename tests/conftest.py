"""What all tests share."""

import ctypes
import functools
import itertools
import os
import subprocess
import sys
import zlib
from pathlib import Path

import forks
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_flatten, tree_unflatten

import fused_ops
from fused_ops.core import library
from fused_ops.ops.linear_cross_entropy import graph as linear_graph

ROOT = Path(__file__).parent.parent
if os.environ.get("FUSED_OPS_SANITIZE"):
    assert "sanitize-" in fused_ops.__file__, f"not the build for the sanitizer: {fused_ops.__file__}"
NAMES = ROOT.parent / "shared" / "data" / "names.txt"


def pairwise(*axes):
    """As itertools.product, but so few that any two values of two axes just meet."""
    axes = [list(axis) for axis in axes]
    places = list(itertools.product(*(range(len(axis)) for axis in axes)))
    pairs = {place: set(itertools.combinations(enumerate(place), 2)) for place in places}
    left, chosen = set().union(*pairs.values()), []
    while left:
        chosen.append(max(places, key=lambda place: len(pairs[place] & left)))
        left -= pairs[chosen[-1]]
    return [tuple(axis[i] for axis, i in zip(axes, place, strict=True)) for place in sorted(chosen)]


def grid(**axes):
    """Parametrizes a test over the product of the axes; all but a pairwise choice of it is marked slow."""
    kept = pairwise(*axes.values())
    cases = [
        pytest.param(*case, marks=() if case in kept else pytest.mark.slow)
        for case in itertools.product(*axes.values())
    ]
    return pytest.mark.parametrize(list(axes), cases)


# Where one test goes through a grid itself: ``for case in choose(*axes)``.
pairs_or_all = pytest.mark.parametrize(
    "choose", [pytest.param(pairwise, id="pairs"), pytest.param(itertools.product, id="all", marks=pytest.mark.slow)]
)


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


def _memory(values):
    """The bytes of those tensors that are plain and small: what tells whether one was written to."""
    found = []
    for t in values:
        plain = type(t) in (torch.Tensor, torch.nn.Parameter) and t.is_cpu and t.layout is torch.strided
        plain = plain and 0 < t.numel() <= 1 << 16 and not t.is_neg()
        plain = plain and not torch._C._functorch.is_legacy_batchedtensor(t)
        plain = plain and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        if plain and t.untyped_storage().nbytes():
            with torch.no_grad():
                dense = t if t.is_contiguous() else t.detach().clone(memory_format=torch.contiguous_format)
            found.append(ctypes.string_at(dense.data_ptr(), dense.numel() * dense.element_size()))
        else:
            found.append(None)
    return found


@functools.cache
def leaves_its_arguments_alone(op, written=()):
    """The raw op, checked in each call: no argument may have changed but those in the places ``written``."""

    def call(*args):
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return op(*args)
        before = _memory(args)
        result = op(*args)
        for i, (a, b) in enumerate(zip(before, _memory(args), strict=True)):
            assert a == b or i in written, f"{op} changed argument {i}"
        return result

    return call


_ISA_FLAGS = {
    "DEFAULT": set(),
    "AVX2": {"avx2", "fma", "f16c"},
    "AVX512": {"avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512vl", "avx512bw"},
}


def peak_bytes(run):
    """The most that the call's tensors take at once, by the allocator's own count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def skip_without(isa):
    """Skips the test on a processor that lacks the instruction set: asked for all the same, its kernels would die."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    if not _ISA_FLAGS[isa.upper()] <= flags:
        pytest.skip(f"this processor has no {isa}, as far as /proc/cpuinfo says")


def raw_ops():
    """(module, name, raw op) of every raw op that a module of the package calls."""
    return _raw_ops(len(sys.modules))


@functools.lru_cache(1)
def _raw_ops(_):
    def op_of(value):
        if (
            isinstance(value, functools.partial) and value.args and hasattr(value.args[0], "schema")
        ):  # without_overrides
            value = getattr(torch.ops.fused_ops, value.args[0].schema().name.split("::")[1]).default
        return value if isinstance(value, torch._ops.OpOverload) and value.namespace == "fused_ops" else None

    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "fused_ops"]
    found = [(module, name, op_of(value)) for module in modules for name, value in vars(module).items()]
    return [entry for entry in found if entry[2] is not None]


@functools.cache
def _watched(op, serves=None):
    """The raw op, or what serves it instead, or a watch around it."""
    if op._schema.name == "fused_ops::linear_cross_entropy_buffer":
        return serves or op  # reads nothing
    arguments = op._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    return leaves_its_arguments_alone(serves or op, tuple(written))


@pytest.fixture
def heads_of_any_size(monkeypatch):
    """Small logits are put off too."""
    from fused_ops.conversion import head

    monkeypatch.setattr(head, "SMALL_BYTES", 0)


@pytest.fixture
def graphs_of_any_size(monkeypatch):
    """What is so small that the backend leaves it to PyTorch is fused too."""
    from fused_ops.conversion import backend_head, backend_norm

    for module in (backend_head, backend_norm):
        for limit in [limit for limit in vars(module) if limit.startswith("SMALL_")]:
            monkeypatch.setattr(module, limit, 0)


SLOW = {"built", "counted"}  # fixtures that take a minute: a build of the whole library, every kernel under valgrind
# Fixtures of processes of their own, and of what one process makes for many tests: those tests take longest.
LONG = {*SLOW, "cuda_host", "two_processes", "pure", "run_python", "run_pytest"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What takes a minute is slow; the longest come first, so that no process waits for another's last test."""
    seen = set()
    for item in items:
        if SLOW & set(item.fixturenames) or _is_left_out(item, seen):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not LONG & set(item.fixturenames))


# Files of many like cases: make test takes the first of each test and about one in so many, make test-all the others.
THINNED = {
    "batch_norm/test_activations.py": 2,
    "batch_norm/test_batch_norm.py": 2,
    "batch_norm/test_batch_norm_inplace.py": 2,
    "batch_norm/test_batch_norm_numerics.py": 2,
    "batch_norm/test_batch_norm_streaming.py": 3,
    "batch_norm/test_cuda_host_batch_norm.py": 3,
    "batch_norm/test_cuda_host_batch_norm_parts.py": 3,
    "batch_norm/test_cuda_host_kept_output.py": 3,
    "contracts/test_batch_norm_seams.py": 3,
    "contracts/test_cross_entropy_seams.py": 2,
    "contracts/test_devices_and_data.py": 2,
    "contracts/test_linear_cross_entropy_seams.py": 2,
    "contracts/test_opinfo.py": 2,
    "contracts/test_seams.py": 3,
    "conversion/test_backend.py": 2,
    "conversion/test_families.py": 2,
    "conversion/test_odd_models.py": 2,
    "cross_entropy/test_cross_entropy.py": 2,
    "cross_entropy/test_cross_entropy_numerics.py": 2,
    "cross_entropy/test_cross_entropy_options.py": 2,
    "cross_entropy/test_cross_entropy_simulated_shards.py": 2,
    "cross_entropy/test_cuda_host_cross_entropy.py": 3,
    "cross_entropy/test_cuda_host_cross_entropy_options.py": 3,
    "linear_cross_entropy/test_linear_cross_entropy.py": 2,
    "linear_cross_entropy/test_linear_cross_entropy_tiles.py": 2,
    "release/test_packaging.py": 2,
}


def _is_left_out(item, seen):
    """Whether a case of a thinned file is left to make test-all: by its name, so that no axis is in step with it."""
    one_in = THINNED.get("/".join(item.path.parts[-2:]))
    if one_in is None or item.get_closest_marker("slow"):
        return False
    test = item.nodeid.partition("[")[0]
    first = test not in seen
    seen.add(test)
    return not first and zlib.crc32(item.nodeid.encode()) % one_in != 0


@pytest.fixture(autouse=True)
def _no_input_is_changed(monkeypatch):
    """Around every raw op that any test's calls come to."""
    for module, name, op in raw_ops():
        monkeypatch.setattr(module, name, _watched(op))


@pytest.fixture(params=["kernels", "references"])
def served(request, monkeypatch):
    """Takes a test twice: on the kernels, and with plain PyTorch behind every raw op, as without the library."""
    for module, name, op in raw_ops() if request.param == "references" else ():
        monkeypatch.setattr(module, name, _watched(op, library.references[op]))


@pytest.fixture
def chunks_in_sight(monkeypatch):
    """Linear cross-entropy's chunk code outside of its opaque ops, for dispatch modes to see."""
    for name, inside in (("sum", "_sum"), ("rows", "_rows"), ("rows_grad", "_rows_grad")):
        monkeypatch.setattr(linear_graph, f"{name}_op", getattr(linear_graph, inside))
    monkeypatch.setattr("fused_ops.core.function.dispatch_modes", lambda: 0)  # as inside of an op


@pytest.fixture(autouse=True)
def _reproducible():
    """One thread (gradcheck is far slower with two), one seed and nothing compiled, whatever the tests before did.

    Dynamo counts recompilations by code object: the cases of one test share them, and so its limit.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # torch.manual_seed formats a traceback for each device that is not there: milliseconds a test
        torch.default_generator.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_python(tmp_path_factory):
    """Runs Python code or arguments in a process of its own, with changed environment variables."""

    def run(*arguments, cwd=None, check=True, timeout=900, **environment):
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        if forks.can(environment):
            result = forks.run(tmp_path_factory.mktemp("fork"), arguments, cwd, env, timeout)
        else:
            result = subprocess.run(
                [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
            )
        if check and result.returncode != 0:
            pytest.fail(f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}")
        return result

    return run


@pytest.fixture
def run_pytest(run_python):
    """Runs pytest in a process of its own, as ``run_python``."""
    return functools.partial(run_python, "-m", "pytest", "-q", "-p", "no:cacheprovider")


@pytest.fixture(scope="session")
def cuda_host():
    """The CUDA kernels, compiled for the CPU by the emulation in tests/cuda_host."""
    import cuda_host

    library = cuda_host.build()
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
