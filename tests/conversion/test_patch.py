"""patch(): the calls inside it go to this package, those outside and beside it do not."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import batch_norm as imported_batch_norm
from torch.utils._python_dispatch import TorchDispatchMode

import fused_ops


class Record(TorchDispatchMode):
    """The names of this package's raw ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fused_ops":
            self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def called(function):
    """The raw ops that a call uses."""
    with Record() as record:
        function()
    return record.names


def loss():
    return F.cross_entropy(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))


def norm():
    return F.batch_norm(torch.randn(4, 3), None, None, training=True)


def test_inside_and_outside():
    assert called(loss) == [] and called(norm) == []
    with fused_ops.patch():
        assert called(loss) == ["cross_entropy_forward"] and called(norm) == ["batch_norm_plain_forward"]
    assert called(loss) == [] and called(norm) == []


def test_names_imported_before_and_modules():
    model = nn.BatchNorm1d(3)
    with fused_ops.patch():
        assert called(lambda: imported_batch_norm(torch.randn(4, 3), None, None, training=True))
        assert called(lambda: model(torch.randn(4, 3))) == ["batch_norm_plain_forward"]
    assert model.num_batches_tracked == 1


def test_results_and_gradients():
    x, y = torch.randn(6, 5, 4, requires_grad=True), torch.randint(0, 5, (6, 4))
    weight = torch.randn(5, requires_grad=True)

    def gradients():
        h = F.batch_norm(x, torch.zeros(5), torch.ones(5), weight, None, True, 0.1, 1e-5)
        return torch.autograd.grad(F.cross_entropy(h, y, ignore_index=2, reduction="sum"), (x, weight))

    expected = gradients()
    with fused_ops.patch():
        found = gradients()
    torch.testing.assert_close(found, expected)


def test_exception_restores():
    with pytest.raises(IndexError), fused_ops.patch():
        F.cross_entropy(torch.randn(1, 3), torch.tensor([5]))
    assert called(loss) == []


def test_other_threads_are_not_touched():
    inside, done, found = threading.Event(), threading.Event(), []

    def other():
        inside.wait(10)
        found.append(called(loss))
        with fused_ops.patch("batch_norm"):
            found.append((called(loss), called(norm)))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with fused_ops.patch("cross_entropy"):
        inside.set()
        assert done.wait(30)
        assert called(loss) and not called(norm)
    thread.join()
    assert found == [[], ([], ["batch_norm_plain_forward"])]


def test_nesting():
    outer = fused_ops.patch("cross_entropy")
    with outer:
        with fused_ops.patch("batch_norm"):
            assert called(loss) and called(norm)
        assert called(loss) and not called(norm)
        with pytest.raises(RuntimeError, match="active already"), outer:
            pass
        assert called(loss)
    assert not called(loss)
    with outer:  # one after the other is fine
        assert called(loss)


def test_left_in_the_wrong_order():
    outer, inner = fused_ops.patch("cross_entropy"), fused_ops.patch("batch_norm")
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(RuntimeError, match="must end before"):
        outer.__exit__(None, None, None)
    assert called(loss) and called(norm)
    inner.__exit__(None, None, None)
    outer.__exit__(None, None, None)
    assert not called(loss) and not called(norm)


def test_one_object_in_two_threads():
    shared, refused = fused_ops.patch(), []

    def other():
        try:
            with shared:
                pass
        except RuntimeError as error:
            refused.append(str(error))

    with shared:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert called(loss)
    assert len(refused) == 1 and not called(loss)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no F.linear_cross_entropy")
@pytest.mark.parametrize("options", [{}, {"reduction": "sum", "label_smoothing": 0.1}, {"linear_bias": torch.ones(7)}])
def test_linear_cross_entropy(options):
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    y = torch.randint(0, 7, (5,))

    def gradients():
        value = F.linear_cross_entropy(x, weight, y, **options)
        return value, torch.autograd.grad(value, (x, weight))

    expected = gradients()
    with fused_ops.patch():
        assert called(gradients)
        found = gradients()
        module = nn.LinearCrossEntropyLoss(4, 7)
        assert called(lambda: module(x, y))
    with fused_ops.patch("cross_entropy", "batch_norm"):
        assert not called(gradients)
    torch.testing.assert_close(found, expected)
    assert not called(gradients)


def test_unknown_name():
    with pytest.raises(ValueError, match="expected names of"):
        fused_ops.patch("softmax")


def test_what_ours_does_not_take_goes_to_pytorch():
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with fused_ops.patch():
        with pytest.raises(TypeError):
            F.cross_entropy(x, y, no_such_argument=1)
        torch.testing.assert_close(
            F.cross_entropy(x, y, label_smoothing=0.1),
            reference := -(x.log_softmax(1) * (F.one_hot(y, 3) * 0.9 + 0.1 / 3)).sum(1).mean(),
        )
    assert reference.dim() == 0


def test_compiled_function():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def step(x, y):
        with fused_ops.patch():
            return F.cross_entropy(F.batch_norm(x, None, None, training=True), y)

    x, y = torch.randn(6, 5), torch.randint(0, 5, (6,))
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x, y), step(x, y))
    assert len(graphs) == 1
    assert "torch.nn.functional" not in graphs[0].code
