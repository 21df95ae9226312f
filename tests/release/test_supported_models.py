"""The table of supported models: what is counted, how it is compared, and the page that is written from it."""

import pytest
import torch
from torch import nn

import fused_ops
from benchmarks import supported_models
from benchmarks.families import CLASSES, FAMILIES, Family


class Net(nn.Module):
    """Sets what it is guarded by in its first step, as transformers' classifiers do."""

    def __init__(self):
        super().__init__()
        self.kind = None
        self.conv, self.bn, self.relu = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
        self.rest = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        if self.kind is None:
            self.kind = "classifier"
        return self.head(self.rest(self.relu(self.bn(self.conv(x)))))


FAMILY = Family("Net", "timm", lambda _: Net(), lambda _: {"x": torch.randn(4, 3, 66, 66)}, lambda _: torch.arange(4))


@pytest.mark.slow
def test_a_family(monkeypatch):
    monkeypatch.setattr(Family, "missing", "")
    monkeypatch.setattr(supported_models.machine, "set_allocator", lambda choice: None)  # for the rest of the process
    same = {way: 0.0 for way in supported_models.WAYS[1:]}
    monkeypatch.setattr(supported_models, "differences", lambda family, small: same)  # which would compile once more
    before = len(supported_models.records.GRAPHS)
    found = supported_models.measure(FAMILY, True)
    assert len(supported_models.records.GRAPHS) > before + 1  # it was compiled again, and is counted once
    assert found["norms"] == 2 and found["fused"] == {"convert": {"relu": 1}, "backend": {"batch_norm + relu": 2}}
    assert found["step_ratio"]["eager"] == 1.0 and all(ms > 0 for ms in found["step_ms"].values())
    assert found["difference"] is same
    assert all(peak is None or peak >= 0 for peak in found["peak_bytes"].values())
    name = FAMILIES[0].name
    page = supported_models.page({f"timm {name}": found, "timm resnet50": {"missing": "needs timm: make models"}})
    assert f"| {name} | 2 | 1 relu | 2 batch_norm + relu |" in page and "not run: needs timm: make models" in page
    assert len({line.count("|") for line in page.splitlines() if line.startswith("|")}) == 1


@pytest.mark.parametrize("wrong", [lambda m: m.bn.weight.data.mul_(2), lambda m: m.bn.requires_grad_(False)])
def test_a_difference_shows(wrong, monkeypatch):
    def ways(family, small, dtype):
        models = {way: family.build(small).to(dtype) for way in supported_models.WAYS}
        for model in models.values():
            model.load_state_dict(models["eager"].state_dict())
        wrong(models["backend"])
        fused_ops.convert(models["convert"])
        batch = {name: t.to(dtype) for name, t in family.batch(small).items()}
        return {way: supported_models.step(family, small, m, m, batch) for way, m in models.items()}, models

    monkeypatch.setattr(supported_models, "ways", ways)
    if wrong.__code__.co_names[-1] == "requires_grad_":
        with pytest.raises(RuntimeError, match="backend: other gradients than eager's"):
            supported_models.differences(FAMILY, True)
    else:
        found = supported_models.differences(FAMILY, True)
        assert found["convert"] < 1e-12 and found["backend"] > 1e-3


def test_figures_by_hand():
    assert supported_models.median_ratio([1.0, 2.0, 9.0], [1.0, 1.0, 3.0]) == 2.0

    def relative(found, expected, name="weight", **others):
        return supported_models.relative(name, {name: found}, {name: expected, **others})

    assert relative(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0])) == 0.25
    assert relative(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative(torch.empty(0), torch.empty(0)) == 0.0
    noise, variance = torch.tensor([1e-17]), {"norm.running_var": torch.tensor([4.0])}
    assert relative(-noise, noise, "norm.running_mean", **variance) == pytest.approx(1e-17)
    order = []
    steps = {way: (lambda way=way: order.append(way)) for way in "abc"}
    times = supported_models.interleaved(steps, 3)
    assert "".join(order) == "abcbcacab" and {way: len(t) for way, t in times.items()} == {"a": 3, "b": 3, "c": 3}
