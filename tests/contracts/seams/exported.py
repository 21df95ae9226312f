"""torch.export: the program is run and trained; AOTInductor's package is run."""

import contextlib
import copy
import tempfile
from pathlib import Path

import torch
from torch.export import Dim

from . import check as c
from .cases import OTHER_BATCH, Case
from .check import check
from .holder import holder, same_batch
from .registry import system


def _shapes(case, model, batch_dim):
    """Dimension 0 of each batched argument as ``batch_dim``."""
    names = (case.diff[0], *model.args)
    return {
        a: None if n in case.unbatched or case.tensors()[n].dim() == 0 else {0: batch_dim}
        for a, n in zip(["x", *(f"a{i}" for i in range(len(model.args)))], names, strict=True)
    }


def _export(case, strict, batch_dim=None):
    model = holder(case)
    start = copy.deepcopy(model.state_dict())
    args = model.inputs(c.BATCH, grad=False)
    shapes = None if batch_dim is None else _shapes(case, model, batch_dim)
    program = torch.export.export(model, args, dynamic_shapes=shapes, strict=strict)
    return model, start, program


def _run_program(model, start, run, batches):
    for batch in batches:
        with contextlib.suppress(Exception):
            run.load_state_dict(start)
        model.check(run, batch, seed=1, state=run)


def _exported(case, strict, batch_dim=None):
    """The program is run and trained: value, the input's gradient and every parameter's."""
    model, start, program = _export(case, strict, batch_dim)
    batches = (c.BATCH,) if batch_dim is None else (c.BATCH, OTHER_BATCH)
    _run_program(model, start, program.module(), batches)


def exportable(case: Case) -> bool:
    """fold and convert give models of their own, which PyTorch's tests cover once they are plain modules."""
    return same_batch(case) and "inplace" not in case.traits


@system("export", exportable, costly=True)
def export_static(case):
    _exported(case, False)


@system("export, strict", exportable, costly=True)
def export_strict(case):
    _exported(case, True)


@system("export, Dim", exportable, costly=True)
def export_dim(case):
    _exported(case, False, Dim("batch", min=2, max=1 << 20))


@system("export, strict, Dim", exportable, costly=True)
def export_strict_dim(case):
    _exported(case, True, Dim("batch", min=2, max=1 << 20))


@system("export, Dim.AUTO", exportable, costly=True)
def export_auto(case):
    _exported(case, False, Dim.AUTO)


@system("export, run_decompositions", exportable, costly=True)
def export_decomposed(case):
    """The program of an inference graph: values only."""
    model = holder(case)
    args = model.inputs(c.BATCH, grad=False)
    with torch.no_grad():
        program = torch.export.export(model, args, strict=False).run_decompositions()
        outputs = program.module()(*args)
    check(case, outputs)


AOTI = ("ce-mean", "lce-small, bias", "bn-evaluation")


@system("AOTInductor package", lambda case: repr(case) in AOTI, costly=True)
def aoti(case):
    model = holder(case)
    args = model.inputs(c.BATCH, grad=False)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(model, args, strict=False)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / "model.pt2"))
        outputs = torch._inductor.aoti_load_package(path)(*args)
    check(case, outputs)
