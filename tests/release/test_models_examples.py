"""The examples run, learn, and learn the same with both backends."""

import importlib.util
import re
from functools import partial

import pytest
import torch
from conftest import ROOT


def outcome(run_python, tmp_path, module, backend, *arguments):
    result = run_python("-m", f"examples.{module}", "--backend", backend, "--out", str(tmp_path), *arguments, cwd=ROOT)
    assert (tmp_path / f"{module}_{backend}.png").stat().st_size > 5000
    found = re.search(rf"{backend}: loss ([\d.]+)", result.stdout)
    return float(found[1]), result.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")
def test_resnet_digits(run_python, tmp_path):
    for backend in ("torch", "fused"):
        _, text = outcome(run_python, tmp_path, "resnet_digits", backend, "--epochs", "3")
        assert float(re.search(r"test accuracy ([\d.]+)", text)[1]) > 0.9
    assert "(4 with relu, 3 with add, relu)" in text


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")
def test_resnet_digits_takes_the_same_steps(capsys):
    """In float64: in float32 a ReLU's input within rounding of zero may fall to either side, and losses move apart."""
    from fused_ops.examples.resnet_digits import train

    torch.set_default_dtype(torch.float64)
    try:
        losses = [train(backend, epochs=1)[0] for backend in ("torch", "fused")]
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(losses[0]) == 22 and losses[0][-1] < 0.5 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)


@pytest.mark.slow
def test_names_gpt(run_python, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["anna", "bob", "carla", "dora", "emma", "otto", "nina", "leo", "lena", "nora"] * 4))
    losses = [
        outcome(run_python, tmp_path, "names_gpt", backend, "--names", str(names), "--steps", "80")[0]
        for backend in ("torch", "fused")
    ]
    assert losses[0] < 2.0  # untrained: ln 13 = 2.6
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.parametrize("letters", [1, 2])
def test_names_gpt_takes_the_same_steps_without_logits(letters):
    """The loss of every step, with a head that is cut in chunks too: within rounding that grows from step to step."""
    from fused_ops.examples import names_gpt
    from fused_ops.examples.backprop_by_hand.data import Vocabulary

    names = ["anna", "bob", "carla", "dora", "emma", "otto", "nina", "leo", "lena", "nora", "maximilian"] * 8
    vocabulary = Vocabulary.of(names)
    x, y = names_gpt.encode(names, vocabulary, letters)

    def losses(dtype, linear, **options):
        torch.manual_seed(0)
        model = names_gpt.Gpt(len(vocabulary) ** letters, x.size(1), linear=linear).to(dtype)
        if options:
            whole = names_gpt.fused_ops.linear_cross_entropy
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(names_gpt.fused_ops, "linear_cross_entropy", partial(whole, **options))
                return names_gpt.train(model, x, y, 20, "linear")[0]
        return names_gpt.train(model, x, y, 20, "torch")[0]

    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        expected = losses(dtype, False)
        assert expected[-1] < 0.95 * expected[0]
        for options in ({}, {"chunk_rows": 50}, {"max_memory_bytes": 10000}):
            assert losses(dtype, True, **options) == pytest.approx(expected, rel=tolerance)


@pytest.mark.slow
def test_names_gpt_compares(run_python, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["anna", "bob", "carla", "dora"] * 4))
    options = ["--names", str(names), "--steps", "5", "--letters", "2", "--out", str(tmp_path)]
    text = run_python("-m", "examples.names_gpt", "--compare", *options, cwd=ROOT).stdout
    assert float(re.search(r"largest difference of a step's loss: (\S+)", text)[1]) < 1e-4
    assert (tmp_path / "names_gpt_compared.png").stat().st_size > 5000 and "MiB peak" in text


def test_names_gpt_says_what_is_wrong(run_python, tmp_path):
    result = run_python("-m", "examples.names_gpt", "--names", str(tmp_path / "none.txt"), cwd=ROOT, check=False)
    assert result.returncode == 1 and "no such file" in result.stderr and "Traceback" not in result.stderr
