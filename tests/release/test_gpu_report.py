"""What ``make gpu-report`` runs on a machine with a GPU, as far as a machine without one can tell."""

import importlib.machinery
import importlib.util
import inspect
import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import fused_ops
from benchmarks import __main__ as command_line
from benchmarks import cases, gpu_heads, gpu_losses, gpu_rows, gpu_training, harness, rivals
from fused_ops.ops.linear_cross_entropy.plan import chosen_rows


@pytest.fixture(scope="module")
def gpu_report():
    loader = importlib.machinery.SourceFileLoader("gpu_report", str(ROOT / ".ci" / "gpu_report"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_report", loader))
    loader.exec_module(module)
    return module


def test_a_step_that_fails_does_not_stop_the_next(gpu_report, monkeypatch, tmp_path, capfd):
    made = [
        gpu_report.Step("fails", "one", [sys.executable, "-c", "print('one'); raise SystemExit(3)"]),
        gpu_report.Step("missing", "two", ["no-such-program"]),
        gpu_report.Step("hangs", "three", [sys.executable, "-c", "import time; time.sleep(60)"], 1),
        gpu_report.Step(
            "works", "four", [sys.executable, "-c", "import os; print(os.environ['X'])"], 60, {"X": "four"}
        ),
    ]
    monkeypatch.setattr(gpu_report, "steps", lambda: made)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_report.main([]) == 1
    said = capfd.readouterr().out
    summary = said[said.index("== summary") :]
    for line in ("fails", "failed with status 3", "missing", "not run", "hangs", "stopped after 1 s", "works", "ok"):
        assert line in summary
    assert (tmp_path / "works.log").read_text() == "four\n"
    assert gpu_report.main(["works"]) == 0
    with pytest.raises(SystemExit):
        gpu_report.main(["no-such-step"])


def test_its_commands_exist(gpu_report, run_python, capsys):
    assert gpu_report.main(["--list"]) == 0
    listed = capsys.readouterr().out
    steps = {step.name: step for step in gpu_report.steps()}
    assert all(step.name in listed for step in steps.values())
    for step in steps.values():
        words = step.command[1:]
        if words[:2] == ["-m", "benchmarks"]:
            assert command_line.parser().parse_args(words[2:]).device == "cuda"
        if "pytest" in words:
            arguments = words[words.index("pytest") + 1 :]
            collected = run_python("-m", "pytest", *arguments, "--collect-only", "-p", "no:cacheprovider", cwd=ROOT)
            assert ("nccl" if step.name == "ranks" else "test_sanitized_samples") in collected.stdout
            break
    assert {*gpu_report.FIRST, *gpu_report.SECOND} <= set(steps)
    assert sum(steps[name].limit_s for name in gpu_report.FIRST if name in ("heads", "tests")) <= 6 * 60
    assert set(gpu_report.RIVALS) <= set(rivals.OPTIONAL)
    assert set(gpu_report.OPS) <= set(cases.modules())


def fake(monkeypatch, path, function):
    """A module of a rival that has this function."""
    module_name, name = path.split(":")
    module = types.ModuleType(module_name)
    setattr(module, name, function)
    parts = module_name.split(".")
    for i in range(1, len(parts)):
        parent = ".".join(parts[:i])
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, module_name, module)


def liger(input, target, weight=None, label_smoothing=0.0, reduction="mean"):
    return F.cross_entropy(input, target, weight, label_smoothing=label_smoothing, reduction=reduction)


def flash(logits, labels, precomputed_lse=None, label_smoothing=0.0):
    rows = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    return rows, torch.zeros_like(rows)


def quack(x, target, lse_partial=None, weight=None, ignore_index=-100, reduction="mean"):
    return F.cross_entropy(x, target, weight, ignore_index=ignore_index, reduction=reduction)


class Apex:
    @staticmethod
    def apply(logits, labels, smoothing, padding_idx, half_to_float):
        return F.cross_entropy(
            logits, labels, label_smoothing=smoothing, ignore_index=padding_idx, reduction="none"
        ).float()


def linear(input, weight, target):
    return F.cross_entropy(F.linear(input, weight), target)


FAKES = {
    ("liger-kernel", "cross_entropy"): liger,
    ("flash-attn", "cross_entropy"): flash,
    ("quack-kernels", "cross_entropy"): quack,
    ("apex", "cross_entropy"): Apex,
    ("liger-kernel", "linear_cross_entropy"): linear,
}


@pytest.mark.slow
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_adapters_call_the_rivals_as_they_are_called(op, monkeypatch):
    monkeypatch.setattr(rivals, "missing", lambda name, device: "not here" if name == "jax" else "")
    wanted = {name: path for name, calls in rivals.CALLS.items() for o, path in calls.items() if o == op}
    for name, path in wanted.items():
        fake(monkeypatch, path, FAKES[name, op])
    seen = set()
    for case in cases.all_cases("cuda", [op]):
        small = case.shape[0] * case.shape[1] <= 1 << 20 and "128256" not in case.name and case.part != "sweep"
        if not small and "=" not in case.name:
            continue
        by_name = {p.name: p for p in case.providers}
        tiny = len(case.shape) == 2 and (case.shape[0] <= 256 or case.shape == (1024, 512))
        for name in wanted:
            provider = by_name.get(name)
            if provider is None or provider.missing or not tiny:
                continue
            inputs = case.inputs("cpu")
            found = harness.make_runner(case, provider, inputs, 1).results()
            expected = harness.make_runner(case, by_name[harness.TRUTH], inputs, 1).results()
            torch.testing.assert_close(found["output"].float(), expected["output"].float())
            torch.testing.assert_close(found["grad_input"], expected["grad_input"])
            seen.add(name)
    assert seen == set(wanted)


def test_a_rival_without_an_option_or_a_function_says_so(monkeypatch):
    monkeypatch.setattr(rivals, "missing", lambda name, device: "")
    fake(monkeypatch, rivals.CALLS["quack-kernels"]["cross_entropy"].replace(":cross_entropy", ":other"), quack)
    assert "has no cross_entropy" in rivals.call("quack-kernels", "cross_entropy", "cuda")[1]
    fake(monkeypatch, rivals.CALLS["flash-attn"]["cross_entropy"], flash)
    weighted = cases.find("cross_entropy", "1024x32000 float32 weight", "cuda")
    assert {p.name: p.missing for p in weighted.providers}["flash-attn"] == "has no weight"


@pytest.mark.parametrize("rows", [0, 1, 1000, 1025, 8192, 100_003])
@pytest.mark.parametrize("row_bytes", [0, 54, 64_000, 256_512])
@pytest.mark.parametrize("summed", [0, 64, 4096])
def test_chunks_on_a_gpu_are_alike_and_enough_for_the_products(rows, row_bytes, summed):
    chosen = chosen_rows(rows, row_bytes, 50 << 20, summed)
    chunks = -(-rows // chosen)
    assert 1 <= chosen <= max(rows, 1)
    assert chunks <= 1 or chosen >= (2048 if summed else 1024) // 2
    assert chunks <= 1 or rows > 2 * summed
    assert chosen * (chunks - 1) < rows or rows == 0


def once(run, device):
    run()
    return [1.0]


def test_the_heads_of_a_gpu_are_measured_row_by_row(tmp_path, monkeypatch):
    """Small ones, here: every question has an answer, or says why not, and what is known is in the file at once."""
    lines = []
    written = gpu_rows.figures

    def watched(*args):
        lines.append(len(json.loads((tmp_path / "heads.json").read_text())) if lines else 0)
        return written(*args)

    monkeypatch.setattr(gpu_rows, "figures", watched)
    monkeypatch.setattr(gpu_rows, "timed", once)
    gpu_rows.main("", {"heads": gpu_heads.rows}, [str(tmp_path / "heads.json"), "--tiny"])
    rows = json.loads((tmp_path / "heads.json").read_text())
    assert lines == list(range(len(rows)))
    failed = {row["way"] for row in rows if "error" in row}
    assert failed <= {"liger-kernel", "cut-cross-entropy"}
    assert {row["question"] for row in rows} >= {"default", "chunks", "odd vocabulary", "a third ignored", "limits"}


@pytest.mark.parametrize("part", gpu_losses.PARTS)
def test_the_losses_of_a_gpu_are_measured(part, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_rows, "timed", once)
    gpu_rows.main("", gpu_losses.PARTS, [str(tmp_path / "rows.json"), "--tiny", "--part", part])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["part"] for row in rows} == {part} and not [row for row in rows if "error" in row]
    if part == "options":
        taken = {name for _, given, _ in gpu_losses.options(torch.zeros(8, 8)).values() for name in given}
        known = inspect.signature(fused_ops.cross_entropy).parameters
        others = {"input", "target", "size_average", "reduce", "ignore_index"}  # the last by a third that is ignored
        assert set(known) - taken - others == {"class_group", "class_start", "classes", "row_group"}


@pytest.mark.parametrize("name", gpu_training.MODELS)
def test_models_train_alike_before_and_after_convert(name, monkeypatch):
    losses = {way: gpu_training.step_of(name, way, True, "cpu") for way in ("eager", "convert")}
    found = {way: [float(run()) for _ in range(2)] for way, run in losses.items()}
    assert found["convert"] == pytest.approx(found["eager"], rel=2e-2)
    monkeypatch.setattr(gpu_training, "WAYS", ("eager", "convert"))
    monkeypatch.setattr(gpu_rows, "timed", once)
    rows = [{**row, **gpu_rows.figures(make, "cpu")} for row, make in gpu_training.rows(True, "cpu")]
    assert len(rows) == 4 and not [row for row in rows if "error" in row]


def test_what_fails_is_a_row_and_no_end():
    def make():
        raise torch.OutOfMemoryError("too little memory")

    assert "too little memory" in gpu_rows.figures(make, "cpu")["error"]
    assert "too little memory" in gpu_rows.small_figures(make, "cpu")["error"]
