"""Seeds small faults into a copy of the tree, one at a time, and sees which test notices each.

python -m tests.mutation [--only TEXT] [--resume] [--write]

A fault in C++ is compiled for this machine's best instruction set alone, hardly optimised, and linked with the objects
of all the others. Tests run in a child of this process, which has imported PyTorch once. What was found is kept in
build/mutants, so that ``--resume`` goes on with the faults that are left; ``--write`` puts the report into
docs/reliability.md. The exit status says whether a fault was not noticed.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import pytest
import torch
import torch.testing._internal.common_methods_invocations
from tqdm import tqdm

from tests.mutation.mutants import MUTANTS, Mutant, misplaced

ROOT = Path(__file__).parent.parent.parent
FOUND = ROOT / "build" / "mutants.json"
REPORT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- mutants -->", "<!-- /mutants -->"
TIMEOUT_S = 400
# those first that see most the soonest
FIRST = ["contracts/test_raw_ops.py", "contracts/test_properties.py"]
LAST = ["contracts/test_corners.py", "contracts/test_contracts.py"]
SUITES = {
    "ce": [
        *FIRST,
        *(f"cross_entropy/test_cross_entropy{part}.py" for part in ("", "_options", "_numerics", "_layouts", "_small")),
        *LAST,
    ],
    "bn": [
        *FIRST,
        "batch_norm/test_batch_norm.py",
        "batch_norm/test_batch_norm_numerics.py",
        "batch_norm/test_batch_norm_modules.py",
        *LAST,
    ],
    "lce": [
        *FIRST,
        *(f"linear_cross_entropy/test_linear_cross_entropy{part}.py" for part in ("", "_small", "_transforms")),
        *LAST,
    ],
    "guard": ["contracts/test_guard_pages.py"],
}
SLOW = "not isa and not ISA and not compiled and not compile and not export and not under_the_guard and not notices"
BEST = next(
    (i for i in ("AVX512", "AVX2") if i.lower().replace("512", "512bw") in Path("/proc/cpuinfo").read_text()), "DEFAULT"
)


class FirstFailure:
    """Keeps the running test's name in a file, and the first that failed in another."""

    def __init__(self, folder: Path):
        self.running, self.failed = folder / "running", folder / "failed"

    def pytest_runtest_logstart(self, nodeid):
        self.running.write_text(nodeid)

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.failed.exists():
            self.failed.write_text(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed and not self.failed.exists():
            self.failed.write_text(f"import of {report.nodeid}")


def copy_tree(to: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


class Build:
    """The tree's build, command by command."""

    def __init__(self, tree: Path, again: bool):
        self.tree, log, clean = tree, tree / "build" / "commands", tree / "build" / "clean.so"
        sources = [p for p in (tree / "csrc").rglob("*") if p.is_file()] + [tree / "setup.py"]
        state = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(sources))).hexdigest()
        stamp = tree / "build" / "state"
        if not (again and stamp.exists() and stamp.read_text() == state):
            shutil.rmtree(tree / "build", ignore_errors=True)
            log.mkdir(parents=True)
            self.build(log)
            shutil.copy2(tree / "fused_ops" / "_C.so", clean)
            stamp.write_text(state)
        self.real = os.environ.get("CXX", "c++").split()
        calls = [p.read_text().splitlines() for p in log.iterdir()]
        self.link = next(c for c in calls if "-shared" in c)
        self.compile = {}
        for c in calls:
            if "-c" not in c:
                continue
            source = Path(c[c.index("-c") + 1])
            source = source.relative_to(tree) if source.is_absolute() else source
            isa = next((a.split("=")[1] for a in c if a.startswith("-DFUSED_OPS_ISA=")), None)
            if isa in (None, BEST):
                self.compile[str(source)] = c
        self.restore()

    def build(self, log: Path) -> None:
        """Builds as setup.py does, and keeps every command of the compiler."""
        tree = self.tree
        wrapper = tree / "build" / "compiler"
        real = os.environ.get("CXX", "c++")
        wrapper.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "$(mktemp {log}/XXXXXX)"\nexec {real} "$@"\n')
        wrapper.chmod(0o755)
        environment = {**os.environ, "CC": str(wrapper), "CXX": str(wrapper), "FUSED_OPS_CUDA": "0"}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True)

    def includes(self, source: str) -> set[str]:
        found, todo = set(), [source]
        while todo:
            here = todo.pop()
            if here in found or not (self.tree / here).exists():
                continue
            found.add(here)
            todo += [f"csrc/{name}" for name in re.findall(r'#include\s+"([^"]+)"', (self.tree / here).read_text())]
        return found

    def rebuild(self, file: str) -> str | None:
        """Compiles what includes the file and links; what the compiler said if it would not."""
        changed, link, jobs = self.tree / "build" / "mutant", list(self.link), []
        changed.mkdir(exist_ok=True)
        for i, (source, command) in enumerate(self.compile.items()):
            if file not in self.includes(source):
                continue
            new, at = list(command), command.index("-o") + 1
            new[at] = str(changed / f"{i}.o")
            link[link.index(command[at])] = new[at]
            jobs.append([*new, "-O1"])
        link[link.index("-o") + 1] = str(self.tree / "fused_ops" / "_C.so")

        def run(arguments):
            return subprocess.run([*self.real, *arguments], cwd=self.tree, capture_output=True, text=True)

        with ThreadPoolExecutor(2) as pool:
            for result in pool.map(run, jobs):
                if result.returncode:
                    return result.stderr
        result = run(link)
        return result.stderr if result.returncode else None

    def restore(self) -> None:
        shutil.copy2(self.tree / "build" / "clean.so", self.tree / "fused_ops" / "_C.so")


def child(tree: Path, suite: str, folder: Path) -> int:
    """Runs in the forked process."""
    os.chdir(tree)
    sys.path[:] = [str(tree), str(tree / "tests"), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    sys.dont_write_bytecode = True
    for name in [n for n in sys.modules if n == "tests" or n.startswith("tests.")]:
        del sys.modules[name]
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", FUSED_OPS_FUZZ_CALLS="600", PYTHONPATH=str(tree))
    os.environ["FUSED_OPS_PROPERTY_EXAMPLES"] = "12"
    os.environ["FUSED_OPS_GUARD_STRIDE"] = "3,0"
    out = os.open(folder / "output", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    files = [str(tree / "tests" / f) for f in SUITES[suite]]
    chosen = BEST if suite == "guard" else SLOW
    return int(
        pytest.main(["-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-k", chosen, *files], [FirstFailure(folder)])
    )


def run_suite(tree: Path, suite: str) -> str | None:
    """The test that failed, or None."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pid = os.fork()
        if pid == 0:
            status = 3
            try:
                os.setsid()
                status = child(tree, suite, folder)
            finally:
                os._exit(status)
        end, status = time.monotonic() + TIMEOUT_S, None
        while status is None and time.monotonic() < end:
            done, code = os.waitpid(pid, os.WNOHANG)
            status = code if done else None
            time.sleep(0.02)
        running = (folder / "running").read_text() if (folder / "running").exists() else "start"
        if status is None:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return f"{running} (no end)"
        if os.WIFSIGNALED(status):
            return f"{running} (signal {os.WTERMSIG(status)})"
        if os.WEXITSTATUS(status) == 0:
            return None
        if (folder / "failed").exists():
            return (folder / "failed").read_text()
        raise SystemExit(f"pytest ended with {status} in {running}:\n{(folder / 'output').read_text()[-3000:]}")


def try_one(build: Build, mutant: Mutant) -> str | None:
    path = build.tree / mutant.file
    original = path.read_text()
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        if mutant.file.startswith("csrc"):
            said = build.rebuild(mutant.file)
            if said:
                raise SystemExit(f"{mutant.name}: does not compile\n{said[-2000:]}")
        return run_suite(build.tree, mutant.suite)
    finally:
        path.write_text(original)
        if mutant.file.startswith("csrc"):
            build.restore()


def table(results: list[tuple[Mutant, str | None]], left: int) -> str:
    killed = sum(by is not None for _, by in results)
    lines = [
        f"{len(results)} faults tried, {killed} noticed, {len(results) - killed} not; {left} not tried yet. "
        f"C++ was compiled for {BEST}.",
        "",
        "| file | fault | noticed by |",
        "|---|---|---|",
    ]
    for mutant, by in results:
        test = "**nothing**" if by is None else f"`{by.removeprefix('tests/').replace('|', '/')}`"
        lines.append(f"| {mutant.file} | {mutant.name} | {test} |")
    return "\n".join(lines)


def key(mutant: Mutant) -> str:
    """What a fault is known by; not its file, so that code may move."""
    return hashlib.sha256(f"{mutant.old}\0{mutant.new}".encode()).hexdigest()[:16]


def known(chosen: list[Mutant]) -> dict[str, str | None]:
    """What earlier runs found about faults that are still the same."""
    if not FOUND.exists():
        return {}
    keys = {key(m) for m in chosen}
    return {k: by for k, by in json.loads(FOUND.read_text()).items() if k in keys}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="of the faults, those with this in file, name or suite")
    parser.add_argument("--resume", action="store_true", help="not those that an earlier run saw noticed")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after that long; --resume goes on")
    parser.add_argument("--write", action="store_true", help="put the report into docs/reliability.md")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in f"{m.file} {m.name} {m.suite}"]
    torch.set_num_threads(1)
    hypothesis.settings.load_profile("default")
    tree = FOUND.parent / "mutants"
    if not options.resume:
        shutil.rmtree(tree, ignore_errors=True)
    copy_tree(tree)
    if moved := misplaced(tree):
        raise SystemExit("\n".join(moved))
    found = known(chosen) if options.resume else {}
    build = Build(tree, options.resume)
    for suite in sorted({m.suite for m in chosen}) if not options.resume else ():
        by = run_suite(tree, suite)
        if by:
            raise SystemExit(f"{suite}: {by} fails without any fault")
    end = time.monotonic() + options.minutes * 60
    todo = [m for m in chosen if found.get(key(m)) is None]
    random.Random(0).shuffle(todo)  # so that a run that stops early has seen something of everything
    todo.sort(key=lambda m: key(m) in found)  # and those that no test has noticed come last
    for mutant in tqdm(todo, disable=not sys.stderr.isatty()):
        if time.monotonic() > end:
            break
        began = time.monotonic()
        by = found[key(mutant)] = try_one(build, mutant)
        FOUND.write_text(json.dumps(found))
        outcome = "SURVIVED" if by is None else f"noticed by {by}"
        print(f"{mutant.file}, {mutant.name}: {outcome} ({time.monotonic() - began:.0f} s)", flush=True)
    tried = [(m, found[key(m)]) for m in chosen if key(m) in found]
    report = table(tried, len(chosen) - len(tried))
    if options.write:
        text = REPORT.read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        REPORT.write_text(f"{before}{BEGIN}\n\n{report}\n\n{END}{after}")
    print(report.splitlines()[0])
    return int(None in found.values())


if __name__ == "__main__":
    sys.exit(main())
