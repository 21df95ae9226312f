"""Batch norm's CUDA kernels that keep the output instead of the input, on the CPU by tests/cuda_host."""

import pytest
import torch
from test_batch_norm_inplace import ACTIVATIONS, DTYPES, LAYOUTS, check, values
from test_cuda_host_ops import call_with

from fused_ops.ops.batch_norm import activations
from fused_ops.ops.batch_norm import keep_output_reference as reference

SLOPES = {"elu": 1.3, "leaky_relu": 0.2, None: 0.0}
MORE = {**LAYOUTS, "odd planes": (40, 3, 5, 7), "long": (2, 3, 5001), "many columns": (600, 24)}


class Kept:
    """One call: its tensors, what its forward gave, and what each way of keeping its output finds."""

    def __init__(self, layout, dtype, activation, groups=1, masked=False):
        self.x, self.g, self.w, self.b = values(MORE[layout], layout, dtype)
        self.code, self.slope, self.groups = activations.CODES[activation], SLOPES[activation], groups
        self.valid = torch.rand(self.x.shape[:1] + self.x.shape[2:]) < 0.7 if masked else None
        numbers = {"activation": self.code, "slope": self.slope, "valid": self.valid, "groups": groups}
        self.y, self.statistics = torch.ops.fused_ops.batch_norm_forward(self.x, None, None, self.w, self.b, **numbers)

    def to(self, device):
        moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in vars(self).items()}
        call = object.__new__(Kept)
        vars(call).update(moved)
        return call

    def keep(self, op):
        return op(self.y, self.x, self.w, self.b, self.valid, self.code, self.slope, self.groups)

    def backward(self, op, kept, needs=(True, True), training=True):
        given = self.g, self.y, self.w, self.b, self.statistics, *kept, training, *needs, 0, self.code, self.slope
        return op(*given, self.valid, self.groups)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", MORE)
@pytest.mark.parametrize("groups", [1, 2])
def test_kernel_equals_reference(host_ops, cuda_host, layout, activation, dtype, groups):
    call = Kept(layout, dtype, activation, groups, masked=layout in ("planes", "few channels last", "many columns"))
    keep, backward = host_ops["batch_norm_keep"], host_ops["batch_norm_keep_backward"]
    cuda_host.cuda_host_launches()
    kept = call.keep(keep)
    assert cuda_host.cuda_host_launches() == 4
    wanted = call.keep(reference.keep)
    assert torch.equal(kept[0], wanted[0]) and 0 < kept[0].numel() < call.x.numel()
    found = call.backward(backward, kept)
    for ours, want in zip(found, call.backward(reference.keep_backward, wanted), strict=True):
        scale, roundings = float(want.abs().max()), 100 if dtype == torch.float64 else 4
        assert (ours.double() - want.double()).abs().max() <= roundings * torch.finfo(dtype).eps * scale
    assert found[0].stride() == call.y.stride()
    cuda_host.cuda_host_set_order(1)  # no bit depends on it
    again = (*call.keep(keep), *call.backward(backward, kept))
    cuda_host.cuda_host_set_order(0)
    assert all(torch.equal(a, b) for a, b in zip(again, (*kept, *found), strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_worse_than_eager(host_ops, monkeypatch, dtype, activation, layout, training):
    call_with(monkeypatch, torch.ops.fused_ops_host)
    check([values(LAYOUTS[layout], layout, dtype)], training, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["planes", "channels last"])
def test_in_a_graph_there_is_room_for_all_and_nothing_is_read(host_ops, cuda_host, layout, activation):
    call = Kept(layout, torch.float32, activation)
    kept = call.keep(host_ops["batch_norm_keep"])
    cuda_host.cuda_host_set_capturing(1)
    try:
        captured = call.keep(host_ops["batch_norm_keep"])
    finally:
        cuda_host.cuda_host_set_capturing(0)
    count = kept[0].numel()
    assert captured[0].numel() == call.x.numel() and torch.equal(captured[0][:count], kept[0])
    found = [call.backward(host_ops["batch_norm_keep_backward"], k) for k in (kept, captured)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    rebuilt = [
        reference.rebuild(call.y, call.w, call.b, call.statistics, k[0], call.code, call.slope, 1)
        for k in (kept, captured)
    ]
    assert torch.equal(*rebuilt)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_needed_is_not_stored_or_computed(host_ops, cuda_host, activation):
    call = Kept("planes", torch.float32, activation)
    keep, backward = host_ops["batch_norm_keep"], host_ops["batch_norm_keep_backward"]
    kept = call.keep(keep)
    whole = call.backward(backward, kept)
    for needs in ((True, False), (False, True), (False, False)):
        found = call.backward(backward, kept, needs)
        for ours, full, need in zip(found, whole, (needs[0], needs[1], needs[1]), strict=True):
            assert torch.equal(ours, full) if need else ours.numel() == 0
    call.w, call.b = torch.ones(4), torch.zeros(4)
    call.y = call.y.abs()
    assert [t.numel() for t in call.keep(keep)] == [0, 0]
    cuda_host.cuda_host_launches()
    none = keep(call.y, call.x, None, None, None, call.code, call.slope, 1)
    assert [t.numel() for t in none] == [0, 0] and (cuda_host.cuda_host_launches() == 0) == (activation != "elu")


def test_stored_values_of_another_call_are_refused_or_left_out(host_ops):
    call = Kept("planes", torch.float32, None)
    stored, offsets = call.keep(host_ops["batch_norm_keep"])
    backward = host_ops["batch_norm_keep_backward"]
    with pytest.raises(RuntimeError, match="offsets must have"):
        call.backward(backward, (stored, offsets[:-1]))
    with pytest.raises(RuntimeError, match="offsets must have"):
        call.backward(backward, (stored, offsets[:0]))
    assert call.backward(backward, (stored[:1], offsets))[0].isfinite().all()  # nothing beyond `stored` is read
