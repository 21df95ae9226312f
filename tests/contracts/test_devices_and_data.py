"""Every tensor argument of every op: on one device, strided and with its data in memory, or a clear error before
anything is read or written.

The cases come from the registered schemas and from recorded calls, so a new op is covered when it is registered. The
public functions are held to the same, forward and backward.
"""

import functools
import math
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT
from test_raw_ops import valid_calls
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_ops
from fused_ops.testing import op_names

NOT_ALLOCATED = "non-zero number of elements, but its data is not allocated yet"
OTHER_DEVICE = "Expected all tensors to be on the same device, but found at least two devices"
OF_THE_CPU = ("numbers", "place")
NATIVE = fused_ops.core.library.missing_reason is None


def freed(t):
    """A copy whose storage was freed, as sharded training does between uses; it does not start where that does."""
    whole = torch.cat([t.detach().reshape(-1)[:1], t.detach().reshape(-1)])
    return free(whole[1:].view(t.shape)).requires_grad_(t.requires_grad)


def free(t):
    with torch.no_grad():
        t.untyped_storage().resize_(0)
    return t


def shrunk(t):
    """A copy whose storage lacks its last byte."""
    t = t.detach().clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() - 1)
    return t


def raw_ops():
    names = [name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fused_ops::")]
    return sorted({*names} - {"cpu_isa"})


def tensor_arguments(name):
    schema = getattr(torch.ops.fused_ops, name).default._schema
    return [(i, a.name) for i, a in enumerate(schema.arguments) if "Tensor" in str(a.type)]


ARGUMENTS = [(op, i, name) for op in raw_ops() for i, name in tensor_arguments(op)]


@pytest.fixture(scope="module", autouse=True)
def group_of_one():
    """What ops that name a process group find: the group of all ranks, which has one."""
    if dist.is_available():
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    if dist.is_available():
        dist.destroy_process_group()


def over_ranks(x, indices, doubles):
    """The same of what speaks to a process group, or is one rank's share."""
    rows, classes = 4, 6
    group, numbers = dist.group.WORLD.group_name, (-100, 0.1, 0.7, 5.0, True)
    one, place = torch.ones((), dtype=torch.float64), torch.tensor([0, classes])
    names = ("gather_of_ranks", "sum_of_ranks", "sum_of_shares", "copy_to_shares")
    found = {name: [(x, group, 1)] for name in names}
    found["reduce_over_ranks"] = [(x, group, False), (x, group, True)]
    found |= {name: [(x, group, [rows])] for name in ("gather_rows", "scatter_rows")}
    found["cross_entropy_rows_of_ranks"] = [(one, one * math.nan, [group], [1])]
    found |= {name: [(x, rows, group, 1)] for name in ("gather_all_rows", "scatter_all_rows")}
    found |= {f"cross_entropy_shard{name}": [] for name in ("", "_grad", "_forward", "_backward")}
    for side in ((indices, None), (None, torch.rand(rows, classes))):
        a = (torch.randn(rows, classes), *side, torch.rand(classes), torch.ones(classes).bool())
        tensors = one.new_tensor(numbers[1:4])
        found["cross_entropy_shard_forward"].append((*a, one, 0, classes, *numbers))
        found["cross_entropy_shard_backward"].append((*doubles[:4], *a, one, *doubles[:6], 0, classes, *numbers))
        found["cross_entropy_shard"].append((*a, place, -100, tensors, True, group, 1))
        results = (*doubles[:5], indices, *doubles[:3], one)
        needs = 1 + 4 + (2 if side[1] is not None else 0)
        found["cross_entropy_shard_grad"].append((*doubles[:4], *a, place, *results, -100, tensors, True, group, needs))
    return found


@functools.cache
def recorded():
    """Op -> valid lists of arguments."""
    found = {}
    for function, args, _ in valid_calls(op_names()):
        found.setdefault(function._schema.name.split("::")[1], []).append(args)
    found["linear_cross_entropy_buffer"] = [(torch.randn(3), 2, 3)]
    found["linear_cross_entropy_rescale_"] = [(torch.randn(2, 3), torch.rand(()))]
    found["cross_entropy_scale_gradient"] = [(torch.randn(2, 3), torch.rand(()), torch.tensor([0, 2]), -100)]
    rows, classes = 4, 6
    head = [torch.randn(s) for s in ((rows, 3), (classes, 3), (classes,))]
    indices = torch.randint(0, classes, (rows,))
    low, mask = (torch.randn(rows, 2), torch.randn(classes, 2)), torch.ones(classes).bool()
    sides = ((indices, None), (None, torch.rand(rows, classes)))
    doubles, cut = [torch.rand(rows, dtype=torch.float64) for _ in range(7)], (1, 2, None)
    tensors = [(*head, *low, *side, torch.rand(classes), mask) for side in sides]
    found["linear_cross_entropy"] += [(*t, doubles[0], -100, None, *cut, 31, False) for t in tensors]
    found["linear_cross_entropy_rows"] += [(*t, -100, None, *cut, True) for t in tensors]
    found["linear_cross_entropy_rows_grad"] += [
        (*doubles[:4], *t, *doubles[4:], -100, None, *cut, True, 31) for t in tensors
    ]
    for name in ("batch_norm_write_statistics", "batch_norm_write_statistics_silently"):
        found[name] = [tuple(torch.rand(3) for _ in range(4))]
    found |= over_ranks(head[0], indices, doubles)
    for name in raw_ops():  # what overwrites an argument takes what its twin takes
        if name.endswith("_") and name[:-1] in found:
            found.setdefault(name, []).extend(found[name[:-1]])
    where = (torch.tensor([0, classes]), dist.group.WORLD.group_name, 1)
    for t in tensors:
        settings, results = (-100, torch.tensor([0.1, 0.7, 5.0, 0.1]).double(), *cut), (*doubles[:5], indices)
        args = (*t, doubles[0], *settings, 31, False, *where)
        found.setdefault("linear_cross_entropy_shard", []).append(args)
        found.setdefault("linear_cross_entropy_shard_rows", []).append((*t, *settings, True, *where, None))
        found["linear_cross_entropy_shard_rows"].append((*t, *settings, True, *where, torch.zeros(classes, 3)))
        args = (*doubles[:4], *t, *results, *doubles[:3], doubles[0].new_ones(()), *settings, True, 31, *where)
        found.setdefault("linear_cross_entropy_shard_rows_grad", []).append(args)
        found.setdefault("linear_cross_entropy_shard_rows_grad_to", []).append((*args, torch.zeros(classes, 3)))
        args = (*doubles[:4], *t, *doubles[4:], *settings, True, 31, torch.zeros(classes, 3))
        found.setdefault("linear_cross_entropy_rows_grad_to", []).append(args)
    rows = found["cross_entropy_rows_forward"]
    found["linear_cross_entropy_chunk_"] += [(*args[:5], None, 0.0, *args[5:]) for args in rows]
    found.setdefault("linear_cross_entropy_small", []).append((*head, indices, -100, 1, 7))
    return found


def call_with(op, index):
    """(function, arguments), the tensor at the place ``index`` among them; copied."""
    for args in recorded().get(op, []):
        if index < len(args) and isinstance(args[index], torch.Tensor) and args[index].numel():
            copies = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
            return getattr(torch.ops.fused_ops, op).default, copies
    at_place = [args[index] for args in recorded().get(op, []) if index < len(args)]
    if not NATIVE and (not at_place or any(isinstance(value, torch.Tensor) for value in at_place)):
        pytest.skip("empty where the reference runs")
    pytest.fail(f"no recorded call of {op} gives its argument {index}")


def served(function, by):
    """The op as the CPU serves it, or its reference."""
    if by == "reference":
        return functools.partial(function._op_dk, torch._C.DispatchKey.CompositeExplicitAutograd)
    return function


def refused(function, args, error, message, name):
    """Raises with the argument's name and no path, and changes nothing."""
    whole = [(t, t.clone()) for t in args if isinstance(t, torch.Tensor) and has_values(t)]
    with pytest.raises(error, match=message) as caught:
        function(*args)
    said = str(caught.value)
    assert name in said and "API call failed" not in said and "/" not in said.replace("compile/export/fx", ""), said
    assert all(torch.equal(t, before) or t.isnan().any() for t, before in whole)


def has_values(t):
    return t.device.type == "cpu" and t.layout == torch.strided and t.untyped_storage().nbytes() > 0


SERVED = [pytest.param("kernel", marks=pytest.mark.skipif(not NATIVE, reason="no library")), "reference"]
each_argument = pytest.mark.parametrize(("op", "index", "name"), ARGUMENTS, ids=[f"{o}-{n}" for o, _, n in ARGUMENTS])


@pytest.mark.parametrize("by", SERVED)
@each_argument
def test_data_that_is_not_there(op, index, name, by):
    function, args = call_with(op, index)
    for lacking in (freed, shrunk):
        given = [*args]
        given[index] = lacking(args[index])
        if lacking is shrunk:  # nothing but the op may read it
            with pytest.raises(RuntimeError, match=f"{name}: .*{NOT_ALLOCATED}"):
                served(function, by)(*given)
        else:
            refused(served(function, by), given, RuntimeError, NOT_ALLOCATED, f"{name}:")


@each_argument
def test_another_device(op, index, name):
    function, args = call_with(op, index)
    others = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and i != index]
    if not others:
        return
    given = [*args]
    given[index] = args[index].to("meta")
    refused(function, given, RuntimeError, OTHER_DEVICE, "argument")
    if name in OF_THE_CPU:  # are on the CPU, wherever the others are
        return
    given = [a.to("meta") if i in others else a for i, a in enumerate(args)]
    refused(function, given, RuntimeError, OTHER_DEVICE, "argument")


@each_argument
def test_another_layout(op, index, name):
    function, args = call_with(op, index)
    if args[index].dim() == 0:
        return
    args[index] = args[index].to_sparse()
    refused(function, args, NotImplementedError, "torch.strided, got torch.sparse_coo", name)


@pytest.mark.parametrize("op", raw_ops())
def test_one_device_that_has_no_data(op):
    """All on the meta device, and all on a GPU that FakeTensorMode imitates: shapes, on that device."""
    index = tensor_arguments(op)[-1][0] if tensor_arguments(op) else None
    index = next(i for i, _ in tensor_arguments(op) if any(isinstance(a[i], torch.Tensor) for a in recorded()[op]))
    function, args = call_with(op, index)
    tensors = [(i, n) for i, n in tensor_arguments(op) if i < len(args) and isinstance(args[i], torch.Tensor)]
    moved = [i for i, name in tensors if name not in OF_THE_CPU]
    if op != "batch_norm_keep":  # whose size depends on the data
        check_results(function(*(a.to("meta") if i in moved else a for i, a in enumerate(args))), "meta")
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        for i in moved:
            a = fake[i]
            fake[i] = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda")
        if op != "batch_norm_keep":
            check_results(function(*fake), "cuda")
        if len(moved) > 1:
            fake[moved[-1]] = mode.from_tensor(args[moved[-1]])
            with pytest.raises(RuntimeError, match=OTHER_DEVICE):
                function(*fake)


def check_results(results, device):
    results = results if isinstance(results, (tuple, list)) else (results,)
    assert all(r.device.type == device for r in results if isinstance(r, torch.Tensor))


# ---- public functions


def draw(*shape, dtype=torch.float32, grad=True):
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def classes(rows=8, n=5):
    return torch.randint(0, n, (rows,))


def cross_entropies():
    ce, x = fused_ops.cross_entropy, functools.partial(draw, 8, 5)
    p = torch.rand(8, 5).softmax(1)
    yield "small", ce, {"input": x(), "target": classes()}
    yield "float64", ce, {"input": x(dtype=torch.float64), "target": classes()}
    yield "no gradient", ce, {"input": x(grad=False), "target": classes()}
    yield "each row", ce, {"input": x(), "target": classes(), "reduction": "none"}
    yield (
        "in place",
        lambda input, **k: ce(input.view_as(input), inplace_backward=True, **k),
        {"input": x(), "target": classes()},
    )
    options = {"weight": torch.rand(5), "class_mask": torch.ones(5).bool(), "token_weight": torch.rand(8)}
    yield "options", ce, {"input": x(), "target": classes(), **options, "normalizer": torch.tensor(3.0), "z_loss": 0.1}
    yield "all outputs", lambda **k: ce(**k, return_outputs=True).loss, {"input": x(), "target": classes()}
    yield "probabilities", ce, {"input": x(), "target": p.clone().requires_grad_(), "weight": torch.rand(5)}
    yield "promoted", ce, {"input": x(), "target": p.double()}
    pair = lambda indices, probabilities, **k: ce(target=(indices, probabilities), **k)  # noqa: E731
    yield "sparse", pair, {"input": x(), "indices": torch.randint(0, 5, (8, 2)), "probabilities": torch.rand(8, 2)}
    mixup = lambda a, b, lam, **k: ce(target=(a, b, lam), **k)  # noqa: E731
    yield "mixup", mixup, {"input": x(), "a": classes(), "b": classes(), "lam": torch.rand(8)}


def linear_cross_entropies():
    lce = fused_ops.linear_cross_entropy

    def head(rows=8, features=3, n=5, dtype=torch.float32):
        matrices = {"input": draw(rows, features, dtype=dtype), "linear_weight": draw(n, features, dtype=dtype)}
        return {**matrices, "linear_bias": draw(n, dtype=dtype), "target": classes(rows, n)}

    yield "small", lce, head()
    yield "small rows", lce, {**head(), "reduction": "none"}
    yield "small float16", lce, head(dtype=torch.float16)
    options = {"weight": torch.rand(5), "class_mask": torch.ones(5).bool(), "token_weight": torch.rand(8)}
    yield "options", lce, {**head(), **options, "normalizer": torch.tensor(3.0)}
    yield "options, chunks", lce, {**head(), **options, "normalizer": torch.tensor(3.0), "chunk_rows": 3}
    yield "rows, chunks", lce, {**head(), "reduction": "none", "chunk_rows": 3}
    yield "tiles", lce, {**head(7, 3, 40), "max_memory_bytes": 200}
    yield "bfloat16 tiles", lce, {**head(7, 3, 40, torch.bfloat16), "max_memory_bytes": 200}
    adapted = lambda a, b, **k: lce(**k, lora=(a, b, 2.0))  # noqa: E731
    yield "lora", adapted, {**head(), "a": draw(2, 3), "b": draw(5, 2), "chunk_rows": 3}
    shifted = {"input": draw(2, 4, 3), "linear_weight": draw(5, 3), "target": classes(8).view(2, 4)}
    yield "shift", lce, {**shifted, "shift": True}
    p = torch.rand(8, 5).softmax(1).requires_grad_()
    yield "probabilities", lce, {**head(), "target": p, "chunk_rows": 3}


def batch_norms():
    bn = fused_ops.batch_norm

    def call(*shape, dtype=torch.float32, statistics=True):
        c = shape[1]
        running = {"running_mean": torch.zeros(c), "running_var": torch.ones(c)} if statistics else {}
        given = {"input": draw(*shape, dtype=dtype), **({"running_mean": None, "running_var": None} | running)}
        return {**given, "weight": draw(c), "bias": draw(c), "training": True}

    yield "training", bn, call(8, 3)
    yield "evaluation", bn, {**call(8, 3), "training": False}
    yield "no statistics", bn, call(4, 3, 9, 9, statistics=False)
    yield "bfloat16", bn, call(8, 3, 5, dtype=torch.bfloat16)
    yield "relu", bn, {**call(8, 3), "activation": "relu"}
    yield "residual", bn, {**call(8, 3), "activation": "relu", "residual": draw(8, 3)}
    yield "residual, gelu", bn, {**call(8, 3), "activation": "gelu", "residual": draw(8, 3)}
    yield "valid", bn, {**call(8, 3, 4), "valid": torch.rand(8, 4) > 0.3}
    yield "lengths", bn, {**call(8, 3, 4), "valid": torch.randint(1, 5, (8,))}
    yield "ghost batches", bn, {**call(8, 3), "groups": 2}
    yield "output kept", bn, {**call(8, 3), "activation": "leaky_relu", "inplace_activated": True}


def public_calls():
    torch.manual_seed(0)
    makers = {"ce": cross_entropies, "lce": linear_cross_entropies, "bn": batch_norms}
    return {f"{kind} {name}": (f, k) for kind, make in makers.items() for name, f, k in make()}


CALLS = [(name, a) for name, (_, k) in public_calls().items() for a, v in k.items() if isinstance(v, torch.Tensor)]
each_public_argument = pytest.mark.parametrize(("call", "argument"), CALLS, ids=[f"{c}-{a}" for c, a in CALLS])


@each_public_argument
def test_public_data_that_is_not_there(call, argument):
    function, given = public_calls()[call]
    whole = {k: (v, v.detach().clone()) for k, v in given.items() if isinstance(v, torch.Tensor) and k != argument}
    given[argument] = freed(given[argument])
    with pytest.raises(RuntimeError, match="is not allocated"):
        function(**given)
    assert all(torch.equal(t, before) for t, before in whole.values())


@each_public_argument
def test_public_other_device(call, argument):
    function, given = public_calls()[call]
    whole = {k: (v, v.detach().clone()) for k, v in given.items() if isinstance(v, torch.Tensor) and k != argument}
    given[argument] = given[argument].detach().to("meta").requires_grad_(given[argument].requires_grad)
    with pytest.raises(RuntimeError, match="same device"):
        function(**given)
    assert all(torch.equal(t, before) for t, before in whole.values())


def gradients(function, given, between=lambda given: None, create_graph=False, upstream=torch.ones_like):
    leaves = [v for v in given.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    output = function(**given)
    between(given)
    return torch.autograd.grad(output, leaves, upstream(output), create_graph=create_graph)


@pytest.mark.parametrize("create_graph", [False, True])
@each_public_argument
def test_data_freed_between_forward_and_backward(call, argument, create_graph):
    """The error, or the right gradients where the backward does not need it."""
    function, given = public_calls()[call]
    if not any(isinstance(v, torch.Tensor) and v.requires_grad for v in given.values()):
        return
    if create_graph and "in place" in call:
        return  # refused
    expected = gradients(function, given)
    function, given = public_calls()[call]
    try:
        found = gradients(function, given, lambda given: free(given[argument]), create_graph)
    except RuntimeError as error:
        assert "is not allocated" in str(error) or "out of bounds for storage" in str(error), error
    else:
        for mine, right in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("call", public_calls())
def test_freed_upstream_gradient(call, create_graph):
    """Where the last operation is ours; where it is a cast or quotient of PyTorch's, that reads the gradient first."""
    function, given = public_calls()[call]
    output = function(**given)
    if not output.requires_grad or "Function" not in output.grad_fn.name() or (create_graph and "in place" in call):
        return
    leaves = [v for v in given.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    with pytest.raises(RuntimeError, match="is not allocated"):
        torch.autograd.grad(output, leaves, freed(torch.ones_like(output)), create_graph=create_graph)


@pytest.mark.parametrize("argument", ["input", "weight"])
@pytest.mark.parametrize(
    "call", ["ce small", "ce each row", "bn training", "bn evaluation", "bn relu", "bn residual, gelu"]
)
def test_data_freed_before_a_second_derivative(call, argument):
    function, given = public_calls()[call]
    if argument not in given:
        return
    first = gradients(function, given, create_graph=True, upstream=torch.randn_like)
    free(given[argument])
    with pytest.raises(RuntimeError, match="is not allocated"):
        torch.autograd.grad(first[0], given["input"], torch.ones_like(first[0]))


@pytest.mark.parametrize("which", ["running_mean", "running_var"])
@pytest.mark.parametrize("more", [{}, {"activation": "silu"}, {"groups": 2}, {"inplace_activated": True}], ids=str)
def test_expanded_running_statistics(which, more):
    """Written in training: an error, and neither of them is changed. Read in evaluation."""
    running = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    running[which] = running[which][:1].expand(3)
    x = torch.randn(8, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor refers to a single memory"):
        fused_ops.batch_norm(x, **running, training=True, **more)
    assert running["running_mean"].eq(0).all() and running["running_var"].eq(1).all()
    found = fused_ops.batch_norm(x, **running, training=False)
    torch.testing.assert_close(found, F.batch_norm(x, **running))


OTHER_LAYOUTS = {
    "sparse": torch.Tensor.to_sparse,
    "sparse_csr": torch.Tensor.to_sparse_csr,
    "mkldnn": torch.Tensor.to_mkldnn,
}


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
@pytest.mark.parametrize("call", public_calls())
def test_layouts_that_no_kernel_takes(call, layout):
    function, given = public_calls()[call]
    x = given["input"]
    if (x.dim() != 2 and layout == "sparse_csr") or call == "ce in place":
        return
    if layout == "mkldnn" and (
        x.dtype != torch.float32 or call in ("bn training", "bn evaluation", "bn no statistics")
    ):
        return  # PyTorch's own op takes these
    given["input"] = OTHER_LAYOUTS[layout](x.detach())
    with pytest.raises(NotImplementedError, match=r"torch\.strided"):
        function(**given)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_an_mkldnn_tensor_is_that_of_pytorch(training):
    x = torch.randn(4, 3, 5, 5)
    given, own = ([torch.zeros(3), torch.ones(3), torch.rand(3), torch.rand(3), training] for _ in range(2))
    own[2:4] = given[2:4]
    found = fused_ops.batch_norm(x.to_mkldnn(), *given)
    expected = F.batch_norm(x.to_mkldnn(), *own)
    assert found.is_mkldnn
    torch.testing.assert_close(found.to_dense(), expected.to_dense())
    torch.testing.assert_close(given[:2], own[:2])


@pytest.mark.skipif(not NATIVE, reason="there is a library without the library")
def test_failures_of_pytorch_say_why():
    with pytest.raises(RuntimeError, match=r"llocat|memory|stderr") as caught:
        torch.ops.fused_ops.linear_cross_entropy_buffer(torch.ones(3), 2**40, 2**10)
    assert "API call failed" not in str(caught.value) and ".h" not in str(caught.value)


@pytest.mark.skipif(not NATIVE, reason="this is that run")
@pytest.mark.slow
@pytest.mark.parametrize("some", ["another_device", "not another_device"])
def test_without_the_library(some, tmp_path, run_pytest):
    """The same with the references alone, in a copy of the package that has no library."""
    shutil.copytree(ROOT / "fused_ops", tmp_path / "fused_ops", ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    run_pytest(__file__, "-k", some, cwd=tmp_path, PYTHONPATH=str(tmp_path), PYTHONWARNINGS="ignore")
