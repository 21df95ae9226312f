"""The table of default plans: what it counts is what runs, on tensors without memory; and the page has it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fused_ops
from benchmarks import plans
from fused_ops.ops.cross_entropy.row import RowArgs, RowOptions
from fused_ops.ops.linear_cross_entropy import by_rows
from fused_ops.ops.linear_cross_entropy.plan import Sizes
from fused_ops.ops.linear_cross_entropy.reference import Head

BETWEEN = {  # how often the logits are read or written
    "linear_cross_entropy_chunk_": 2,
    "linear_cross_entropy_tile_sums_": 1,
    "linear_cross_entropy_tile_grads_": 2,
}
CASES = [(head, rows) for head in plans.HEADS for rows in plans.ROWS]


class Count(TorchDispatchMode):
    """Operations and bytes of products, bytes of what the op between them takes, and the largest fresh matrices."""

    def __init__(self):
        super().__init__()
        self.operations = self.moved = 0
        self.fresh = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.operations += left.size(0) * left.size(1) * right.size(1)
            self.moved += nbytes(left) + nbytes(right) + nbytes(out) * (1 if name == "mm" else 2)
        elif name in BETWEEN:
            self.moved += BETWEEN[name] * nbytes(args[0])
        elif name == "copy_" and out.dim() == 2:
            self.moved += nbytes(args[1]) + nbytes(out)
        elif name == "_to_copy" and out.dim() == 2:
            self.moved += nbytes(args[0]) + nbytes(out)
        return out


def nbytes(t):
    return t.numel() * t.itemsize


@pytest.mark.parametrize(("head", "rows"), CASES)
def test_what_is_counted_is_what_runs(head, rows, monkeypatch):
    """As on a GPU: the sum in float32 of chunks of rows, which cuBLAS adds to, is one product's result here."""
    features, classes = plans.HEADS[head]
    sizes = Sizes(rows, features, classes, 1, 2)
    plan = plans.default_plan(sizes, "cuda")
    x, w = (torch.empty(n, features, dtype=torch.bfloat16, device="meta") for n in (rows, classes))
    target = torch.empty(rows, dtype=torch.int64, device="meta")
    made = []
    buffer = by_rows.tiles.buffer
    monkeypatch.setattr(by_rows.tiles, "buffer", lambda *a: made.append(buffer(*a)) or made[-1])

    def add(self, bit, left, right):
        first = bit not in self.accumulated
        if first:
            like = right.new_empty(0, dtype=torch.float32) if self.several else right
            self.accumulated[bit] = by_rows.tiles.buffer(like, left.size(0), right.size(1))
        count.operations += left.size(0) * left.size(1) * right.size(1)
        count.moved += nbytes(left) + nbytes(right) + nbytes(self.accumulated[bit]) * (1 if first else 2)

    monkeypatch.setattr(by_rows.Gradients, "_add", add)
    args, options = RowArgs(None, target, None, None, None), RowOptions()
    with Count() as count:
        by_rows.forward(Head(x, w, None, None, None), args, options, torch.empty(rows, device="meta"), 0.0, plan)
    counted = plans.count(sizes, plan)
    assert count.operations == counted.products * rows * features * classes
    assert count.moved == counted.moved_bytes
    gradient = (
        0 if plan.chunk_rows < rows and not plan.tile_classes else nbytes(w)
    )  # without a sum the gradient itself is a buffer
    assert sum(map(nbytes, made)) - gradient == counted.extra_bytes


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_rows_of_logits_have_the_same_bits(dtype, reduction, positions, monkeypatch):
    """As on a GPU, where rows of an odd vocabulary begin at multiples of 64 logits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 24, generator=generator).to(dtype)
    w = torch.randn(257, *[positions][: positions - 1], 24, generator=generator).to(dtype)
    target = torch.randint(0, 257, (50, *[positions][: positions - 1]), generator=generator)
    target[3] = -100
    strides = []
    product = by_rows.product

    def run(padded):
        monkeypatch.setattr(by_rows.tiles, "is_padded", lambda like: padded)
        monkeypatch.setattr(by_rows, "product", lambda *a: strides.append(a[3].stride()) or product(*a))
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        loss = fused_ops.linear_cross_entropy(*leaves, target, reduction=reduction, chunk_rows=20, z_loss=1e-3)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    plain, padded = run(False), run(True)
    columns = 257 * positions
    assert {stride[0] for stride in strides} == {columns, -(-columns // 64) * 64}
    assert all(torch.equal(a, b) for a, b in zip(plain, padded, strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("head", "rows"), CASES)
def test_no_default_plan_is_a_cliff(head, rows, device):
    """Chunks of no fewer rows than products need, no row computed more than twice, no more memory than eager's."""
    sizes = Sizes(rows, *plans.HEADS[head], 1, 2)
    plan = plans.default_plan(sizes, device)
    count = plans.count(sizes, plan)
    assert 3 <= count.products < 4
    assert plan.tile_classes >= 128 or plan.chunk_rows >= (128 if device == "cpu" else 1024)
    assert count.extra_bytes <= 1.001 * rows * sizes.row_bytes  # all logits, where eager takes their gradient too


def test_the_page_has_the_table():
    page = plans.PAGE.read_text(encoding="utf-8")
    assert plans.MARKER.search(page)
    assert plans.render(page) == page
