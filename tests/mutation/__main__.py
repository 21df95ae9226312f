"""Seeds small faults into a copy of the tree, one at a time, and sees which test notices each.

python -m tests.mutation [--only TEXT] [--list] [--limit N] [--resume] [--write]

``faults.py`` says which. A fault in C++ is compiled for this machine's best instruction set alone, hardly optimised,
and linked with the objects of all the others. Where the objects stay the same bytes (dead code, another processor's) or
do not compile, the function's next fault stands in. Tests run in a child of this process, which has imported PyTorch
once. What was found is kept in build/mutants.json, so that ``--resume`` goes on with what is left; ``--write`` puts the
report into docs/reliability.md. The exit status says whether a fault was not noticed.
"""

import argparse
import hashlib
import json
import os
import random
import shlex
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

from tests.mutation.faults import PER_FUNCTION, Fault, draw, missing

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
        *(f"cross_entropy/test_cross_entropy{part}.py" for part in ("", "_options", "_numerics", "_walks", "_small")),
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
    """What setup.py has built, unit by unit, from what it wrote down beside each object."""

    def __init__(self, tree: Path):
        self.tree, self.clean = tree, tree / "build" / "clean.so"
        built = filter(Path.is_dir, (ROOT / "build").glob("temp*"))
        for folder in built:  # so that only what has changed since is compiled
            shutil.copytree(folder, tree / "build" / folder.name, dirs_exist_ok=True)
        environment = {**os.environ, "FUSED_OPS_BUILD": "1", "FUSED_OPS_CUDA": "0", "PYTHONPATH": str(tree)}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True)
        self.link = next(shlex.split(line) for line in done.stdout.splitlines() if " -shared " in line)
        shutil.copy2(tree / "fused_ops" / "_C.so", self.clean)
        self.units: dict[str, dict] = {}  # by object
        for output in filter(lambda argument: argument.endswith(".o"), self.link):
            made = json.loads((tree / output).with_suffix(".json").read_text())
            isa = next((a.partition("=")[2] for a in made["command"] if a.startswith("-DFUSED_OPS_ISA=")), BEST)
            if isa == BEST:
                self.units[output] = made
        sources = sorted({file for unit in self.units.values() for file in unit["files"]})
        state = hashlib.sha256(b"".join((tree / file).read_bytes() for file in sources)).hexdigest()[:16]
        self.plain = tree / "build" / f"plain-{state}"
        if not self.plain.exists() and self.compile(self.plain, list(self.units)) is None:
            raise SystemExit("the sources do not compile")

    def compile(self, folder: Path, outputs: list[str]) -> dict[str, Path] | None:
        """The units' objects, hardly optimised; None if the compiler would not."""
        folder.mkdir(exist_ok=True)
        made = {output: folder / output.replace("/", ".") for output in outputs}

        def run(output: str) -> int:
            unit = self.units[output]
            command = [*unit["command"], "-O1", "-w", "-c", next(iter(unit["files"])), "-o", str(made[output])]
            return subprocess.run(command, cwd=self.tree, capture_output=True).returncode

        with ThreadPoolExecutor(2) as pool:
            return None if any(pool.map(run, outputs)) else made

    def rebuild(self, file: str) -> bool:
        """Compiles what includes the file and links; whether there is a library now, and another one than before."""
        stale = [output for output, unit in self.units.items() if file in unit["files"]]
        made = self.compile(self.tree / "build" / "mutant", stale)
        if made is None or all(path.read_bytes() == (self.plain / path.name).read_bytes() for path in made.values()):
            return False
        link = [str(made.get(argument, argument)) for argument in self.link]
        link[link.index("-o") + 1] = str(self.tree / "fused_ops" / "_C.so")
        return subprocess.run(link, cwd=self.tree, capture_output=True).returncode == 0

    def restore(self) -> None:
        shutil.copy2(self.clean, self.tree / "fused_ops" / "_C.so")


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


def try_one(build: Build, fault: Fault) -> tuple[bool, str | None]:
    """Whether there was a fault to notice, and the test that did."""
    path = build.tree / fault.file
    original, native = path.read_text(), fault.file.startswith("csrc")
    path.write_text(fault.edit.apply(original))
    try:
        seeded = not native or build.rebuild(fault.file)
        return seeded, run_suite(build.tree, fault.suite) if seeded else None
    finally:
        path.write_text(original)
        if native:
            build.restore()


def try_function(build: Build, place: list[Fault], found: dict[str, str | None]) -> None:
    """The first faults of a function that are any."""
    tried = 0
    for fault in place:
        if tried == PER_FUNCTION:
            return
        began, source = time.monotonic(), (build.tree / fault.file).read_text()
        seeded, by = try_one(build, fault)
        if seeded:
            tried += 1
            found[f"{fault.suite} {fault.file} {fault.name}"] = by
            outcome = "SURVIVED" if by is None else f"noticed by {by}"
            print(
                f"{fault.file}, {fault.name}: {outcome} ({time.monotonic() - began:.0f} s)\n    {fault.show(source)}",
                flush=True,
            )


def report(found: dict[str, str | None], places: int) -> str:
    """A row for each language and suite; the faults that nothing noticed by name."""
    rows: dict[tuple[str, str], list[str | None]] = {}
    for name, by in found.items():
        suite, file = name.split()[:2]
        rows.setdefault((suite, "Python" if file.endswith(".py") else "C++"), []).append(by)
    killed = sum(by is not None for by in found.values())
    lines = [
        f"{len(found)} faults tried in {places} functions, {killed} noticed. C++ was compiled for {BEST}.",
        "",
        "| tests | language | faults | noticed |",
        "|---|---|---|---|",
        *(
            f"| {s} | {lang} | {len(bys)} | {sum(b is not None for b in bys)} |"
            for (s, lang), bys in sorted(rows.items())
        ),
    ]
    left = [f"- `{name}`: **nothing**" for name, by in found.items() if by is None]
    return "\n".join([*lines, *(["", "Noticed by nothing:", "", *left] if left else [])])


def key(place: list[Fault], tree: Path) -> str:
    """What a function's faults are known by: its faults and its file's text."""
    content = f"{[f.name for f in place]}{(tree / place[0].file).read_text()}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="functions with this in suite, file or name")
    parser.add_argument("--list", action="store_true", help="print the faults and end")
    parser.add_argument("--limit", type=int, default=None, help="that many functions, drawn from all")
    parser.add_argument("--resume", action="store_true", help="not the functions that an earlier run has done")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after that long; --resume goes on")
    parser.add_argument("--write", action="store_true", help="put the report into docs/reliability.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    hypothesis.settings.load_profile("default")
    tree = FOUND.parent / "mutants"
    if not (options.resume or options.list):
        shutil.rmtree(tree, ignore_errors=True)
    if not options.list:
        copy_tree(tree)
    if unknown := missing(ROOT):
        raise SystemExit(f"tests/mutation/faults.py names functions that are nowhere: {unknown}")
    places = [p for p in draw(ROOT) if options.only in f"{p[0].suite} {p[0].file} {p[0].function}"]
    random.Random(0).shuffle(places)  # so that a run that stops early has seen something of everything
    places = places[: options.limit]
    if options.list:
        for fault in sorted(f for place in places for f in place[:PER_FUNCTION]):
            print(f"{fault.suite} {fault.file} {fault.name}: {fault.show((ROOT / fault.file).read_text())}")
        return 0
    done = json.loads(FOUND.read_text()) if options.resume and FOUND.exists() else {}
    done = {key(p, tree): done[key(p, tree)] for p in places if key(p, tree) in done}
    build = Build(tree)
    for suite in sorted({p[0].suite for p in places}) if not options.resume else ():
        by = run_suite(tree, suite)
        if by:
            raise SystemExit(f"{suite}: {by} fails without any fault")
    end = time.monotonic() + options.minutes * 60
    for place in tqdm([p for p in places if key(p, tree) not in done], disable=not sys.stderr.isatty()):
        if time.monotonic() > end:
            break
        found = {}
        try_function(build, place, found)
        done[key(place, tree)] = found
        FOUND.write_text(json.dumps(done))
    everything = {name: by for found in done.values() for name, by in found.items()}
    text = report(everything, len(done))
    if options.write:
        page = REPORT.read_text()
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        REPORT.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    print(text)
    return int(None in everything.values())


if __name__ == "__main__":
    sys.exit(main())
