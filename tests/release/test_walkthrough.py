"""The walk-through's numbers, and how it takes bad input."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import NAMES, ROOT

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
from fused_ops.examples.backprop_by_hand import data as names_data
from fused_ops.examples.backprop_by_hand import network, training
from fused_ops.examples.backprop_by_hand.by_hand import tanh_two_roundings
from fused_ops.examples.backprop_by_hand.gradients import GRADIENTS, fused_pairs, staged_pairs

from fused_ops import __main__ as command_line
from fused_ops.testing import compare_gradients

needs_names = pytest.mark.skipif(not NAMES.exists(), reason="the shared data set names.txt is not on this machine")
MAKERS = {"by hand": training.ByHand, "Functions": training.with_functions, "eager": training.with_eager}


@pytest.fixture(scope="module")
def names():
    return names_data.build(names_data.read_names(NAMES))


@pytest.fixture(scope="module")
def default():
    pytest.importorskip("pyarrow")
    return names_data.build(names_data.us_first_names())


def first_minibatch(data, hidden=network.HIDDEN):
    p, generator = network.Parameters.draw(len(data.vocabulary), hidden)
    ix = torch.randint(0, len(data.train), (network.BATCH,), generator=generator)
    return p, ix, data.train.contexts[ix], data.train.targets[ix]


@needs_names
def test_data_set(names):
    shapes = [tuple(split.contexts.shape) for split in (names.train, names.dev, names.test)]
    assert shapes == [(182625, 3), (22655, 3), (22866, 3)]
    assert names.vocabulary.characters == ".abcdefghijklmnopqrstuvwxyz"


@needs_names
def test_network_and_first_minibatch(names):
    p, ix, x, y = first_minibatch(names)
    assert p.count() == 4137
    assert ix[:4].tolist() == [105228, 83077, 43964, 35274]
    assert network.staged_forward(p, x, y)["loss"].item() == pytest.approx(3.5571470, abs=5e-7)


@needs_names
def test_all_26_gradients_are_exact(names):
    p, _, x, y = first_minibatch(names)
    result = compare_gradients(staged_pairs(p, x, y), quiet=True)
    assert (len(result.rows), result.exact, result.approximate) == (26, 26, 26)
    result = compare_gradients(staged_pairs(p, x, y, tanh_two_roundings), quiet=True)
    assert (result.exact < 26, result.approximate) == (True, 26)


def test_all_26_gradients_on_the_default_names(default):
    p, _, x, y = first_minibatch(default)
    result = compare_gradients(staged_pairs(p, x, y), quiet=True)
    assert tuple(row.name for row in result.rows) == GRADIENTS
    assert (len(result.rows), result.approximate) == (26, 26)
    assert [row.name for row in result.rows if row.near_zero] == ["logit_maxes", "b1"]


def test_one_step_formulas_and_kernels(default):
    p, _, x, y = first_minibatch(default)
    for pairs in fused_pairs(p, x, y):
        result = compare_gradients(pairs, quiet=True)
        assert result.approximate == len(result.rows) > 0
        assert not any(row.near_zero for row in result.rows)


def run(data, make, steps, hidden=network.HIDDEN):
    p, generator = network.Parameters.draw(len(data.vocabulary), hidden)
    result = training.train(make(p), data.train, generator, steps, "test")
    assert len(result.losses) == steps and not result.interrupted
    return p, training.calibrate(p, data.train)


@needs_names
@pytest.mark.parametrize("way", ["by hand", pytest.param("Functions", marks=pytest.mark.slow)])
def test_losses_after_20000_steps(names, way):
    trained = run(names, MAKERS[way], 20000)[1]
    assert trained.loss(names.train) == pytest.approx(2.2346, abs=2e-3)
    assert trained.loss(names.dev) == pytest.approx(2.2368, abs=2e-3)


@needs_names
@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "train", "dev"), [(64, 2.1478, 2.1590), (200, 2.0711, 2.1119)])
def test_losses_after_200000_steps(names, hidden, train, dev):
    trained = run(names, training.ByHand, 200000, hidden)[1]
    assert trained.loss(names.train) == pytest.approx(train, abs=2e-3)
    assert trained.loss(names.dev) == pytest.approx(dev, abs=2e-3)


def test_training_by_hand_is_training_with_functions(default):
    ours, functions = (run(default, MAKERS[way], 300)[0] for way in ("by hand", "Functions"))
    for name, parameter in ours.named().items():
        torch.testing.assert_close(parameter, functions.named()[name].detach(), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("way", list(MAKERS))
def test_training_learns(default, way):
    p, generator = network.Parameters.draw(len(default.vocabulary))
    losses = torch.stack(training.train(MAKERS[way](p), default.train, generator, 1000, "test").losses)
    assert losses[-200:].mean() < losses[:50].mean() - 0.3


def test_minibatches_are_those_of_one_draw_a_step(default):
    together = torch.Generator().manual_seed(1)
    steps = training.DRAW_STEPS + 7
    drawn = list(training.minibatches(default.train, together, steps))
    apart = torch.Generator().manual_seed(1)
    assert len(drawn) == steps
    for x, y in drawn:
        ix = torch.randint(0, len(default.train), (network.BATCH,), generator=apart)
        assert torch.equal(x, default.train.contexts[ix]) and torch.equal(y, default.train.targets[ix])


def demo(run_python, tmp_path, *arguments):
    return run_python("-m", "fused_ops", "demo", *arguments, cwd=tmp_path, check=False)


def test_demo_from_end_to_end(run_python, tmp_path):
    result = demo(run_python, tmp_path, "--steps", "300", "--hidden", "16", "--start", "ma", "--out", "pictures")
    assert result.returncode == 0, result.stderr
    assert (
        sum(line.count("|") >= 4 and line.split("|")[0].strip() in GRADIENTS for line in result.stdout.splitlines())
        == 26
    )
    assert re.search(r"26 gradients: \d+ exact, 26 approximate", result.stdout)
    for split in ("train", "dev  ", "test "):
        assert f"{split} loss " in result.stdout
    sampled = result.stdout.split("sampled names: ")[1].split("figures:")[0].replace("\n", " ").split(", ")
    assert len(sampled) == 20 and all(name.strip().startswith("ma") for name in sampled)
    pictures = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert pictures == {"gradient_differences.png", "loss.png", "side_by_side.png"}
    for path in (tmp_path / "pictures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.fixture
def refused(monkeypatch, tmp_path, capsys):
    """What the demo says that takes none of it, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            status = command_line.main(["demo", *arguments])
        except SystemExit as end:
            status = end.code
        assert status == 2
        return "".join(capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, ["--names", "names"], "--names: no such file: names"),
        ("", ["--names", "names"], "--names: names holds no names"),
        ("\n \n", ["--names", "names"], "--names: names holds no names"),
        ("anna\n" * 9, ["--names", "names"], "expected at least 10 names so that every split has some, got 9"),
        ("an.na\n" * 20, ["--names", "names"], "name 1 of names, 'an.na', holds '.'"),
        ("anna\n" * 20, ["--names", "names", "--start", "ax"], "'ax' holds 'x', which is not among the data's: 'an'"),
        ("anna\n" * 20, ["--names", "names", "--steps", "0"], "argument --steps: expected at least 1, got 0"),
        ("anna\n" * 20, ["--names", "names", "--steps", "many"], "expected a whole number, got 'many'"),
        ("anna\n" * 20, ["--names", "names", "--hidden", "-3"], "argument --hidden: expected at least 1, got -3"),
        ("anna\n" * 20, ["--names", "names", "--out", "names"], "--out: cannot make names"),
    ],
)
def test_bad_input_is_answered_clearly(refused, content, arguments, message):
    if content is not None:
        Path("names").write_text(content)
    assert message in refused(*arguments)


def test_undecodable_names(refused):
    Path("names").write_bytes(b"\xff\xfe\x00a" * 20)
    assert "--names: cannot read names" in refused("--names", "names")


def test_ctrl_c_keeps_what_was_trained(tmp_path):
    (tmp_path / "names").write_text("anna\nemma\nolivia\nava\n" * 20)
    command = [sys.executable, "-m", "fused_ops", "demo", "--names", "names", "--steps", "100000000"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits "ignored"
    try:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        )
    finally:
        signal.signal(signal.SIGINT, heard)
    deadline, said = time.monotonic() + 120, ""
    while "by hand" not in said.rpartition("Step 4")[2] and time.monotonic() < deadline:
        said += process.stdout.read(1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "interrupted: kept the " in said and "Traceback" not in said
    assert "dev   loss " in said and "sampled names: " in said
    assert (tmp_path / "demo" / "loss.png").exists()
