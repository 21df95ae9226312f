"""A converted model under what training loops and PyTorch's transforms do to models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_convert import network
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import fused_ops

Y = torch.tensor([0, 3, 1, 2])


@pytest.fixture
def models():
    """The network as PyTorch's and converted, and a batch."""
    theirs, ours = network(), network()
    fused_ops.convert(ours)
    return theirs, ours, torch.randn(4, 3, 10, 10)


def gradients(model, x, loss=F.cross_entropy):
    model.zero_grad()
    loss(model(x), Y).backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_track(theirs, ours, steps, tolerance=1e-4):
    """Both take the same steps and end where rounding explains."""
    for _ in range(steps[0]):
        for model, step in ((theirs, steps[1]), (ours, steps[2])):
            step(model)
    for (name, a), b in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(models, reentrant):
    theirs, ours, x = models
    expected = gradients(copy.deepcopy(ours), x)

    def stages(model, x):
        x = checkpoint(model[:4], x.clone().requires_grad_(), use_reentrant=reentrant)
        return checkpoint(model[4:], x, use_reentrant=reentrant)

    ours.zero_grad()
    F.cross_entropy(stages(ours, x), Y).backward()
    torch.testing.assert_close([p.grad for p in ours.parameters()], expected, rtol=0, atol=0)
    theirs(x)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_gradient_accumulation(models):
    theirs, ours, x = models

    def step(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for part, y in zip(x.chunk(2), Y.chunk(2), strict=True):
            (F.cross_entropy(model(part), y) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert_track(theirs, ours, (3, step, step))


def test_autocast_bfloat16(models):
    theirs, ours, x = models
    truth = gradients(copy.deepcopy(theirs).double(), x.double())
    errors = []
    for model in (theirs, ours):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
            assert output.dtype == torch.bfloat16
            loss = F.cross_entropy(output, Y)
        model.zero_grad()
        loss.backward()
        grads = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        exact = torch.cat([t.flatten() for t in truth])
        errors.append(float((grads - exact).norm() / exact.norm()))
    assert errors[1] <= 1.5 * errors[0], errors


def test_grad_scaler(models):
    theirs, ours, x = models

    def step(model):
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.05), torch.amp.GradScaler("cpu", init_scale=256.0)
        with torch.autocast("cpu", torch.float16, enabled=False):
            loss = F.cross_entropy(model(x), Y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert scaler.get_scale() == 256.0  # no step was skipped

    assert_track(theirs, ours, (3, step, step))


@pytest.mark.parametrize("when", ["converted, then compiled", "compiled, then converted"])
def test_compile_fullgraph(when):
    ours, x = network(), torch.randn(4, 3, 10, 10)
    if when == "converted, then compiled":
        fused_ops.convert(ours)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    else:
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        compiled(x)
        fused_ops.convert(ours)
    expected = gradients(copy.deepcopy(ours), x)
    torch.testing.assert_close(gradients(compiled, x), expected)
    ours.eval()
    torch.testing.assert_close(compiled(x), ours(x))


def test_compile_has_no_graph_break_and_no_separate_activation():
    model = network()
    fused_ops.convert(model)
    found = torch._dynamo.explain(model)(torch.randn(4, 3, 10, 10))
    assert found.graph_break_count == 0 and found.graph_count == 1
    code = found.graphs[0].code
    assert not any(name in code for name in ("relu", "silu", "batch_norm("))


def test_compile_with_the_loss():
    model, loss = network(), nn.CrossEntropyLoss()
    fused_ops.convert(model)
    fused_ops.convert(loss)
    x = torch.randn(4, 3, 10, 10)
    compiled = torch.compile(lambda x: loss(model(x), Y), fullgraph=True, backend="inductor")
    model(x)
    expected = torch.autograd.grad(
        loss(copy.deepcopy(model)(x), Y).add(0) * 0 + loss(model(x), Y), [*model.parameters()]
    )
    found = torch.autograd.grad(compiled(x), [*model.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_export(models):
    _, ours, x = models
    ours.eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(ours, (x,), dynamic_shapes=({0: batch},))
    other = torch.randn(7, 3, 10, 10)
    torch.testing.assert_close(exported.module()(other), ours(other))
    assert set(exported.state_dict) == set(ours.state_dict())
    assert "fused_ops.batch_norm" in str(exported.graph)


@pytest.mark.slow
def test_aot_inductor(models, tmp_path):
    _, ours, x = models
    ours.eval()
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            torch.export.export(ours, (x,)), package_path=str(tmp_path / "model.pt2")
        )
        loaded = torch._inductor.aoti_load_package(package)
        torch.testing.assert_close(loaded(x), ours(x), rtol=1e-5, atol=1e-5)


def test_ensemble_by_vmap():
    """Three models at once, their gradients as one by one."""

    def build():
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.ReLU(), nn.Linear(5, 4))

    models = [build() for _ in range(3)]
    for model in models:
        fused_ops.convert(model)
    parameters, buffers = stack_module_state(models)
    x = torch.randn(4, 6)

    def loss(p, b):
        return fused_ops.cross_entropy(functional_call(models[0], (p, b), (x,)), Y)

    found = vmap(torch.func.grad(loss))(parameters, buffers)
    for i, model in enumerate(models):
        expected = gradients(model, x)
        torch.testing.assert_close([g[i] for g in found.values()], expected)


def test_functional_call_in_evaluation(models):
    theirs, ours, x = models
    theirs.eval(), ours.eval()
    state = {name: t + 0.1 for name, t in theirs.state_dict().items() if t.is_floating_point()}
    torch.testing.assert_close(functional_call(ours, state, (x,)), functional_call(theirs, state, (x,)))


def test_moving_averages(models):
    theirs, ours, x = models
    averages = [
        torch.optim.swa_utils.AveragedModel(m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
        for m in (theirs, ours)
    ]

    def step_of(average):
        def step(model):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            F.cross_entropy(model(x), Y).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)

        return step

    assert_track(theirs, ours, (3, *(step_of(a) for a in averages)))
    for average in averages:
        torch.optim.swa_utils.update_bn([(x,), (x + 1,)], average)
    torch.testing.assert_close(averages[1].state_dict(), averages[0].state_dict(), rtol=1e-4, atol=1e-4)
    assert type(averages[1].module[1]) is fused_ops.BatchNorm2d


def test_lbfgs(models):
    theirs, ours, x = models

    def step(model):
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), Y)
            loss.backward()
            return loss

        first = float(optimizer.step(closure))
        assert float(F.cross_entropy(model(x), Y)) < first

    assert_track(
        theirs.double(), ours.double(), (1, lambda m: step_in_double(m, step), lambda m: step_in_double(m, step))
    )


def step_in_double(model, step):
    """The step with the batch's dtype made the model's."""
    hook = model.register_forward_pre_hook(lambda module, args: tuple(a.double() for a in args))
    step(model)
    hook.remove()


@pytest.mark.parametrize("way", ["double backward", "forward mode"])
def test_gauss_newton_step(way):
    """J' H J v, the curvature that a Gauss-Newton step solves with, equal to PyTorch's; then the step itself."""
    found = []
    for converted in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.SiLU(), nn.Linear(6, 4))
        loss = nn.CrossEntropyLoss()
        model, x = model.double(), torch.randn(4, 5, dtype=torch.float64)
        if converted:
            fused_ops.convert(model)
            fused_ops.convert(loss)
        found.append(gauss_newton(model, loss, x, way))
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-9)
    assert found[1][1] < found[1][2]


def gauss_newton(model, loss, x, way):
    """(the step, the loss after it, the loss before it), by five steps of conjugate gradients."""
    parameters = dict(model.named_parameters())
    sizes = [p.numel() for p in parameters.values()]

    def unflatten(v):
        return {n: t.view_as(p) for (n, p), t in zip(parameters.items(), v.split(sizes), strict=True)}

    def logits(p):
        return functional_call(model, p, (x,))

    def curvature(v):
        if way == "forward mode":
            output, jv = torch.func.jvp(logits, (parameters,), (unflatten(v),))
        else:
            output = logits(parameters)
            dummy = torch.zeros_like(output, requires_grad=True)
            backward = torch.autograd.grad(output, list(parameters.values()), dummy, create_graph=True)
            (jv,) = torch.autograd.grad(backward, dummy, list(unflatten(v).values()))
        leaf = output.detach().requires_grad_()
        (first,) = torch.autograd.grad(loss(leaf, Y), leaf, create_graph=True)
        (hjv,) = torch.autograd.grad(first, leaf, jv.detach())
        grads = torch.autograd.grad(logits(parameters), list(parameters.values()), hjv)
        return torch.cat([g.flatten() for g in grads]) + 0.1 * v

    before = loss(logits(parameters), Y)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(before, list(parameters.values()))])
    step, residual = torch.zeros_like(gradient), -gradient
    direction = residual.clone()
    for _ in range(5):
        image = curvature(direction)
        alpha = residual @ residual / (direction @ image)
        step, new = step + alpha * direction, residual - alpha * image
        direction, residual = new + (new @ new) / (residual @ residual) * direction, new
    after = loss(logits({n: parameters[n] + t for n, t in unflatten(step).items()}), Y)
    return step.detach(), float(after.detach()), float(before.detach())
