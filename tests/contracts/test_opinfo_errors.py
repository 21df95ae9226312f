"""Error type for error type: PyTorch's own error inputs, and its samples with one argument spoilt."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from opinfo_cases import FAMILIES, chosen
from torch.testing._internal.common_methods_invocations import op_db

import fused_ops

SPOILT = {
    "None": lambda t: None,
    "a list": lambda t: t.tolist(),
    "a number": lambda t: 1.5,
    "bool": lambda t: t.bool(),
    "int64": lambda t: t.long(),
    "complex64": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.float().to(torch.float8_e4m3fn),
    "another float": lambda t: t.to(torch.float32 if t.dtype == torch.float64 else torch.float64),
    "a scalar": lambda t: t.flatten()[0] if t.numel() else t.new_zeros(()),
    "one dimension more": lambda t: t.unsqueeze(0),
    "one dimension less": lambda t: t[0],
    "flat": lambda t: t.flatten(),
    "shorter": lambda t: t[:-1],
    "last dimension shorter": lambda t: t[..., :-1],
    "longer": lambda t: torch.cat([t, t]),
    "empty": lambda t: t.new_empty(0),
    "class 99": lambda t: t if t.is_floating_point() else torch.full_like(t, 99),
    "class -1": lambda t: t if t.is_floating_point() else torch.full_like(t, -1),
    "requires grad": lambda t: t.detach().clone().requires_grad_(),
    "sparse": lambda t: t.to_sparse(),
}
NUMBERS = {
    "reduction": ["avg", None, 1],
    "label_smoothing": [2.0, "a", None],
    "ignore_index": [2.5, "a"],
    "momentum": [None, "a"],
    "eps": ["a", 0.0, -1.0],
    "training": ["yes"],
    "no_such_argument": [1],
}
TAKES = {"batch_norm": ("momentum", "eps", "training"), "other": ("reduction", "label_smoothing", "ignore_index")}


def outcome(call):
    """The result, or the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except Exception as error:
            return error


def spoilt_calls(family):
    """(what is wrong, args, kwargs) of every sample with every one of its arguments spoilt in every way."""
    for case in chosen(family, torch.float32, "errors", 12):
        places = [*range(len(case.args)), *case.kwargs]
        for place in places:
            value = case.args[place] if isinstance(place, int) else case.kwargs[place]
            if not isinstance(value, torch.Tensor):
                continue
            for name, change in SPOILT.items():
                try:
                    bad = change(value)
                except (RuntimeError, IndexError, NotImplementedError):
                    continue
                args = [bad if place == i else a for i, a in enumerate(case.args)]
                kwargs = {k: bad if place == k else v for k, v in case.kwargs.items()}
                yield f"{case.name}: {place} is {name}", case, args, kwargs
        for name in (*TAKES.get(family, TAKES["other"]), "no_such_argument"):
            for bad in NUMBERS[name]:
                yield f"{case.name}: {name}={bad!r}", case, list(case.args), case.kwargs | {name: bad}


def theirs(case, family, args, kwargs):
    if family.startswith("linear"):
        return F.linear_cross_entropy(*args, **kwargs)
    return (F.cross_entropy if family == "nll_loss" else case.theirs)(*args, **kwargs)


def is_known(family, name, args, expected, found):
    """What differs on purpose: see docs/reliability.md."""
    refused, accepted = isinstance(found, Exception), not isinstance(found, Exception)
    if "sparse" in name:  # refused, or computed as a dense tensor; PyTorch's error depends on its kernel
        return True
    if isinstance(expected, AttributeError):  # None and lists: it comes from PyTorch's Python code
        return isinstance(found, TypeError)
    if args[0].dim() == 0:
        return isinstance(found, IndexError)
    if family == "batch_norm":
        x = args[0]
        if x.dim() < 2 and isinstance(
            found, IndexError
        ):  # an IndexError, whatever else is wrong; PyTorch lets some tensors without values through
            return True
        if not x.numel() and not isinstance(expected, Exception):  # sizes are checked without values too
            return isinstance(found, RuntimeError)
        return False
    if "weight is" in name and not isinstance(expected, Exception):  # a class weight of another dtype or shape
        return isinstance(found, RuntimeError)
    if accepted and family.startswith("linear"):  # any leading dimensions
        return "expected input with dimensionality 1 or 2" in str(expected)
    return refused and isinstance(found, NotImplementedError) and isinstance(expected, RuntimeError)


@pytest.mark.parametrize("family", FAMILIES)
def test_spoilt_samples_fail_as_pytorch_does(family):
    refused, wrong = 0, []
    for name, case, args, kwargs in spoilt_calls(family):
        expected = outcome(lambda: theirs(case, family, args, kwargs))  # noqa: B023
        found = outcome(lambda: case.ours(*args, **kwargs))  # noqa: B023
        refused += isinstance(expected, Exception)
        if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor) and expected.numel():
            close = {"rtol": 1e-4, "atol": 1e-4, "equal_nan": True, "check_layout": False}
            torch.testing.assert_close(found, expected, **close, msg=lambda m: f"{name}: {m}")  # noqa: B023
        elif type(expected) is not type(found) and not is_known(family, name, args, expected, found):
            wrong.append(f"{name}: PyTorch {expected!r:.90}, ours {found!r:.90}")
    assert not wrong, "\n".join([f"{len(wrong)}", *wrong[:30]])
    assert refused > 50


@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_error_inputs_of_linear_cross_entropy(chunk_rows):
    """All but inputs of three dimensions, which ours take."""
    for info in op_db:
        if info.name != "nn.functional.linear_cross_entropy":
            continue
        for bad in info.error_inputs("cpu"):
            sample = bad.sample_input
            call = partial(fused_ops.linear_cross_entropy, sample.input, *sample.args, **sample.kwargs)
            found = outcome(partial(call, chunk_rows=chunk_rows))
            assert type(found) is bad.error_type or "got 3" in bad.error_regex, (bad, found)
