"""What training does around an op: autocast, checkpointing, saved-tensor hooks, copies, processes and threads."""

import copy
import io
import multiprocessing
import pickle
import threading
import traceback

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from . import check as c
from .check import Call, answer, check, close, scalar
from .holder import Holder, same_batch
from .registry import system


def _float32(case):
    return not case.low_precision and case.name not in ("fold", "convert", "momentum=None")


@system("autocast, GradScaler", _float32)
def autocast(case):
    """bfloat16 in the forward, the scaled gradient through the backward; loose, as the arithmetic is of 16 bits."""
    call = Call(case, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = call.run()
        total = scalar(outputs).float()
    scaler.scale(total).backward()
    tolerance = 0.1 if case.op == "lce" else 1e-5
    check(case, outputs, tuple(t.grad / 1024.0 for t in call.diff), call.tensors, tolerance=tolerance)


def _through_mm(call):
    """The call's function after a matrix product with the unit matrix, so that a policy has an mm to decide on."""

    def run(x, *rest):
        unit = torch.eye(x.size(-1), dtype=x.dtype)
        product = torch.mm(x.reshape(-1, x.size(-1)), unit).reshape(x.shape)
        return call.function(product, *rest)

    return run


def _checkpointed(case, use_reentrant, context=None):
    call = Call(case)
    more = {} if context is None else {"context_fn": context}
    total = checkpoint(_through_mm(call), *call.diff, use_reentrant=use_reentrant, **more)
    close(total, answer(case).scalar, "value", c.tolerance_of(case))
    total.backward()
    check(case, None, tuple(t.grad for t in call.diff), call.tensors)


@system("checkpoint, not reentrant")
def checkpoint_(case):
    _checkpointed(case, False)


@system("checkpoint, reentrant")
def checkpoint_reentrant(case):
    _checkpointed(case, True)


def _policy(mm, others):
    def decide(ctx, op, *args, **kwargs):
        products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return mm if getattr(op, "overloadpacket", op) in products else others

    return lambda: create_selective_checkpoint_contexts(decide)


@system("selective checkpoint, mm kept")
def selective_keep(case):
    _checkpointed(case, False, _policy(CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE))


@system("selective checkpoint, mm recomputed")
def selective_recompute(case):
    _checkpointed(case, False, _policy(CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_SAVE))


@system("selective checkpoint, all kept")
def selective_all(case):
    _checkpointed(case, False, _policy(CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_SAVE))


@system("saved-tensor hooks")
def saved_tensor_hooks(case):
    """Packed into bytes and rebuilt, and moved as save_on_cpu does."""
    call = Call(case)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pickle.dumps(t.detach()), pickle.loads):
        outputs = call.run()
    check(case, outputs, torch.autograd.grad(scalar(outputs), call.diff), call.tensors)
    call = Call(case)
    with torch.autograd.graph.save_on_cpu():
        outputs = call.run()
    check(case, outputs, torch.autograd.grad(scalar(outputs), call.diff), call.tensors)


@system("deepcopy, state_dict")
def deepcopy(case):
    made = case.module() if case.module else None
    if made is not None:
        twin = copy.deepcopy(made)
        twin.load_state_dict(made.state_dict())
    if same_batch(case):
        model = Holder(case)
        twin = copy.deepcopy(model)
        twin.check(twin, c.BATCH)


@system("pickle", lambda case: case.module is not None and case.name != "fold")
def pickled(case):
    again = pickle.loads(pickle.dumps(case.module()))
    buffer = io.BytesIO()
    torch.save(again, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    if case.name == "convert":
        check(case, again(case.tensors()["input"]))
        return
    model = Holder(case)
    model.inner = again
    again.load_state_dict({n: case.tensors()[n] for n in model.state}, strict=True)
    model.check(model, c.BATCH)


def _in_process(name, queue):
    from .cases import BY_NAME

    try:
        torch.set_num_threads(1)
        Call(BY_NAME[name]).run_and_check()
        queue.put("")
    except BaseException:
        queue.put(traceback.format_exc())


@system(
    "multiprocessing, spawn",
    lambda case: repr(case) in ("ce-mean", "lce-chunks", "bn-training, statistics"),
    costly=True,
)
def spawn(case):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_in_process, args=(repr(case), queue))
    process.start()
    message = queue.get(timeout=120)
    process.join()
    assert not message, message


@system("threads, as DataParallel")
def threads(case):
    """Four replicas on threads of their own, forward and backward."""
    problems = []

    def work(seed):
        try:
            if case.module is not None and same_batch(case):
                model = Holder(case)  # a replica of its own, as DataParallel makes them
                model.check(model, c.BATCH, seed)
            else:
                Call(case, seed=seed).run_and_check(expected=answer(case, seed=seed))
        except BaseException as error:
            problems.append(error)

    for seed in range(4):
        answer(case, seed=seed)
    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    if problems:
        raise problems[0]
