"""torch.compile(model, backend="fused_ops"): what Dynamo's graph is made of, against the same model run eagerly."""

import contextlib
import copy
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fused_ops.conversion.records import GRAPHS

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def fresh(graphs_of_any_size):
    """Everything is worth it, and nothing is counted before."""
    GRAPHS.clear()
    torch.manual_seed(0)


class Net(nn.Module):
    """Modules, and a forward to be filled in."""

    def __init__(self, forward):
        super().__init__()
        self.bn, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv, self.relu = nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)
        self.head, self.biased = nn.Linear(8, 50, bias=False), nn.Linear(8, 50)
        self.extra = nn.Parameter(torch.randn(1, 50))
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.steps, self.cap = 0, 30.0
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        for bn in (self.bn, self.bn2):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.uniform_(bn.bias, -0.5, 0.5)
            bn.running_mean.uniform_(-0.1, 0.1)
        self.body = forward

    def forward(self, *inputs):
        return self.body(self, *inputs)


def run(model, call, inputs, mode=contextlib.nullcontext):
    """Everything that comes out of a step: results, gradients, buffers."""
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x.clone() for x in inputs]
    torch.manual_seed(1)
    with mode():
        outputs = [t for t in tree_leaves(call(*inputs)) if isinstance(t, torch.Tensor)]
    loss = sum(
        (t * torch.linspace(-1, 1, t.numel(), dtype=torch.float64).view(t.shape)).sum() for t in outputs if t.dim()
    )
    loss = loss + sum(t.double() for t in outputs if not t.dim())
    if loss.requires_grad:
        loss.backward()
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    found |= {f"gradient of input {i}": x.grad for i, x in enumerate(inputs)}
    found |= {f"input {i}": x.detach() for i, x in enumerate(inputs)}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return found | {name: b.detach() for name, b in model.named_buffers()}


def compare(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
            continue
        torch.testing.assert_close(found[name], value, msg=lambda m, name=name: f"{name}: {m}", **tolerance)
        if name.startswith("output"):
            assert found[name].stride() == value.stride(), name


def fused(options=None, **more):
    return lambda model: torch.compile(model, backend="fused_ops", options=options, **more)


def check(forward, *inputs, training=True, compile=None, mode=contextlib.nullcontext, dtype=torch.float64, **tolerance):
    """A step of the model and of its compiled copy; returns what the backend noted."""
    model = Net(forward).to(dtype).train(training)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    other = copy.deepcopy(model)
    expected = run(model, model, inputs, mode)
    compare(run(other, (compile or fused())(other), inputs, mode), expected, **tolerance)
    assert other.steps == model.steps
    ran = [graph for graph in GRAPHS if graph.calls]
    assert sum(graph.calls for graph in ran) >= 1
    return dict(sum((g.fused for g in ran), start=type(ran[0].fused)())), dict(
        sum((g.left for g in ran), start=type(ran[0].left)())
    )


def image(batch=3, channels=4):
    return torch.randn(batch, channels, 5, 6)


# ---- batch norm


def block(s, x):
    y = s.bn(s.conv(x))
    y += x
    return s.relu(y)


FUSED = {
    "relu": (lambda s, x: s.relu(s.bn(s.conv(x))), {"batch_norm + relu": 1}),
    "residual": (block, {"batch_norm + add + relu": 1}),
    "no activation": (lambda s, x: torch.add(x, s.bn(s.conv(x))), {"batch_norm + add": 1}),
    "alone": (lambda s, x: s.conv(s.bn(x)), {"batch_norm": 1}),
    "identity": (lambda s, x: F.silu(nn.Identity()(s.bn(x)), inplace=True), {"batch_norm + silu": 1}),
    "methods": (
        lambda s, x: s.bn(x).add_(x).sigmoid() + s.bn2(x).tanh(),
        {"batch_norm + add + sigmoid": 1, "batch_norm + tanh": 1},
    ),
    "numbers": (
        lambda s, x: F.leaky_relu(s.bn(x), 0.3) + F.elu(s.bn2(x), alpha=0.7),
        {"batch_norm + leaky_relu": 1, "batch_norm + elu": 1},
    ),
    "others": (
        lambda s, x: F.gelu(s.bn(x)).sum() + F.hardswish(s.bn2(x)).sum(),
        {"batch_norm + gelu": 1, "batch_norm + hardswish": 1},
    ),
    "two sums": (lambda s, x: s.relu(s.bn(x) + s.bn2(2 * x)), {"batch_norm": 1, "batch_norm + add + relu": 1}),
    "one for both": (lambda s, x: s.relu(s.bn(x) + s.bn(2 * x)), {"batch_norm": 1, "batch_norm + add + relu": 1}),
    "shortcut between": (
        lambda s, x: s.relu(s.bn(s.conv(x)) + F.avg_pool2d(F.dropout(x, 0.5), 3, 1, 1)),
        {"batch_norm + add + relu": 1},
    ),
    "transposed": (lambda s, x: s.relu(s.bn(x.transpose(2, 3))), {"batch_norm + relu": 1}),
    "sliced": (
        lambda s, x: s.relu(s.bn(torch.cat((x, x), 1).contiguous(memory_format=LAST)[:, ::2])),
        {"batch_norm + relu": 1},
    ),
    "one dimension": (lambda s, x: F.relu(s.bn(x)).mean((2, 3)), {"batch_norm + relu": 1}),
    "dtype": (lambda s, x: F.relu(s.bn(x.float()) if x.dtype == torch.float32 else s.bn(x)), {"batch_norm + relu": 1}),
}


@pytest.mark.parametrize("name", FUSED)
def test_batch_norm_is_fused_with_what_follows(name):
    forward, expected = FUSED[name]
    found, _ = check(forward, image())
    assert found == expected


@pytest.mark.parametrize("name", ["residual", "two sums", "sliced"])
def test_in_evaluation(name):
    forward, expected = FUSED[name]
    assert check(forward, image(), training=False)[0] == expected


def test_without_gradients():
    assert check(block, image(), mode=torch.no_grad)[0] == {"batch_norm + add + relu": 1}


def test_channels_last():
    found, _ = check(block, image().to(memory_format=LAST))
    assert found == {"batch_norm + add + relu": 1}


def test_dynamic_shapes():
    model = Net(block)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="fused_ops", dynamic=True)
    for batch in (3, 5, 7):
        x = image(batch)
        compare(run(other, compiled, [x]), run(model, model, [x]), rtol=1e-4, atol=1e-4)
    ran = [graph for graph in GRAPHS if graph.calls]
    assert [(graph.fused, graph.calls) for graph in ran] == [({"batch_norm + add + relu": 1}, 3)]


def test_autocast():
    def mode():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    found, _ = check(block, image(), mode=mode, dtype=torch.float32, rtol=3e-2, atol=3e-2)
    assert found == {"batch_norm": 1}  # a sum of bfloat16 and float32
    found, _ = check(FUSED["relu"][0], image(), mode=mode, dtype=torch.float32, rtol=3e-2, atol=3e-2)
    assert found["batch_norm + relu"] == 1


def write_residual(s, x):
    y, r = s.bn(s.conv(x)), x * 2
    z = y + r
    r.add_(1)
    return F.silu(z) + r


def write_view(s, x):
    r = x * 2
    y = s.bn(r)
    r[0].mul_(2)
    return F.relu(y) + r


def write_bias(s, x):
    y = s.bn(x)
    with torch.no_grad():
        s.bn.bias.add_(1)
    return F.relu(y)


def write_by_setitem(s, x):
    r = x.clone()
    y = s.bn(r)
    r[:, 0] = 0
    return F.relu(y + r)


def write_out(s, x):
    r = x.detach().clone()
    y = s.bn(r)
    torch.add(r, 1, out=r)
    return F.relu(y)


def other_alias(s, x):
    r = x * 2
    flat = r.view(-1)
    y = s.bn(r)
    F.relu(flat, inplace=True)
    return F.relu(y)


def read_statistics(s, x):
    y = s.bn(x)
    mean = s.bn.running_mean.sum()
    return F.relu(y) * mean


def same_statistics(s, x):
    y, z = s.bn(x), s.bn(x * 2)
    return F.relu(y) + z.sum()


def leave_autocast(s, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = s.bn(s.conv(x))
    return F.relu(y)


def leave_no_grad(s, x):
    with torch.no_grad():
        y = s.bn(x)
    return F.relu(y) * x


def seed_between(s, x):
    y = s.bn(x)
    r = F.dropout(x, 0.5)
    return F.relu(y) + r


def write_residual_later(s, x):
    r = x * 2
    y = F.silu(s.bn(x) + r)
    r.add_(1)
    return y + r


def write_bias_later(s, x):
    y = F.relu(s.bn(x))
    with torch.no_grad():
        s.bn.bias.add_(1)
    return y


NOT_MOVED = {
    "a residual is written": (write_residual, "add_ writes to what it reads in between"),
    "a view of the input is written": (write_view, "mul_ writes to what it reads in between"),
    "a saved residual is written later": (write_residual_later, "add_ writes later"),
    "a saved bias is written later": (write_bias_later, "add_ writes later"),
    "the bias is written": (write_bias, "_set_grad_enabled lies in between"),
    "an item is set": (write_by_setitem, "setitem writes to what it reads in between"),
    "out=": (write_out, "add writes to what it reads in between"),
    "another alias is written": (other_alias, "relu writes to what it reads in between"),
    "the statistics are read": (read_statistics, "sum uses its running statistics in between"),
    "the statistics are used again": (same_statistics, "writes to what it reads in between"),
    "autocast ends": (leave_autocast, "_exit_autocast lies in between"),
    "no_grad ends": (leave_no_grad, "_set_grad_enabled lies in between"),
    "used twice": (lambda s, x: F.relu(y := s.bn(x)) + y, "its result is used more than once"),
    "memory format": (lambda s, x: F.relu(s.bn(x.contiguous(memory_format=LAST)) + x), "has another memory format"),
    "broadcast": (lambda s, x: F.relu(s.bn(x) + x[:1]), "has another shape or dtype"),
    "to a tensor in place": (lambda s, x: F.relu((x * 1).add_(s.bn(x))), "is added to a tensor in place"),
    "gelu of tanh": (lambda s, x: F.gelu(s.bn(x), approximate="tanh"), "not with gelu"),
}


@pytest.mark.parametrize("name", NOT_MOVED)
def test_nothing_is_moved_over_what_it_depends_on(name):
    forward, reason = NOT_MOVED[name]
    dtype = torch.float32 if "autocast" in name else torch.float64
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if "autocast" in name else {}
    if "of the input" in name or name in ("an item is set", "out=", "another alias is written"):
        tolerance["mode"] = torch.no_grad  # autograd refuses it
    found, left = check(forward, image(), dtype=dtype, **tolerance)
    assert any(reason in text for text in left), left
    assert set(found) == ({"batch_norm + add"} if "residual" in name else {"batch_norm"})


def test_inputs_that_share_memory():
    def inner(s, base, part):
        y = s.bn(base)
        part.add_(1)
        return F.relu(y)

    def outer(s, x):
        base = x * 2
        part = base[0]
        torch._dynamo.graph_break()
        return inner(s, base, part)

    found, left = check(outer, image(), mode=torch.no_grad)
    assert found == {"batch_norm": 1}
    assert any("add_ writes" in reason for reason in left)


def test_pytorchs_batch_norm_on_the_same_statistics():
    """It saves them for its backward, before ours writes them."""

    @torch.compiler.disable
    def outside(s, x):
        return s.bn(x)

    def forward(s, x):
        return outside(s, x) + F.relu(s.bn(x * 2))

    assert check(forward, image())[0] == {"batch_norm + relu": 1}


def test_side_effects_and_graph_breaks():
    def forward(s, x):
        s.steps += 1
        s.seen.add_(2)
        y = F.relu(s.bn(x))
        torch._dynamo.graph_break()
        s.steps += 1
        return {"y": y, "z": F.relu(s.bn2(y)), "steps": s.steps}

    found, _ = check(forward, image())
    assert found == {"batch_norm + relu": 2}
    assert len([graph for graph in GRAPHS if graph.calls]) == 2


def test_a_gradient_inside_of_the_forward():
    """Its backward runs where Dynamo is at work."""

    def forward(s, x):
        y = F.relu(s.bn(s.conv(x)))
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return y, slope.square().sum()

    assert check(forward, image())[0] == {"batch_norm + relu": 1}


def test_frozen_and_without_statistics():
    def forward(s, x):
        y = F.batch_norm(x, s.bn.running_mean, s.bn.running_var, s.bn.weight, s.bn.bias)
        return F.relu(y) + F.relu(F.batch_norm(x, None, None, training=True))

    assert check(forward, image())[0] == {"batch_norm + relu": 2}


def test_frozen_with_statistics_that_are_written_later():
    """PyTorch's gradient is then of other statistics than its result, and stays so."""

    def forward(s, x):
        frozen = F.batch_norm(x, s.bn.running_mean, s.bn.running_var, s.bn.weight, s.bn.bias)
        return F.relu(frozen) + F.relu(s.bn(x))

    found, left = check(forward, image())
    assert found == {"batch_norm + relu": 1}
    assert any("its running statistics are written later" in reason for reason in left)


def test_checkpoint_restores_the_random_state_and_counts_a_batch_once():
    def forward(s, x):
        y = checkpoint(lambda q: F.dropout(F.relu(s.bn(q)), 0.5), x * 1, use_reentrant=False)
        return s.bn2(y)

    model = Net(forward).double()
    other, plain = copy.deepcopy(model), copy.deepcopy(model)
    x = image().double()
    expected = run(model, model, [x])
    plain.body = lambda s, x: s.bn2(F.dropout(F.relu(s.bn(x * 1)), 0.5))
    once = run(plain, plain, [x])
    assert model.bn.num_batches_tracked == 2  # PyTorch's runs twice
    expected |= {name: once[name] for name in once if name.startswith("bn.")}
    compare(run(other, torch.compile(other, backend="fused_ops"), [x]), expected)
    assert [dict(graph.fused) for graph in GRAPHS] == [{"batch_norm + relu": 1, "batch_norm": 1}]


def test_transforms_are_left_alone():
    def forward(s, x):
        return torch.func.vmap(lambda q: F.relu(F.batch_norm(q, None, None, training=True)))(torch.stack((x, 2 * x)))

    found, left = check(forward, image())
    assert found == {}
    assert list(left) == ["a transform of torch.func is inside"]


def test_small_tensors_stay_pytorchs(monkeypatch):
    monkeypatch.undo()

    def forward(s, x, h, t):
        return block(s, x), F.cross_entropy(s.head(h), t)

    found, left = check(forward, image(), torch.randn(4, 8), torch.randint(50, (4,)))
    assert found == {}
    assert len(left) == 2 and all("PyTorch's is as fast" in reason for reason in left)


# ---- cross-entropy


def shifted(s, h, t):
    z = s.head(h)
    z = torch.tanh(z / s.cap) * s.cap
    z = z.float() if z.dtype == torch.bfloat16 else z
    shift, labels = z[..., :-1, :].contiguous(), t[..., 1:].contiguous()
    return F.cross_entropy(shift.view(-1, shift.size(-1)), labels.view(-1), ignore_index=3)


def in_place(s, h, t):
    z = s.head(h)
    z *= 0.25
    return F.cross_entropy(z.reshape(-1, 50), t.flatten(), reduction="sum")


HEADS = {
    "plain": (lambda s, h, t: F.cross_entropy(s.biased(h).flatten(0, 1), t.flatten()), "linear + cross_entropy"),
    "shift and softcap": (shifted, "linear + softcap + cross_entropy"),
    "scale in place": (in_place, "linear + scale + cross_entropy"),
    "division": (lambda s, h, t: F.cross_entropy(s.head(h)[:, 0] / 3, t[:, 0]), "linear + scale + cross_entropy"),
    "scaled softcap": (
        lambda s, h, t: F.cross_entropy((5 * torch.tanh(s.head(h) * 0.5)).view(-1, 50) * 2, t.view(-1)),
        "linear + scale + softcap + cross_entropy",
    ),
    "bias": (
        lambda s, h, t: F.cross_entropy((s.head(h) + s.extra).view(-1, 50) * 2, t.view(-1)),
        "linear + bias + scale + cross_entropy",
    ),
    "classes second": (
        lambda s, h, t: F.cross_entropy(s.head(h).transpose(1, 2), t, label_smoothing=0.1, reduction="none"),
        "linear + cross_entropy",
    ),
    "class weights": (
        lambda s, h, t: F.cross_entropy(s.head(h).view(-1, 50), t.view(-1), s.extra[0].detach().abs()),
        "linear + cross_entropy",
    ),
    "probabilities": (
        lambda s, h, t: F.cross_entropy(s.head(h[0]), F.softmax(h[0] @ s.biased.weight.detach().t(), -1)),
        "linear + cross_entropy",
    ),
    "rows chosen": (
        lambda s, h, t: F.cross_entropy(s.head(h).view(-1, 50)[t.view(-1) % 7], t.view(-1)),
        "linear + cross_entropy",
    ),
}


def tokens():
    return torch.randn(4, 6, 8), torch.randint(50, (4, 6))


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_fused_with_its_loss(name):
    forward, expected = HEADS[name]
    assert check(forward, *tokens()) == ({expected: 1}, {})


def test_a_head_of_any_number_of_tokens():
    model = Net(shifted)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="fused_ops", dynamic=True)
    for length in (6, 9, 5):
        h, t = torch.randn(4, length, 8), torch.randint(50, (4, length))
        compare(run(other, compiled, [h, t]), run(model, model, [h, t]), rtol=1e-4, atol=1e-5)
    ran = [graph for graph in GRAPHS if graph.calls]
    assert [(graph.fused, graph.calls) for graph in ran] == [({"linear + softcap + cross_entropy": 1}, 3)]


def test_a_head_in_bfloat16_with_a_float32_loss():
    def forward(s, h, t):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(s.head(h).float().view(-1, 50), t.view(-1))

    found, _ = check(forward, *tokens(), dtype=torch.float32, rtol=2e-2, atol=1e-3)
    assert found == {"linear + cross_entropy": 1}


def autocast_ends(s, h, t):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = s.head(h)
    return F.cross_entropy(z.float().view(-1, 50), t.view(-1))


def input_is_written(s, h, t):
    h = h * 1
    z = s.head(h)
    h.mul_(2)
    return F.cross_entropy(z.view(-1, 50), t.view(-1))


def accuracy(s, h, t):
    z = s.head(h).view(-1, 50)
    return F.cross_entropy(z, t.view(-1)), (z.argmax(-1) == t.view(-1)).sum()


LOGITS = {
    "a result": (
        lambda s, h, t: (F.cross_entropy((z := s.head(h)).view(-1, 50), t.view(-1)), z),
        "a result of the graph",
    ),
    "another user": (accuracy, "argmax uses its logits as well"),
    "a learned scale": (
        lambda s, h, t: F.cross_entropy(s.head(h).view(-1, 50) / s.temperature, t.view(-1)),
        "scaled by a tensor",
    ),
    "another function": (lambda s, h, t: F.cross_entropy(s.head(h).sigmoid()[0], t[0]), "sigmoid lies between them"),
    "no bias": (lambda s, h, t: F.cross_entropy((s.head(h) + h[..., :1])[0], t[0]), "is no bias"),
    "scaled before the bias": (
        lambda s, h, t: F.cross_entropy((s.head(h) * 2 + s.extra)[0], t[0]),
        "scaled before a bias",
    ),
    "two biases": (lambda s, h, t: F.cross_entropy((s.biased(h) + s.extra)[0], t[0]), "another one is added"),
    "apart": (lambda s, h, t: F.cross_entropy(s.head(h)[0, :, :25], t[0] % 25), "takes its logits apart"),
    "mixed up": (lambda s, h, t: F.cross_entropy(s.head(h).transpose(0, 1)[0], t[:, 0]), "takes its logits apart"),
    "autocast ends": (autocast_ends, "_exit_autocast lies in between"),
    "the input is written": (input_is_written, "mul_ writes to what it reads in between"),
}


@pytest.mark.parametrize("name", LOGITS)
def test_logits_that_are_needed_are_computed(name):
    forward, reason = LOGITS[name]
    dtype = torch.float32 if name == "autocast ends" else torch.float64
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if name == "autocast ends" else {}
    if name == "the input is written":
        tolerance["mode"] = torch.no_grad  # autograd refuses it
    found, left = check(forward, *tokens(), dtype=dtype, **tolerance)
    assert found == {"cross_entropy": 1}
    assert any(reason in text for text in left), left


# ---- the backend itself


def test_another_backend_runs_the_rest():
    seen = []

    def inner(graph_module, inputs, options=None):
        seen.append((graph_module, options))
        return graph_module.forward

    check(block, image(), compile=fused({"inner": inner}))
    check(block, image(), compile=fused({"inner": inner, "depth": 3}))
    assert [options for _, options in seen] == [None, {"depth": 3}]
    assert "backend_run" in seen[0][0].code


@pytest.mark.parametrize("training", [True, False])
def test_through_aotautograd(training):
    def forward(s, x, h, t):
        return block(s, x), shifted(s, h, t), F.silu(s.bn2(x))

    found, _ = check(forward, image(), *tokens(), compile=fused({"inner": "aot_eager"}), training=training)
    assert found == {"batch_norm + add + relu": 1, "batch_norm + silu": 1, "linear + softcap + cross_entropy": 1}


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_through_inductor(dynamic):
    def forward(s, x, h, t):
        return block(s, x), shifted(s, h, t), F.silu(s.bn2(x))

    compile = fused({"inner": "inductor", "shape_padding": False}, dynamic=dynamic)
    found, _ = check(forward, image(), *tokens(), compile=compile)
    assert found == {"batch_norm + add + relu": 1, "batch_norm + silu": 1, "linear + softcap + cross_entropy": 1}


@pytest.mark.parametrize(
    ("options", "mode", "error"),
    [
        ({"inner": 3}, None, TypeError),
        ({"depth": 3}, None, ValueError),
        (None, "max-autotune", ValueError),
    ],
)
def test_options_that_nobody_has(options, mode, error):
    with pytest.raises(Exception, match="backend fused_ops") as caught:
        fused_backend()(torch.fx.symbolic_trace(nn.ReLU()), [], options=options, mode=mode)
    assert caught.type is error


def fused_backend():
    from fused_ops.conversion.backend import fused_ops as backend

    return backend


def test_it_is_known_by_its_name_and_costs_nothing_before(run_python):
    script = """
import sys, torch, fused_ops
assert "torch._dynamo" not in sys.modules and "fused_ops.conversion.backend" not in sys.modules
finders = len(sys.meta_path)
x = torch.randn(4, 4)
assert torch.compile(torch.relu, backend="fused_ops")(x).equal(x.relu())
from fused_ops.conversion.records import GRAPHS
assert [graph.calls for graph in GRAPHS] == [1]
assert len(sys.meta_path) == finders - 1
assert "fused_ops" in torch._dynamo.list_backends()
print("known")
"""
    assert run_python("-c", script).stdout.endswith("known\n")


def test_it_is_known_where_dynamo_was_there_first(run_python):
    script = """
import torch, torch._dynamo
import fused_ops
x = torch.randn(4, 4)
assert torch.compile(torch.relu, backend="fused_ops")(x).equal(x.relu())
print("known")
"""
    assert run_python("-c", script).stdout.endswith("known\n")


PARALLEL = """
import copy, os
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import test_backend as t
from fused_ops.conversion import backend_head, backend_norm
from fused_ops.conversion.records import GRAPHS

for module in (backend_head, backend_norm):
    for name in ("SMALL_VALUES", "SMALL_RESIDUAL_VALUES", "SMALL_LOGITS_BYTES"):
        setattr(module, name, 0)

def forward(s, x, h, labels):
    return t.block(s, x).sum() + t.shifted(s, h, labels)

def train(model, call):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(2):
        torch.manual_seed(step)
        optimizer.zero_grad()
        call(t.image(), *t.tokens()).backward()
        optimizer.step()
    return model.state_dict()

dist._DEFAULT_FIRST_BUCKET_BYTES = 100  # so that the graph is cut in parts
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
model = t.Net(forward)
for unused in ("bn2", "biased", "extra", "temperature"):
    delattr(model, unused)
kinds = {
    "ddp": lambda m: torch.nn.parallel.DistributedDataParallel(m, bucket_cap_mb=1e-4),
    "fsdp": lambda m: fully_shard(m, mesh=dist.init_device_mesh("cpu", (1,))),
    "resharded": lambda m: fully_shard(m, mesh=dist.init_device_mesh("cpu", (1,)), reshard_after_forward=True),
}
for name, wrap in kinds.items():
    torch._dynamo.reset()
    GRAPHS.clear()
    plain, ours = copy.deepcopy(model), copy.deepcopy(model)
    expected = train(plain, plain)
    wrapped = wrap(ours)
    found = train(ours, torch.compile(wrapped, backend="fused_ops"))
    for key, value in expected.items():
        value_now = found[key].full_tensor() if hasattr(found[key], "full_tensor") else found[key]
        torch.testing.assert_close(value_now, value, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name} {key}: {m}")
    total = sum((graph.fused for graph in GRAPHS if graph.calls), start=type(GRAPHS[0].fused)())
    print(name, sorted(total), flush=True)
os._exit(0)
"""


def test_parallel_models(run_python):
    paths = ROOT, ROOT / "tests", ROOT / "tests" / "conversion"
    said = run_python("-c", PARALLEL, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(map(str, paths))).stdout
    expected = ["batch_norm + add + relu", "linear + softcap + cross_entropy"]
    assert said.splitlines()[-3:] == [f"{name} {expected}" for name in ("ddp", "fsdp", "resharded")]
