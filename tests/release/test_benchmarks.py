"""The benchmark harness: what it times, weighs and judges is what it says it does."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

pytest.importorskip("rich", reason="the bench extra is not installed")
pytest.importorskip("tqdm", reason="the bench extra is not installed")
pytest.importorskip("matplotlib", reason="the bench extra is not installed")

from benchmarks import (
    accuracy,
    cases,
    harness,
    limits,
    machine,
    memory,
    pages,
    plot,
    results,
    rivals,
    run,
    tables,
    targets,
)
from benchmarks.harness import Case, Inputs, Provider


def square(x):
    return (x * x).sum()


def toy(*providers: Provider, **fields) -> Case:
    def inputs(device: str) -> Inputs:
        return Inputs({"x": torch.linspace(-1, 1, 64)}, leaves=("x",), fresh=("x",))

    moved = {"forward": 256, "both": 768}
    default = {"op": "toy", "name": "64", "shape": (64,), "dtype": torch.float32, "inputs": inputs, "formula": "all"}
    return Case(**{**default, "providers": (Provider("eager", square), *providers), "moved_bytes": moved, **fields})


def options(**fields) -> run.Options:
    default = {"ops": (), "parts": run.PARTS, "suite": "full", "rivals": (), "threads": (1,), "device": "cpu"}
    return run.Options(**{**default, **fields})


@pytest.fixture
def passes(monkeypatch):
    """Time passes only by calls of this."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def seconds(s):
        now[0] += s

    return seconds


def test_clock_leaves_out_what_is_paused(passes):
    clock = harness.Clock()
    start = clock()
    passes(0.25)
    clock.pause()
    passes(4)
    clock.resume()
    passes(0.5)
    assert clock() - start == 0.75


def test_preparation_is_not_timed_and_rounds_are_interleaved(passes):
    calls = []

    class Slow:
        def __init__(self, name):
            self.name = name

        def prepare(self, direction):
            passes(0.01)

        def run(self, direction):
            calls.append(self.name)
            passes(0.002)

    timings = harness.time_interleaved(
        {"a": Slow("a"), "b": Slow("b")}, "both", threads=1, budget_s=0, block_s=0.001, rounds=(4, 4)
    )
    assert [len(t.samples_ms) for t in timings.values()] == [4, 4]
    assert all(t.median_ms == pytest.approx(2) for t in timings.values())  # not the 10 ms of the preparation
    order = "".join(name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name)
    assert order.endswith("baba")  # a b, b a, a b, b a: each round has both, and begins with the other one


def test_every_run_sees_fresh_inputs_and_no_old_gradient():
    seen = []

    def spoil(x):
        seen.append((x.detach().clone(), x.grad, x.requires_grad))
        with torch.no_grad():
            x.detach().fill_(7)  # as an op that overwrites its input
        return (x * 1).sum()

    runner = harness.AutogradRunner(spoil, toy().inputs("cpu"))
    for direction in ("both", "both", "forward"):
        runner.prepare(direction)
        runner.run(direction)
    assert all(torch.equal(x, torch.linspace(-1, 1, 64)) and grad is None and needs for x, grad, needs in seen)


@pytest.mark.parametrize("factor, accepted", [(1.0, True), (1.0 + 1e-5, False)])
def test_ours_is_held_to_the_error_rule(factor, accepted):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return square(x)

        @staticmethod
        def backward(ctx, g):
            return 2 * g * factor * ctx.saved_tensors[0]

    case = toy(Provider("fused_ops", lambda x: Scaled.apply(x), strict=True))
    row = next(r for r in run.run_case(case, 1, options()) if r["provider"] == "fused_ops")
    assert (row["status"] == "ok") == accepted
    assert accepted or ("grad_x" in row["status"] and "ms" not in row)


def test_what_is_missing_or_fails_is_reported_and_the_rest_is_timed():
    def fails(x):
        raise RuntimeError("no such luck")

    case = toy(Provider("fused_ops", missing="not offered: no argument y"), Provider("rival", fails))
    rows = {r["provider"]: r for r in run.run_case(case, 1, options())}
    assert rows["fused_ops"]["status"] == "not offered: no argument y"
    assert rows["rival"]["status"] == "failed: RuntimeError: no such luck"
    assert rows["eager"]["status"] == rows["copy"]["status"] == "ok"
    assert rows["eager"]["speedup_vs_eager"] == 1.0
    assert rows["eager"]["gb_per_s"] == pytest.approx(768 / rows["eager"]["ms"] / 1e6, rel=1e-3)
    assert rows["copy"]["copy_fraction"] == 1.0


def test_peak_memory_sees_what_a_run_allocates():
    if not os.access(memory.CLEAR, os.W_OK):
        pytest.skip("this system has no high-water mark to reset")
    size = 64 << 20
    assert memory.peak_extra_bytes(lambda: torch.ones(size, dtype=torch.uint8)) == pytest.approx(size, rel=0.05)
    assert memory.peak_extra_bytes(lambda: None) < size / 20
    kept = [torch.ones(size, dtype=torch.uint8)]
    assert memory.peak_extra_bytes(lambda: kept[0].max()) < size / 2


def huge_kilobytes() -> int:
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return int(re.search(r"AnonHugePages:\s+(\d+) kB", text).group(1))


def test_a_run_without_huge_pages_has_none_and_gives_them_back():
    if pages.missing():
        pytest.skip(pages.missing())
    grown, modes = [], []

    def watch(x):
        before, memory = huge_kilobytes(), torch.ops.fused_ops.linear_cross_entropy_buffer(x, 1 << 10, 1 << 14)
        memory.zero_()
        grown.append(huge_kilobytes() - before)
        modes.append(pages.disable(True))
        return square(x)

    provider = pages.provider(watch)
    assert provider.strict and provider.name == "fused_ops without huge pages" and not provider.missing
    runner = harness.make_runner(toy(provider), provider, toy().inputs("cpu"), 1)
    for _ in range(2):
        runner.prepare("both")
        runner.run("both")
    assert grown == [0, 0] and modes == [True, True]
    assert pages.disable(False)

    def fails(x):
        raise RuntimeError("no such luck")

    runner = pages.WithoutHugePages(fails, toy().inputs("cpu"))
    runner.prepare("both")
    with pytest.raises(RuntimeError, match="no such luck"):
        runner.run("both")
    assert pages.ctypes.CDLL(None).prctl(42, 0, 0, 0, 0) == 0  # they are back


def test_huge_pages_have_a_table_of_their_own(tmp_path):
    known = [case for case in cases.all_cases("cpu", ["cross_entropy"]) if case.part == pages.PART]
    assert {"1024x32000 float32 pages", "8192x1000 float32 pages"} <= {case.name for case in known}
    assert all([p.name for p in case.providers] == ["eager", "fused_ops", pages.WITHOUT] for case in known)
    name = known[0].name
    rows = [
        timing(p, ms, case=name, part=pages.PART, p20_ms=1.0, p80_ms=1.0, speedup_vs_eager=1.0)
        for p, ms in (("eager", [60.0] * 3), ("fused_ops", [10.0] * 3), (pages.WITHOUT, [20.0] * 3))
    ]
    found = {"timings": rows}
    figures = "| 1024x32000 float32 | both | 60 ms | 20 ms | 10 ms | 2.00x | 3.00x | 6.00x |"
    assert figures in tables.pages_table(found)
    assert "vs eager" not in tables.record(found)  # the case itself is in the other tables
    assert plot.speedup_bars(rows, "cross_entropy") is None
    results.save(tmp_path, "full", found)
    page = "<!-- benchmarks:huge_pages -->\n<!-- /benchmarks:huge_pages -->\n"
    assert figures in tables.render(page, [tmp_path])


def test_cases_are_named_once_and_found_again():
    everything = cases.all_cases("cpu")
    assert {"cross_entropy", "batch_norm", "training"} <= {case.op for case in everything}
    assert len(everything) > 60
    for case in everything[::9]:
        assert cases.find(case.op, case.name, "cpu").shape == case.shape
    assert all(p.function or p.make or p.missing for case in everything for p in case.providers)


@pytest.mark.parametrize(("device", "least"), [("cpu", 80), ("cuda", 60)])
def test_every_target_has_its_case(device, least):
    known = {(case.op, case.name): case for case in cases.all_cases(device)}
    stated = targets.all_targets(device)
    assert len(stated) > least
    for target in stated:
        case = known[target.op, target.case]
        names = {p.name for p in case.providers} | {"copy"}
        assert target.provider in names
        assert target.direction in case.directions
        if isinstance(target, targets.SpeedTarget):
            assert target.rival in names
        elif isinstance(target, targets.MemoryTarget):
            assert "full" in case.memory
        else:
            assert target.direction in case.moved_bytes


@pytest.mark.parametrize("op", ["cross_entropy", "batch_norm"])
def test_bytes_follow_the_formula(op):
    case = next(c for c in cases.all_cases("cpu", [op]) if c.part == "micro" and "both" in c.moved_bytes)
    assert case.moved_bytes["forward"] + case.moved_bytes["backward"] == case.moved_bytes["both"]
    inputs = case.inputs("cpu")
    size = inputs.tensors["input"].numel() * inputs.tensors["input"].element_size()
    target = inputs.tensors["target"].numel() * 8 if op == "cross_entropy" else 0
    assert case.moved_bytes["both"] == (3 * size + 2 * target if op == "cross_entropy" else 8 * size)
    assert case.copied == inputs.tensors["input"].numel()


def timing(provider: str, ms: list[float], **fields) -> results.Row:
    row = {"op": "cross_entropy", "case": "1024x32000 float32", "part": "micro", "sweep": "", "tiny": False}
    row |= {"direction": "both", "threads": 2, "isa": "AVX2", "allocator": "default", "device": "cpu"}
    row |= {"status": "ok", "run": "1", "input_bytes": 100}
    return {**row, "provider": provider, "ms": sorted(ms)[len(ms) // 2], "samples_ms": ms, **fields}


def test_speedup_is_the_median_of_ratios_within_rounds():
    eager, ours = timing("eager", [10.0, 40.0, 12.0]), timing("fused_ops", [5.0, 10.0, 2.0])
    assert results.speedup(ours, eager) == 4.0  # of 2, 4, 6
    assert results.speedup({**ours, "run": "2"}, eager) == 12 / 5  # other rounds: of the medians


def test_targets_are_judged():
    rows = [
        timing("eager", [10.0] * 3),
        timing("torch.compile", [3.0] * 3),
        timing("copy", [1.0] * 3),
        timing("fused_ops", [2.0] * 3, extra_bytes=104),
        timing("fused_ops in place", [0.0], status="not offered: no argument inplace_backward"),
    ]
    found = {v.what: v for v in targets.verdicts(rows) if v.case == "1024x32000 float32" and v.direction == "both"}
    assert found["fused_ops vs eager"].status == "reached"
    assert found["fused_ops vs eager"].found == 5
    assert found["fused_ops vs torch.compile"].status == "missed"
    assert found["fused_ops: peak extra memory / input"].status == "reached"
    assert found["fused_ops in place vs eager"].status.startswith("not offered")
    assert found["fused_ops in place: time / copy"].wanted == "<= 1.80"
    fresh = [{**row, "allocator": "fresh", "ms": 1.0, "samples_ms": [1.0]} for row in rows if row["status"] == "ok"]
    both = next(v for v in targets.verdicts([*rows, *fresh]) if v.what == "fused_ops vs eager" and v.found)
    assert (both.found, both.elsewhere) == (5, {"fresh": 1.0})
    elsewhere = [v for v in targets.verdicts(rows) if v.op == "batch_norm"]
    assert elsewhere and all(v.status == "not measured" for v in elsewhere)


def test_what_bounds_a_case_stands_beside_its_target(tmp_path):
    """Of recycled memory where that was measured: 10 ms / 2 ms at half a copy's rate, 1 ms of it arithmetic."""
    limits_of_ours = {"copy_fraction": 0.5, "in_cache_ms": 1.0}
    rows = [timing("eager", [10.0] * 3), timing("fused_ops", [2.0] * 3, **limits_of_ours)]
    verdict = next(v for v in targets.verdicts(rows) if v.what == "fused_ops vs eager" and v.found)
    assert (verdict.by_bytes, verdict.in_cache) == (10, 10)
    again = [{**row, "allocator": "recycled"} for row in rows]
    again[1] |= {"ms": 5.0, "samples_ms": [5.0] * 3}
    verdict = next(v for v in targets.verdicts([*rows, *again]) if v.what == "fused_ops vs eager" and v.found)
    assert (verdict.found, verdict.elsewhere, verdict.by_bytes, verdict.in_cache) == (5, {"recycled": 2}, 4, 10)
    results.save(tmp_path, "full", {"timings": [*rows, *again]})
    page = "<!-- benchmarks:{0} -->\n<!-- /benchmarks:{0} -->\n"
    shown = tables.render(page.format("targets"), [tmp_path])
    assert "| both | fused_ops vs eager | 5.00 |  | 2.00 | 4.00 | 10.00 | >= 5.0x | reached |" in shown
    shown = tables.render(page.format("summary"), [tmp_path])
    assert "| cross_entropy 1024x32000 float32 | 10 ms | 2 ms | 5.00x |  | 2.00x |  |" in shown
    results.save(tmp_path / "other", "quick", {"timings": [{**row, "isa": "AVX512"} for row in [*rows, *again]]})
    shown = tables.render(page.format("instruction_sets"), [tmp_path, tmp_path / "other"])
    assert "| AVX2 | AVX2, recycled memory | AVX512 | AVX512, recycled memory |" in shown
    assert "| cross_entropy 1024x32000 float32 | 5.00x | 2.00x | 5.00x | 2.00x |" in shown
    shown = tables.render(page.format("accuracy"), [tmp_path, tmp_path / "other"])
    assert shown.count("No figures yet") == 1  # not once a machine


@pytest.mark.parametrize("case", [c for c in cases.all_cases("cpu") if c.pieces], ids=lambda c: f"{c.op} {c.name}")
def test_pieces_of_a_case_are_like_it(case):
    one, two = (case.pieces(count, "cpu") for count in (1, 2))
    x, y = one.tensors["input"], two.tensors["input"]
    assert y.dtype == case.dtype and y.dim() == len(case.shape) and two.tensors.keys() == one.tensors.keys()
    assert 1.5 * x.numel() < y.numel() < 2.5 * x.numel() and limits.values(one) == x.numel()
    assert sum(t.numel() * t.element_size() for t in two.tensors.values()) < 4 << 20


def test_the_arithmetic_of_a_case_is_what_a_second_piece_costs(monkeypatch):
    case = next(c for c in cases.all_cases("cpu", ["cross_entropy"]) if c.name == "8192x1000 float32")
    sizes = [limits.values(case.pieces(count, "cpu")) for count in (1, 2)]
    found = {str(sizes[0]): harness.Timing([2.0, 9.0, 2.0]), str(sizes[1]): harness.Timing([3.0, 10.5, 2.5])}
    monkeypatch.setattr(harness, "time_interleaved", lambda *args, **options: found)
    ours = next(p for p in case.providers if p.name == "fused_ops")
    expected = 1.0 * case.copied / (sizes[1] - sizes[0]) / 2  # the median of 1, 1.5 and 0.5, on two cores
    assert limits.in_cache_ms(case, ours, "both", 2) == pytest.approx(expected)
    assert limits.in_cache_ms(replace(case, tiny=True), ours, "both", 2) is None


def test_a_gpu_has_its_own_targets_and_tables(tmp_path):
    name = "8192x32000 bfloat16"
    more = {"case": name, "device": "cuda", "direction": "forward", "threads": 16}
    rows = [
        timing("eager", [3.0] * 3, **more),
        timing("flash-attn", [1.5] * 3, **more),
        timing("quack-kernels", [1.0], **{**more, "status": "not importable"}),
        timing("copy", [1.0] * 3, **more),
        timing("fused_ops", [1.0] * 3, **more, copy_fraction=0.95),
    ]
    found = [v for v in targets.verdicts(rows) if v.case == name and v.direction == "forward"]
    assert [(v.what, v.found, v.status) for v in found] == [("fused_ops: rate / copy's", 0.95, "reached")]
    results.save(tmp_path, "quick", {"timings": rows})
    page = "<!-- benchmarks:{0} -->\n<!-- /benchmarks:{0} -->\n"
    shown = tables.render(page.format("gpu_cross_entropy"), [tmp_path])
    assert f"| {name} | forward | 3 | 1.5 | 1 | 1.50x | 95% |" in shown
    assert name not in tables.render(page.format("cross_entropy"), [tmp_path])


def test_results_are_merged_by_key(tmp_path):
    old, new = timing("eager", [10.0]), timing("eager", [11.0])
    results.save(tmp_path, "full", {"timings": [old, timing("copy", [1.0])]})
    results.save(tmp_path, "full", {"timings": [new]})
    kept = results.load(tmp_path / "full.json")["timings"]
    assert {row["provider"]: row["ms"] for row in kept} == {"eager": 11.0, "copy": 1.0}
    weighed = results.merge(
        [{**old, "extra_bytes": 5, "commit": "a"}], [new, {**new, "threads": 9}], results.KEYS["timings"]
    )
    assert [(row["ms"], row.get("extra_bytes"), row.get("weighed_at")) for row in weighed] == [
        (11.0, 5, "a"),
        (11.0, None, None),
    ]
    with (tmp_path / "full-timings.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["ms"] for row in rows] == ["11.0", "1.0"]
    assert "samples_ms" not in rows[0]


def test_the_quick_rows_of_another_allocator_stand_beside_the_full_ones_of_the_default(tmp_path):
    results.save(tmp_path, "full", {"timings": [timing("eager", [10.0])]})
    quick = [timing("eager", [11.0]), {**timing("eager", [12.0]), "allocator": "recycled"}]
    results.save(tmp_path, "quick", {"timings": quick})
    known = results.best(tmp_path)
    assert known is not None
    assert {(r["allocator"], r["ms"]) for r in known[1]["timings"]} == {("default", 10.0), ("recycled", 12.0)}


def test_a_build_that_was_measured_leaves_no_failure_of_an_earlier_one(tmp_path):
    failed = {"quantity": "build", "value": None, "unit": "failed: no compiler"}
    wheel = {"quantity": "wheel", "value": 900, "unit": "KiB"}
    results.save(tmp_path, "quick", {"install": [failed]})
    results.save(tmp_path, "quick", {"timings": []})
    assert results.load(tmp_path / "quick.json")["install"] == [failed]
    results.save(tmp_path, "quick", {"install": [wheel]})
    assert results.load(tmp_path / "quick.json")["install"] == [wheel]


def test_pages_are_rendered_between_markers(tmp_path):
    results.save(tmp_path, "full", {"rivals": [{"rival": "eager", "version": "1", "status": "ran", "device": "cpu"}]})
    page = "before\n<!-- benchmarks:rivals -->\nold\n<!-- /benchmarks:rivals -->\nafter\n"
    once = tables.render(page, [tmp_path])
    assert "| eager | 1 | ran |" in once and "old" not in once
    assert once.startswith("before\n") and once.endswith("after\n")
    assert tables.render(once, [tmp_path]) == once
    with pytest.raises(KeyError, match="unknown section"):
        tables.render("<!-- benchmarks:nothing -->\n<!-- /benchmarks:nothing -->", [tmp_path])


@pytest.mark.parametrize("page", [p for p in tables.PAGES if p.exists()], ids=lambda p: p.name)
def test_the_tables_of_the_docs_are_not_stale(page):
    text = page.read_text(encoding="utf-8")
    assert tables.render(text, results.machines()) == text, "run: python -m benchmarks report"


def test_results_name_no_host_and_no_path():
    for folder in results.machines():
        for path in folder.glob("*.[jc]s*"):
            text = path.read_text(encoding="utf-8")
            assert platform.node() not in text
            assert not re.search(r'"/[a-z]+/', text)


def test_machine_says_what_it_is():
    name = machine.machine_name()
    assert str(os.cpu_count()) in name
    assert platform.node() not in name
    assert re.fullmatch(r"[a-z0-9-]+", machine.directory_name(name))
    assert machine.isa() in ("DEFAULT", "AVX2", "AVX512")


def test_ulp_errors():
    one = torch.tensor([1.0, 1.0 + 2**-23])
    assert accuracy.errors(one, torch.tensor([1.0, 1.0], dtype=torch.float64)) == (1.0, pytest.approx(2**-23 / 2**0.5))
    half = torch.tensor([1.0], dtype=torch.bfloat16)
    assert accuracy.errors(half, torch.tensor([1 + 2**-8], dtype=torch.float64))[0] == 0.5


@pytest.mark.parametrize("op", ["cross_entropy", "batch_norm"])
def test_exact_truth_agrees_with_float64(op):
    case = next(c for c in cases.modules()[op].accuracy_cases() if c.dtype == torch.float64)
    rows = list(accuracy.measure(case))
    assert {row["provider"] for row in rows} == {"eager", "fused_ops"}
    assert all(row["relative_error"] < 1e-14 for row in rows)


def test_rivals_that_do_not_run_say_why():
    report = {row["rival"]: row["status"] for row in rivals.report("cpu", {"eager"})}
    assert report["eager"] == "ran"
    assert report["liger-kernel"] == "runs on CUDA only"
    assert set(report) == {*rivals.ALWAYS, *rivals.OPTIONAL}
    assert all(report.values())
    assert "jax" not in {row["rival"] for row in rivals.report("cpu", {"eager"}, {"jax"})}  # its row is kept


def test_plots_are_drawn_from_results(tmp_path):
    sweep = [
        timing(p, [ms * n], case=f"rows={n}", part="sweep", sweep="rows", size=n, shape=f"{n}x4", p20_ms=ms, p80_ms=ms)
        for p, ms in (("eager", 2.0), ("fused_ops", 1.0), ("copy", 0.5))
        for n in (1, 10)
    ]
    bars = [timing("eager", [2.0], speedup_vs_eager=1.0), timing("fused_ops", [1.0], speedup_vs_eager=2.0)]
    results.save(tmp_path, "full", {"timings": sweep + bars})
    drawn = {path.name: path for path in plot.draw_all(tmp_path)}
    assert {"speedup_cross_entropy.png", "sweep_cross_entropy_rows.png"} <= set(drawn)
    for path in drawn.values():
        image = plot.plt.imread(path)
        assert min(image.shape[:2]) > 100 and image[..., :3].std() > 0.01  # neither empty nor one colour


def test_command_line_end_to_end(tmp_path, run_python):
    command = ["-m", "benchmarks", "--op", "cross_entropy", "--case", "32x27", "--part", "overhead"]
    command += ["--rivals", "eager", "--threads", "1", "--out", str(tmp_path)]
    run_python(*command, cwd=ROOT)
    rows = json.loads((tmp_path / "quick.json").read_text(encoding="utf-8"))["timings"]
    assert {row["provider"] for row in rows} >= {"eager", "fused_ops", "copy"}
    wanted = {"op", "direction", "provider", "shape", "dtype", "layout", "threads", "isa", "ms", "p20_ms", "p80_ms"}
    wanted |= {"gb_per_s", "copy_fraction", "extra_bytes", "torch", "commit", "machine", "load_before", "busy_others"}
    assert all(wanted <= set(row) for row in rows if row["status"] == "ok")
    judged = run_python("-m", "benchmarks", "targets", "--out", str(tmp_path), cwd=ROOT, check=False)
    assert re.search(r"\d+ targets: \d+ reached, \d+ missed", judged.stdout)


@pytest.mark.parametrize("arguments", [["--op", "nothing"], ["--threads", "0"], ["--threads", "x"], ["--part", ""]])
def test_command_line_names_what_it_does_not_know(arguments, capsys):
    from benchmarks.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_truth_is_the_float64_eager_result():
    case = cases.find("cross_entropy", "32x27 float32", "cpu")
    inputs = case.inputs("cpu")
    wide = harness.in_float64(inputs)
    assert wide.tensors["input"].dtype == torch.float64 and wide.tensors["target"].dtype == torch.int64
    loss = harness.make_runner(case, case.providers[0], wide, 1).results()["output"]
    assert torch.equal(loss, F.cross_entropy(wide.tensors["input"], wide.tensors["target"]))
