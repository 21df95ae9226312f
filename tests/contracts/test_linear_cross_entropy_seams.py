"""Linear cross-entropy where other systems of PyTorch meet it: value and gradient, or the documented error."""

import io
import warnings
from functools import partial

import pytest
import torch
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fused_ops
from fused_ops import linear_cross_entropy
from fused_ops.core.graph import implementations

FEATURES, CLASSES = 6, 11
aten = torch.ops.aten

OPTIONS = {
    "mean": lambda rows: {},
    "none": lambda rows: {"reduction": "none"},
    "chunk_rows": lambda rows: {"chunk_rows": 7},
    "chunk_rows, none": lambda rows: {"chunk_rows": 7, "reduction": "none"},
    "max_memory_bytes": lambda rows: {"max_memory_bytes": 2000, "reduction": "sum"},
    "class_mask": lambda rows: {
        "class_mask": torch.arange(rows * CLASSES).view(rows, CLASSES) % 7 != 20,
        "z_loss": 0.1,
    },
    "numbers": lambda rows: {"label_smoothing": 0.1, "z_loss": 0.1, "logit_scale": 0.5, "softcap": 3.0},
    "outputs": lambda rows: {
        "return_outputs": True,
        "chunk_rows": 5,
        "token_weight": torch.linspace(0.1, 1, rows).double(),
    },
}


def draw(rows):
    return (
        torch.randn(rows, FEATURES).double(),
        torch.randn(CLASSES, FEATURES).double(),
        torch.randint(0, CLASSES, (rows,)),
    )


def loss_of(x, w, target, options):
    out = linear_cross_entropy(x, w, target, **options)
    return out.loss + out.entropy.sum() if options.get("return_outputs") else out.sum()


def value_and_grads(function, *leaves):
    leaves = [t.detach().requires_grad_() for t in leaves]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def same(ours, expected):
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("case", OPTIONS)
def test_a_dynamic_batch_compiles_once(case):
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (40, 30, 9):
        x, w, target = draw(rows)
        options = OPTIONS[case](rows)
        with torch._dynamo.config.patch(error_on_recompile=rows != 40):
            ours = value_and_grads(lambda x, w, t=target, o=options: compiled(x, w, t, o), x, w)
        same(ours, value_and_grads(lambda x, w, t=target, o=options: loss_of(x, w, t, o), x, w))


NUMBERS = {
    "normalizer and a factor": lambda h, w, t, s: linear_cross_entropy(h * s, w, t, normalizer=s * 10),
    "z_loss": lambda h, w, t, s: linear_cross_entropy(h, w, t, z_loss=s),
    "logit_scale and softcap": lambda h, w, t, s: linear_cross_entropy(h, w, t, logit_scale=s, softcap=s),
    "label_smoothing": lambda h, w, t, s: linear_cross_entropy(h, w, t, label_smoothing=s, reduction="none").sum(),
    "lora": lambda h, w, t, s: linear_cross_entropy(h, w, t, lora=(w[:2], w[:, :2].contiguous(), s)),
    "lam": lambda h, w, t, s: linear_cross_entropy(h, w, (t, t.flip(0), s)),
    "ignore_index": lambda h, w, t, s: linear_cross_entropy(h, w, t, ignore_index=round(s * 10)),
}


@pytest.mark.parametrize("case", NUMBERS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_numbers_that_change_compile_twice_at_most(case, backend):
    def f(h, w, target, s):
        return NUMBERS[case](h, w, target, s)

    if case == "ignore_index":

        def f(h, w, target, s):
            return linear_cross_entropy(h, w, target, ignore_index=s)

    compiled, (h, w, target) = torch.compile(f, fullgraph=True, backend=backend), draw(20)
    for i, s in enumerate((3, 5, 7, 2) if case == "ignore_index" else (0.1, 0.2, 0.3, 0.4)):
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            ours = value_and_grads(lambda h, w, s=s: compiled(h, w, target, s), h, w)
        same(ours, value_and_grads(lambda h, w, s=s: f(h, w, target, s), h, w))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(FEATURES, FEATURES).double()
        self.head = torch.nn.Linear(FEATURES, CLASSES, bias=False).double()

    def forward(self, x, target, options):
        return loss_of(self.body(x), self.head.weight, target, options)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", OPTIONS)
def test_an_exported_program_of_any_batch_trains(case, strict):
    model, (x, _, target), options = Model(), draw(40), OPTIONS[case](40)
    rows = Dim("rows", min=2, max=1 << 20)
    of_options = {n: {0: rows} if isinstance(v, torch.Tensor) else None for n, v in options.items()}
    shapes = {"x": {0: rows}, "target": {0: rows}, "options": of_options}
    program = torch.export.export(model, (x, target, options), dynamic_shapes=shapes, strict=strict)
    assert sum("linear_cross_entropy" in str(node.target) for node in program.graph.nodes) == 1
    trained = program.module()
    for rows in (40, 5):
        x, _, target = draw(rows)
        options = OPTIONS[case](rows)
        same(trained(x, target, options), model(x, target, options))
        grads = torch.autograd.grad(trained(x, target, options), [*trained.parameters()])
        ours = dict(zip([name for name, _ in trained.named_parameters()], grads, strict=True))
        expected = torch.autograd.grad(model(x, target, options), [*model.parameters()])
        for (name, _), grad in zip(model.named_parameters(), expected, strict=True):
            same(ours[name], grad)


def test_an_exported_program_gives_gradients_nobody_asked_for_at_export():
    """And second ones, and NaN for the mean of nothing."""
    rows = Dim("rows", min=0, max=1 << 20)

    class Loss(torch.nn.Module):
        def forward(self, x, w, target):
            return linear_cross_entropy(x, w, target)

    x, w, target = draw(8)
    shapes = ({0: rows}, None, {0: rows})
    program = torch.export.export(Loss(), (x, w.requires_grad_(), target), dynamic_shapes=shapes).module()
    same(*(value_and_grads(lambda x, w, f=f: f(x, w, target), x, w) for f in (program, linear_cross_entropy)))

    def second(f):
        leaves = [t.detach().requires_grad_() for t in (x, w)]
        grads = torch.autograd.grad(f(*leaves, target), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    same(second(program), second(linear_cross_entropy))
    assert program(x[:0], w, target[:0]).isnan()


@pytest.mark.parametrize("case", OPTIONS)
def test_transforms_inside_of_compile(case):
    (x, w, target), options = draw(5), OPTIONS[case](5)

    def grad(x):
        return torch.func.grad(lambda x: loss_of(x, w, target, options))(x)

    def each(x):
        return torch.vmap(torch.func.grad(lambda x: loss_of(x, w, target, options)))(torch.stack((x, 2 * x)))

    for f in (grad, each):
        same(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))
    leaf = x.detach().requires_grad_()
    same(grad(x), torch.autograd.grad(loss_of(leaf, w, target, options), leaf)[0])


@pytest.mark.parametrize("case", OPTIONS)
def test_nested_forward_levels_and_linearize(case):
    (x, w, target), options = draw(5), OPTIONS[case](5)

    def f(x):
        return loss_of(x, w, target, options)

    v, hessian = torch.randn_like(x), torch.func.hessian(f)(x)
    same(torch.func.jacfwd(torch.func.jacfwd(f))(x), hessian)
    twice = torch.func.jvp(lambda x: torch.func.jvp(f, (x,), (v,))[1], (x,), (v,))[1]
    same(twice, torch.einsum("abcd,ab,cd->", hessian, v, v))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value, along = torch.func.linearize(f, x)
    same((value, along(v)), torch.func.jvp(f, (x,), (v,)))


def test_make_fx_takes_any_batch():
    def f(x, w, target):
        return torch.autograd.grad(linear_cross_entropy(x, w, target, chunk_rows=7, z_loss=0.1), (x, w))

    def of(rows):
        x, w, target = draw(rows)
        return x.requires_grad_(), w.requires_grad_(), target

    traced = make_fx(f, tracing_mode="symbolic")(*of(40))
    for rows in (40, 9, 5000):
        given = of(rows)
        same(traced(*given), f(*given))


@pytest.mark.parametrize("keep_mm", [True, False])
@pytest.mark.parametrize("case", OPTIONS)
def test_selective_checkpointing(case, keep_mm):
    (x, w, target), options = draw(9), OPTIONS[case](9)
    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append(op)
        products = op in (aten.mm.default, aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if products == keep_mm else CheckpointPolicy.PREFER_RECOMPUTE

    def f(x, w):
        return loss_of(x @ x.t() @ x, w, target, options)

    def checkpointed(x, w):
        return checkpoint(
            f, x, w, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy)
        )

    same(value_and_grads(checkpointed, x, w), value_and_grads(f, x, w))
    assert aten.mm.default in seen and aten.mm.out not in seen and aten.addmm_.default not in seen


@pytest.mark.parametrize(("options", "backward"), [({"chunk_rows": 7}, 0), ({"chunk_rows": 7, "reduction": "none"}, 1)])
def test_the_flop_counter_counts_the_products(options, backward):
    x, w, target = draw(40)
    target[:10] = -100
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(x.requires_grad_(), w.requires_grad_(), target, **options).sum().backward()
    assert counter.get_total_flops() == 2 * 30 * FEATURES * CLASSES * (3 + backward)


@pytest.mark.parametrize("options", [{}, {"chunk_rows": 4}, {"z_loss": 0.1, "label_smoothing": 0.1, "chunk_rows": 4}])
def test_a_traced_module_is_saved_and_trains(options):
    module, (x, _, target) = (
        fused_ops.LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True, **options).double(),
        draw(12),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced, file = torch.jit.trace(module, (x, target)), io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    kinds = {node.kind().split("::")[0] for node in loaded.inlined_graph.nodes()}
    assert kinds <= {"aten", "prim"}
    for rows in (12, 5):
        x, _, target = draw(rows)
        for parameters in (loaded.parameters(), module.parameters()):
            for p in parameters:
                p.grad = None
        ours, expected = loaded(x, target), module(x, target)
        same(ours, expected)
        ours.backward()
        expected.backward()
        for (name, p), (other, q) in zip(loaded.named_parameters(), module.named_parameters(), strict=True):
            assert name == other
            same(p.grad, q.grad)


@pytest.mark.parametrize("module", [fused_ops.CrossEntropyLoss(), fused_ops.LinearCrossEntropyLoss(3, 4)])
def test_scripting_says_what_to_do(module):
    for given in (module, torch.nn.Sequential(module)):
        with pytest.raises(RuntimeError, match=r"torch\.jit\.trace or torch\.export"):
            torch.jit.script(given)


def test_opcheck():
    x, w, target = draw(9)
    low, probabilities = [torch.randn(9, 2).double(), torch.randn(CLASSES, 2).double()], torch.rand(9, CLASSES).double()
    numbers = torch.tensor([0.1, 0.5, 3.0, 0.1], dtype=torch.float64)
    ops = {op._schema.name.split("::")[1]: op for op in implementations}
    leaves = [t.requires_grad_() for t in (x, w, torch.randn(CLASSES).double(), *low)]
    target_args, scale = (None, probabilities, None, None), torch.rand(9).double()
    cut, everything = (
        (1, 4, None),
        ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    of_sum = (*leaves, *target_args, scale, -100, numbers, *cut, 31, True)
    of_rows = (*leaves, target, None, None, None, -100, numbers, *cut, True)
    results = ops["linear_cross_entropy_rows"](*of_rows)
    grads = [torch.rand(9).double() for _ in range(4)]
    saved = [results[i].detach() for i in (1, 2, 4)]
    of_grad = (*grads, *(t.detach() for t in leaves), target, None, None, None, *saved, -100, numbers, *cut, True, 31)
    for name, args in (("", of_sum), ("_rows", of_rows), ("_rows_grad", of_grad)):
        torch.library.opcheck(ops[f"linear_cross_entropy{name}"], args, test_utils=everything)


def test_a_second_derivative_of_what_was_compiled_is_refused():
    """As AOTAutograd refuses PyTorch's own; the gradients that the loss brings along are no constants."""
    x, w = torch.randn(6, 5).double().requires_grad_(), torch.randn(7, 5).double().requires_grad_()
    loss = torch.compile(lambda x, w: linear_cross_entropy(x, w, torch.arange(6)), backend="aot_eager", fullgraph=True)
    value = loss(x, w)
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(value + gradient.square().sum(), x)
