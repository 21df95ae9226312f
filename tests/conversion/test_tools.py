"""Converted models in the hands of PyTorch's tools: they work as with PyTorch's modules, or say what to do."""

import copy
import warnings

import pytest
import torch
from test_convert import network
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fused_ops
from fused_ops.core import graph
from fused_ops.ops.batch_norm import arguments


def plain():
    """Two batch norms, one of them before an activation."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)
    )


def both(build=plain):
    theirs = build()
    ours = copy.deepcopy(theirs)
    fused_ops.convert(ours)
    return theirs, ours


X = torch.randn(2, 3, 6, 6)


# --- Graphs -----------------------------------------------------------------------------------------------------------


def test_batch_norms_are_leaves_of_torch_fx():
    theirs, ours = both(network)
    graphs = [fx.symbolic_trace(model.eval()) for model in (theirs, ours)]
    nodes = [
        [node.target for node in g.graph.nodes if "bn" in str(node.target) or str(node.target) == "1"] for g in graphs
    ]
    assert nodes[0] == nodes[1] and len(nodes[0]) == 5
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(graphs[1](x), theirs(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
def test_jit_trace_holds_pytorchs_ops(training):
    theirs, ours = (model.train(training) for model in both())
    traced = torch.jit.trace(ours, X, check_trace=False)
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert kinds.count("aten::batch_norm") == 2 and kinds.count("aten::leaky_relu") == 1
    ours.load_state_dict(theirs.state_dict())
    for _ in range(2):
        torch.testing.assert_close(traced(X), theirs(X))
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_compile_with_and_without_gradients(training, gradients):
    theirs, ours = (model.train(training) for model in both())
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(compiled(X), theirs(X))
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


class SaysCuda:
    is_cuda = True


def test_who_serves_a_graph(monkeypatch):
    """A compiled graph on CUDA holds PyTorch's op; ONNX's does anywhere; any other holds ours."""
    compiling = {"is_compiling": False, "is_dynamo_compiling": False}
    for name in compiling:
        monkeypatch.setattr(torch.compiler, name, lambda name=name: compiling[name])
    assert not graph.left_to_pytorch(SaysCuda()) and not graph.left_to_pytorch(X)  # eager
    compiling.update(is_compiling=True, is_dynamo_compiling=True)
    assert graph.left_to_pytorch(SaysCuda()) and not graph.left_to_pytorch(X)
    compiling.update(is_dynamo_compiling=False)  # torch.export
    assert not graph.left_to_pytorch(SaysCuda()) and not graph.left_to_pytorch(X)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert graph.left_to_pytorch(X)


OPTIONS = [{}, {"activation": "relu"}, {"activation": "elu", "alpha": 0.5}, {"activation": "gelu", "residual": True}]
OPTIONS += [{"activation": a} for a in ("silu", "tanh", "sigmoid", "hardswish")]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_pytorchs_ops_do_the_same(options, training, monkeypatch):
    results = []
    for left in (False, True):
        torch.manual_seed(0)
        x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
        running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        given = {**options, "residual": x.cos()} if "residual" in options else options
        if left:
            monkeypatch.setattr("fused_ops.ops.batch_norm.api.left_to_pytorch", lambda input: True)
            monkeypatch.setattr("fused_ops.ops.batch_norm.arguments.way_of", lambda *args: arguments.Way.FUNCTION)
        y = fused_ops.batch_norm(x, *running, None, None, training, **given)
        results.append((y.detach(), torch.autograd.grad(y.sin().sum(), x), running))
    torch.testing.assert_close(results[1], results[0])


def test_onnx():
    pytest.importorskip("onnxscript")
    theirs, ours = (model.eval() for model in both())
    program = torch.onnx.export(ours, (X,), dynamo=True, verbose=False)
    kinds = [node.op_type for node in program.model.graph]
    assert "BatchNormalization" in kinds and not any("fused" in kind.lower() for kind in kinds)
    torch.testing.assert_close(program.call_reference({"input": X})[0], theirs(X), rtol=1e-4, atol=1e-5)


# --- Tools that make other modules of batch norms ---------------------------------------------------------------------


def test_sync_batch_norm():
    theirs, ours = both(network)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert type(synchronised[1]) is nn.SyncBatchNorm and type(synchronised[3].bn1) is nn.SyncBatchNorm
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(synchronised.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("options", [{"activation": "relu"}, {"groups": 2}, {"frozen": True}, {"correction": 1}])
def test_sync_batch_norm_does_not_lose_options(options):
    (name, value) = next(iter(options.items()))
    model = nn.Sequential(fused_ops.BatchNorm2d(3, **options))
    with pytest.raises(RuntimeError, match=f"convert_sync_batchnorm: nn.SyncBatchNorm has no {name}={value!r}"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[0]) is fused_ops.BatchNorm2d


def test_fuse_conv_bn_eval():
    theirs, ours = (model.eval() for model in both())
    fused = fuse_conv_bn_eval(ours[0], ours[1])
    torch.testing.assert_close(fused(X), theirs[1](theirs[0](X)))
    with pytest.raises(RuntimeError, match="fuse_conv_bn_eval: a convolution has no activation='relu'"):
        fuse_conv_bn_eval(nn.Conv2d(3, 4, 3).eval(), fused_ops.BatchNorm2d(4, activation="relu").eval())


def test_quantisation_says_revert_first():
    quantization = pytest.importorskip("torch.ao.quantization")
    from torch.ao.quantization import quantize_fx

    mapping = quantization.get_default_qconfig_mapping()
    for model in (both()[1].eval(), nn.Sequential(nn.Conv2d(3, 4, 3), fused_ops.BatchNorm2d(4)).eval()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(RuntimeError, match=r"fused_ops.revert\(model\) first"):
                quantization.fuse_modules(model, [["0", "1"]])
            with pytest.raises(RuntimeError, match=r"fused_ops.revert\(model\) first"):
                quantize_fx.prepare_fx(model, mapping, (X,))
    model = both()[1].eval()
    fused_ops.revert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert type(quantization.fuse_modules(model, [["0", "1"]])[1]) is nn.Identity


def test_attributes_that_are_not_there():
    with pytest.raises(AttributeError, match="no attribute 'parametrizations'"):
        _ = fused_ops.BatchNorm2d(3).parametrizations
    assert fused_ops.BatchNorm2d(3, activation="relu").running_mean.shape == (3,)


# --- Memory formats ---------------------------------------------------------------------------------------------------


def sliced(x, format):
    big = torch.randn(x.size(0), x.size(1) + 3, *x.shape[2:]).contiguous(memory_format=format)
    return big[:, 1 : 1 + x.size(1)]


def stepped(x, format):
    big = torch.randn(*x.shape[:-1], 2 * x.size(-1)).contiguous(memory_format=format)
    return big[..., ::2]


LAST, LAST3 = torch.channels_last, torch.channels_last_3d
LAYOUTS = {
    "transposed length": torch.randn(4, 5, 3).transpose(1, 2),
    "batch last": torch.randn(3, 5, 4).permute(2, 0, 1),
    "channels_last": torch.randn(4, 3, 5, 6).contiguous(memory_format=LAST),
    "channels sliced": sliced(torch.randn(4, 3, 5, 6), LAST),
    "width stepped": stepped(torch.randn(4, 3, 5, 6), LAST),
    "batch stepped": torch.randn(8, 3, 5, 6).contiguous(memory_format=LAST)[::2],
    "contiguous, sliced": sliced(torch.randn(4, 3, 5, 6), torch.contiguous_format),
    "height and width swapped": torch.randn(4, 3, 5, 6).transpose(2, 3),
    "swapped in channels_last": torch.randn(4, 3, 5, 6).contiguous(memory_format=LAST).transpose(2, 3),
    "expanded": torch.randn(1, 3, 5, 6).expand(4, -1, -1, -1),
    "channels_last_3d, sliced": sliced(torch.randn(2, 3, 4, 5, 6), LAST3),
    "a channels_last view": torch.randn(4, 5, 6, 3).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_strides_are_pytorchs(name, training):
    x = LAYOUTS[name]
    theirs = getattr(nn, f"BatchNorm{x.dim() - 2}d")(x.size(1)).train(training)
    ours = nn.Sequential(copy.deepcopy(theirs), nn.ReLU(), copy.deepcopy(theirs))
    fused_ops.convert(ours)
    expected = theirs(x)
    for found, wanted in ((ours[0](x), expected), (ours[:2](x), expected.relu()), (ours(x), theirs(expected.relu()))):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert found.stride() == wanted.stride()
