"""A head's logits that were put off, when somebody wants them after all: right, or an error that names the switch."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from heads import (
    CLASSES,
    FEATURES,
    ROWS,
    Double,
    batch,
    converted,
    converted_head,
    counts,
    deferred,
    gradients,
    network,
    record,
)
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fused_ops
from fused_ops.conversion.deferred_logits import DeferredLogits

pytestmark = pytest.mark.usefixtures("heads_of_any_size")


# --- The logits when they are asked for ------------------------------------------------------------------------------


def in_place(logits):
    logits[:, 3] = 0.0
    logits.mul_(2)
    return logits


def view_in_place(logits):
    logits.view(-1, 5, CLASSES)[:, :2].zero_()
    return logits


def cast_then_in_place(logits):
    wide, chosen = logits.float(), logits[logits.new_ones(ROWS, dtype=torch.bool)]
    logits.zero_()
    return wide + chosen + logits


ASKED = {
    "softmax": lambda h: h.softmax(1),
    "operator": lambda h: 1 - h * h,
    "first": lambda h: h[0],
    "one": lambda h: h[2, 5],
    "matmul": lambda h: h @ torch.ones(CLASSES, 2).double(),
    "Function": Double.apply,
    "in place": in_place,
    "view in place": view_in_place,
    "cast, then in place": cast_then_in_place,
    "stack": lambda h: torch.stack([h, h]),
    "checkpoint": lambda h: checkpoint(torch.sin, h, use_reentrant=False),
    "after a loss": lambda h: F.cross_entropy(h, torch.arange(ROWS)) + h.logsumexp(1).sum(),
    "hook": lambda h: (h.register_hook(lambda g: 3 * g), F.cross_entropy(h, torch.arange(ROWS)))[1],
}


@pytest.mark.parametrize("name", ASKED)
def test_logits_when_asked(name):
    x, _ = batch(torch.float64)
    found = []
    for model in (network().double(), converted().double()):
        output = ASKED[name](model(x))
        upstream = torch.linspace(-1, 1, output.numel()).view(output.shape)
        grads = torch.autograd.grad(output, list(model.parameters()), upstream)
        found.append((output.detach(), grads))
        assert type(output) is torch.Tensor or name in ("in place", "view in place")
    found[1] = (found[1][0] + 0, found[1][1])
    torch.testing.assert_close(found[1], found[0])


def test_values_without_gradients():
    (x, y), model = batch(), converted()
    logits, expected = model(x), network()(x).detach()
    assert logits.shape == expected.shape and logits.dtype == expected.dtype and len(logits) == ROWS
    assert logits.requires_grad and not logits.is_leaf and logits.size(1) == CLASSES and logits.device == x.device
    assert deferred(logits)
    with torch.no_grad():
        assert torch.equal(logits.argmax(1), expected.argmax(1))
        assert float(logits[1, 2]) == pytest.approx(float(expected[1, 2]), rel=1e-4)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    torch.testing.assert_close(torch.tensor(logits.detach().numpy()), expected)
    torch.testing.assert_close(torch.tensor(model(x).tolist()), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model(x).detach())), expected)
    torch.testing.assert_close(copy.deepcopy(model(x).detach()), expected)
    assert repr(model(x).detach()) == repr(logits.detach())
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)
    deferred_logits = model(x)
    with torch.inference_mode():
        torch.testing.assert_close(deferred_logits.sum(), expected.sum())


def test_gradient_of_the_logits():
    (x, y), model = batch(), converted()
    logits = model(x)
    logits.retain_grad()
    F.cross_entropy(logits, y).backward()
    theirs = network()(x).detach().requires_grad_()
    torch.testing.assert_close(logits.grad, torch.autograd.grad(F.cross_entropy(theirs, y), theirs)[0])
    other = model(x)
    grads = torch.autograd.grad(other, list(model.parameters()), torch.ones(ROWS, CLASSES))
    expected = (m := network())(x).backward(torch.ones(ROWS, CLASSES)) or [p.grad for p in m.parameters()]
    torch.testing.assert_close(list(grads), expected, rtol=1e-4, atol=1e-4)


def test_logits_of_an_input_that_is_gone():
    (x, y), (_, head) = batch(), converted_head()
    hidden = torch.tanh(x)
    logits = head(hidden).float()
    hidden.mul_(2)
    for use in (torch.argmax, lambda h: F.cross_entropy(h, y), lambda h: h.view(-1).sum()):
        with pytest.raises(RuntimeError, match=r"written to|changed in place.*convert without loss"):
            use(logits)


def test_logits_of_weights_that_are_gone():
    (x, y), model = batch(), converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits, early = model(x), model(x)
    early.argmax()
    F.cross_entropy(logits, y).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="before that"):
        logits.argmax(1)
    with pytest.raises(RuntimeError, match="before that"):
        F.cross_entropy(logits, y)
    torch.testing.assert_close(early.detach(), network()(x).detach())


# --- Asked for as memory, copies, or by what is not Python -----------------------------------------------------------


def exported_memory(logits):
    return np.frombuffer(bytes(logits.detach().untyped_storage()), dtype=np.float32)


def saved(logits):
    file = io.BytesIO()
    torch.save(logits.detach(), file)
    file.seek(0)
    return torch.load(file)


def address(logits):
    assert logits.data_ptr() != 0
    return logits.data_ptr() == logits.data_ptr()


OUTSIDE = {
    "data": lambda h: h.data,
    "numpy": lambda h: h.detach().numpy(),
    "numpy at once": lambda h: h.numpy(),
    "asarray": lambda h: np.asarray(h.data),
    "asarray at once": lambda h: np.asarray(h),
    "storage": exported_memory,
    "address": address,
    "tolist": lambda h: h.tolist(),
    "item": lambda h: h[1, 2].item(),
    "item of many": lambda h: h.item(),
    "float": lambda h: float(h[0, 0]),
    "copy": lambda h: copy.copy(h).detach(),
    "deepcopy": lambda h: copy.deepcopy(h),
    "deepcopy of data": lambda h: copy.deepcopy(h.detach()),
    "pickle": lambda h: pickle.loads(pickle.dumps(h.detach())),
    "save": saved,
    "dlpack": lambda h: torch.from_dlpack(h.detach()),
    "dlpack at once": lambda h: h.__dlpack__(),
    "text": lambda h: repr(h.detach()),
    "format": lambda h: f"{h[0, 0].detach():.3f}",
    "iterate": lambda h: torch.stack([row.detach() for row in h]),
    "contains": lambda h: h.detach().max() in h,
    "in place": lambda h: h.detach().clone().add_(h.detach()),
    "requires_grad_": lambda h: h.requires_grad_().detach(),
    "no longer requires grad": lambda h: h.requires_grad_(False),
    "backward": lambda h: h.backward(),
    "strides": lambda h: (h.stride(), h.is_contiguous(), h.storage_offset(), h.is_leaf, h.element_size()),
    "detach_": lambda h: h.detach_(),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_outside_of_autograd(name):
    """The same value, or the same exception, as of logits that are there."""
    x, found = torch.randn(5, FEATURES), []
    for head in converted_head():
        try:
            found.append(OUTSIDE[name](head(x)))
        except Exception as error:
            found.append((type(error), str(error)))
    if isinstance(found[0], torch.Tensor):
        assert torch.equal(*found) and type(found[0]) is type(found[1])
    else:
        np.testing.assert_equal(found[1], found[0])


def test_an_address_that_is_not_there():
    """What does not ask Python gets no address, rather than that of nothing."""
    logits = converted_head()[1](torch.randn(5, FEATURES))
    with pytest.raises(RuntimeError, match="data"):
        torch._C._to_dlpack(logits)
    assert deferred(logits)


def test_a_function_of_logits_that_were_changed():
    x, found = torch.randn(5, FEATURES), []
    for head in converted_head():
        logits = head(x)
        logits.mul_(2)
        found.append(torch.autograd.grad(Double.apply(logits.clone()).square().sum(), head.weight)[0])
        if isinstance(logits, DeferredLogits):
            with pytest.raises(RuntimeError, match="convert without loss"):
                Double.apply(logits).sum().backward()
    torch.testing.assert_close(found[1], found[0])


def test_a_function_and_others():
    """Each use of the logits has its share in the gradient, once, also of inputs that depend on the weight."""
    x, found = torch.randn(4, 6, FEATURES, dtype=torch.float64), []
    for head in converted_head(dtype=torch.float64):
        logits = head(torch.tanh(x @ head.weight[:FEATURES]))
        scaled = logits * 0.5
        value = (Double.apply(scaled) * scaled).sum() + Double.apply(logits).square().sum()
        value = value + F.cross_entropy(scaled.view(-1, CLASSES), torch.arange(24)) + scaled[0].exp().sum()
        found.append(torch.autograd.grad(value, list(head.parameters())))
    torch.testing.assert_close(found[1], found[0])


# --- Questions about the gradient of the logits -----------------------------------------------------------------------

QUESTIONS = {
    "register_hook": lambda loss, h: h.register_hook(lambda grad: grad),
    "retain_grad": lambda loss, h: h.retain_grad(),
    "grad": lambda loss, h: torch.autograd.grad(loss, h),
    "backward": lambda loss, h: loss.backward(inputs=[h]),
    "of what was made of them": lambda loss, h: torch.autograd.grad(loss, [h]),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_too_late(name):
    """After the loss nobody computes that gradient; the loss itself goes on as if nothing had been asked."""
    theirs, ours = converted_head()
    x, y = torch.randn(4, 6, FEATURES), torch.randint(0, CLASSES, (24,))
    logits = ours(x)
    view = logits.view(-1, CLASSES)
    loss = F.cross_entropy(view, y)
    for asked in (logits, view):
        with pytest.raises(RuntimeError, match=r"convert\(loss=\.\.\.\).*convert without loss"):
            QUESTIONS[name](loss, asked)
    other = ours(x)[:, :3]  # of which no loss was found
    other.retain_grad()
    (loss + other.sum()).backward()
    assert torch.equal(other.grad, torch.ones_like(other))
    expected = F.cross_entropy(theirs(x).view(-1, CLASSES), y) + theirs(x)[:, :3].sum()
    torch.testing.assert_close(ours.weight.grad, torch.autograd.grad(expected, theirs.weight)[0])


@pytest.mark.parametrize("name", ["register_hook", "retain_grad", "of a Function", "grad"])
def test_in_time(name):
    """Before the loss they are logits as any others."""
    x, y = torch.randn(6, FEATURES), torch.randint(0, CLASSES, (6,))
    found = []
    for head in converted_head():
        logits, seen = head(x), []
        if name == "register_hook":
            logits.register_hook(lambda grad, seen=seen: seen.append(grad) or 3 * grad)
        elif name == "retain_grad":
            logits.retain_grad()
        elif name == "of a Function":
            logits.grad_fn.register_prehook(lambda grads, seen=seen: seen.append(grads[0]))
        else:
            logits.sum()
        loss = F.cross_entropy(logits, y)
        if name == "grad":
            seen.append(torch.autograd.grad(loss, logits, retain_graph=True)[0])
        loss.backward()
        found.append((seen or [logits.grad], head.weight.grad))
    torch.testing.assert_close(found[1], found[0])


# --- What is counted -------------------------------------------------------------------------------------------------


def test_counts():
    (x, y), model = batch(), converted()
    assert counts(model) == (0, {})
    F.cross_entropy(model(x), y)
    F.cross_entropy(model(x).view(-1, CLASSES).float(), y)
    assert counts(model) == (2, {})
    logits = model(x)
    F.cross_entropy(logits, y)
    logits.argmax(1), logits.sum()
    assert counts(model) == (3, {"torch.Tensor.argmax used them": 1})
    torch.argmax(model(x), 1)
    torch.topk(model(x)[:5], 3)
    (model(x) * 2).tolist()
    assert record(model).computed["torch.argmax used them"] == record(model).computed["torch.topk used them"] == 1
    assert record(model).computed["torch.Tensor.tolist used them"] == 1
    Double.apply(model(x))
    total = sum(record(model).computed.values())
    model(x)  # of which nobody wants anything
    assert counts(model)[0] == 3 and sum(record(model).computed.values()) == total == 5
    with torch.no_grad():
        model(x)
    assert record(model).computed["gradients were off"] == 1


def test_counted_once():
    """Whatever else is asked, of the same logits or of what was made of them."""
    (x, _), model = batch(), converted()
    logits = model(x)
    view, scaled = logits.view(4, -1, CLASSES), logits * 2
    scaled.argmax()
    assert counts(model) == (0, {"torch.Tensor.argmax used them": 1})
    view.sum(), logits.max(), scaled.min(), logits.view(-1).sum()
    assert counts(model) == (0, {"torch.Tensor.argmax used them": 1})


def test_counts_of_copies():
    (x, y), model = batch(), converted()
    F.cross_entropy(model(x), y)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        F.cross_entropy(twin(x), y)
        assert counts(twin) == (2, {}) and counts(model) == (1, {})
    fused_ops.revert(model)
    assert not any("_fused_ops_record" in m.__dict__ for m in model.modules())


def test_small_logits_are_computed(monkeypatch):
    monkeypatch.undo()
    model, (x, _) = converted(), batch()
    assert type(model(x)) is torch.Tensor and counts(model) == (0, {"logits under 1 MiB": 1})


# --- Where the head is an ordinary layer -----------------------------------------------------------------------------


def test_ordinary_without_gradients_and_under_transforms():
    (x, y), model = batch(), converted()
    with torch.no_grad():
        assert type(model(x)) is torch.Tensor
    model = converted().eval()
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    theirs = network().eval()
    found = torch.func.grad(loss)(parameters)
    torch.testing.assert_close(list(found.values()), list(gradients(theirs, x, y)), rtol=1e-5, atol=1e-6)
    tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
    _, jvp = torch.func.jvp(loss, (parameters,), (tangents,))
    torch.testing.assert_close(jvp, sum(g.sum() for g in found.values()), rtol=1e-4, atol=1e-4)


def test_hooks_see_the_logits():
    (x, y), model = batch(), converted()
    seen = []
    handles = [
        model[1].register_forward_hook(lambda module, args, output: seen.append(type(output))),
        model[1].register_full_backward_hook(lambda module, grads, outputs: seen.append(outputs[0].shape)),
    ]
    F.cross_entropy(model(x), y).backward()
    assert seen == [torch.Tensor, (ROWS, CLASSES)]
    for handle in handles:
        handle.remove()
    assert deferred(model(x))


def test_hook_of_the_model():
    (x, y), model = batch(), converted()
    model.register_forward_hook(lambda module, args, output: output * 2)
    torch.testing.assert_close(F.cross_entropy(model(x), y), F.cross_entropy(network()(x) * 2, y))


@pytest.mark.parametrize("what", ["model", "loss", "step"])
def test_compile(what):
    (x, y), model = batch(), converted()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager") if what == "model" else model
    loss = torch.compile(F.cross_entropy, backend="aot_eager") if what == "loss" else F.cross_entropy

    def step(x, y):
        return loss(compiled(x), y)

    run = torch.compile(step, fullgraph=True, backend="aot_eager") if what == "step" else step
    found = torch.autograd.grad(run(x, y), list(model.parameters()))
    torch.testing.assert_close(found, gradients(network(), x, y), rtol=1e-5, atol=1e-6)


def test_export():
    (x, _), model = batch(), converted().eval()
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x).detach() + 0)


HOW = {
    "vmap": lambda head, x: torch.func.vmap(head)(x.view(2, 3, -1)),
    "jvp": lambda head, x: torch.func.jvp(head, (x,), (x,))[1],
    "grad": lambda head, x: torch.func.grad(lambda x: head(x).square().sum())(x),
    "linearize": lambda head, x: torch.func.linearize(head, x)[1](x),
    "forward AD": lambda head, x: tangent(head, x),
    "jit.trace": lambda head, x: torch.jit.trace(head, (x,))(x),
    "make_fx": lambda head, x: make_fx(head)(x)(x),
    "fx": lambda head, x: torch.fx.symbolic_trace(head)(x),
    "export": lambda head, x: torch.export.export(head, (x,)).module()(x),
    "compile": lambda head, x: torch.compile(head, fullgraph=True, backend="aot_eager")(x),
    "inference mode": lambda head, x: torch.inference_mode()(head)(x),
    "no_grad": lambda head, x: torch.no_grad()(head)(x),
    "hook": lambda head, x: hooked(head, head.register_forward_hook(lambda m, a, out: 2 * out), x),
    "pre-hook": lambda head, x: hooked(head, head.register_forward_pre_hook(lambda m, a: (2 * a[0],)), x),
    "global hook": lambda head, x: hooked(
        head, nn.modules.module.register_module_forward_hook(lambda m, a, out: 3 * out), x
    ),
    "one row": lambda head, x: head(x[0]),
    "functional_call": lambda head, x: torch.func.functional_call(
        head, {"weight": torch.ones(2, CLASSES, FEATURES)[0], "bias": torch.ones(CLASSES)}, (x,)
    ),
    "weight norm": lambda head, x: torch.nn.utils.parametrizations.weight_norm(copy.deepcopy(head))(x),
}  # fmt: skip


def tangent(head, x):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(head(torch.autograd.forward_ad.make_dual(x, x))).tangent


def hooked(head, handle, x):
    try:
        return head(x)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", HOW)
def test_never_put_off(name):
    theirs, ours = converted_head()
    x = torch.randn(6, FEATURES)
    expected, found = HOW[name](theirs, x), HOW[name](ours, x)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, expected)
    fused, computed = counts(ours)
    assert fused == 0
    if name not in ("export", "weight norm"):  # of a copy of the head
        assert sum(computed.values()) >= 1 and "" not in computed
