"""Cross-entropy: the public function, and what serves a checked call."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function
from typing_extensions import Unpack

from fused_ops.core.graph import in_graph, needs_formulas, no_script
from fused_ops.core.torch_private import has_torch_function, legacy_reduction, transforms_active
from fused_ops.distributed.dtensor import any_dtensor
from fused_ops.ops.cross_entropy import dtensors, functions, graph, rows_reference
from fused_ops.ops.cross_entropy.arguments import (
    CrossEntropyOptions,
    Empty,
    Numbers,
    ReductionName,
    Target,
    check_ignore_index,
    check_places,
    index_door,
    prepare,
)
from fused_ops.ops.cross_entropy.reduction import CrossEntropyOutput, Reduction, reduced_loss
from fused_ops.ops.cross_entropy.row import RowArgs, RowOptions
from fused_ops.ops.cross_entropy.shards import Ranks, check_ranks

_NUMBERS = (float, int)  # not a tensor, which might want a gradient


def index_loss(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    inplace_backward: bool = False,
    of_head: bool = False,
) -> Tensor:
    """The loss of checked class indices, where ``needs_formulas`` does not hold."""
    if in_graph():
        return graph.index_loss(input, target, ignore_index, reduction)
    return functions.index_loss(input, target, ignore_index, reduction, inplace_backward, of_head)


def rows(a: RowArgs, o: RowOptions, inplace_backward: bool = False) -> tuple[Tensor, ...]:
    """nll, lse, mass, target_weight, entropy, prediction and target_log_probability of each row."""
    if needs_formulas():
        return rows_reference.formulas(a, o)
    if in_graph():
        return graph.rows(a, o)
    return functions.rows(a, o, inplace_backward)


def _check_inplace(input: Tensor) -> None:
    if torch.compiler.is_compiling() or transforms_active():
        raise RuntimeError(
            "cross_entropy: inplace_backward=True is for eager autograd, not for torch.compile or torch.func"
        )
    if input.is_leaf and input.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "cross_entropy: inplace_backward=True overwrites input, which must not be a leaf that requires grad"
        )


def _of_dtensors(input: Tensor, target: Any, options: dict[str, Any]) -> Tensor | CrossEntropyOutput:
    """The call of what this rank holds, and the DTensors of that."""
    size_average, reduce = options.pop("size_average"), options.pop("reduce")
    if size_average is not None or reduce is not None:
        options["reduction"] = legacy_reduction(size_average, reduce)
    if options["inplace_backward"]:
        _check_inplace(input)
    part, logits = dtensors.spread(input, target, options)
    result = cross_entropy(part, logits.target(target), **logits.options(options))
    return logits.result(result, options["reduction"])  # type: ignore[no-any-return]


@overload
def cross_entropy(
    input: Tensor,
    target: Target,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    *,
    return_outputs: Literal[False] = False,
    **options: Unpack[CrossEntropyOptions],
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Target,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    *,
    return_outputs: Literal[True],
    **options: Unpack[CrossEntropyOptions],
) -> CrossEntropyOutput: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Target,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    *,
    return_outputs: bool,
    **options: Unpack[CrossEntropyOptions],
) -> Tensor | CrossEntropyOutput: ...
@no_script
def cross_entropy(
    input: Tensor,
    target: Target,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: ReductionName = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    class_mask: Tensor | None = None,
    empty: Empty = "nan",
    loss_dtype: torch.dtype | None = None,
    inplace_backward: bool = False,
    return_outputs: bool = False,
    class_group: Any = None,
    class_start: int | None = None,
    classes: int | None = None,
    row_group: Any = None,
) -> Tensor | CrossEntropyOutput:
    """Cross-entropy between logits and a target: ``torch.nn.functional.cross_entropy``, and more.

    Args:
        input: Logits, (classes), (rows, classes) or (rows, classes, d1, ...); float32, float64, bfloat16 or float16.
        target: Class indices in [0, classes), of the shape of ``input`` without its class dimension; int64, int32,
            int16, int8 or uint8. Or class probabilities, floating-point, of the shape of ``input``. Or a pair
            (indices, probabilities) of one shape, k of them in the place of the classes: the probabilities of k
            classes, zero for the rest. Or mixup's (target_a, target_b, lam): two tensors of class indices and the
            share of the first, a number or a tensor of their shape (or of its first dimension).
        weight: (classes,) factor of each class, of the dtype of ``input``. Differentiable, except with class indices.
        size_average: Deprecated, as in PyTorch.
        ignore_index: Class index whose rows count neither in the loss nor in the gradient; of (indices,
            probabilities) and of mixup it drops the one index.
        reduce: Deprecated, as in PyTorch.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. The mean is over the rows that count, weighted by the class
            weights of their indices; over all rows for class probabilities.
        label_smoothing: In [0, 1], the share of the target that is spread evenly over the (allowed) classes.
        z_loss: Adds ``z_loss * lse**2`` to each row that counts, lse being the log-sum-exp of its logits.
        logit_scale: Multiplies the logits (an inverse temperature).
        softcap: Then bounds them: ``softcap * tanh(logits / softcap)``.
        token_weight: A factor of each row, of the shape of the loss without reduction; also in the mean's denominator.
            Differentiable.
        normalizer: Replaces the mean's denominator, to accumulate gradients over batches. Differentiable.
        class_mask: bool, (classes,) or the shape of ``input``; a class that is False has probability 0, whatever its
            logit, and gradient 0.
        empty: The mean where nothing counts: ``"nan"`` as PyTorch, ``"zero"``, or ``"raise"`` (reads the denominator).
        loss_dtype: Of the loss, computed in float32 or more in any case. Default: PyTorch's, the dtype of ``input``
            (of class probabilities too, if wider; float32 for 16-bit logits under autocast).
        inplace_backward: Lets the backward write the gradient over ``input``, so that it needs no memory of its own.
            Whatever else uses the logits after that backward raises, as does a second backward.
        return_outputs: Returns a ``CrossEntropyOutput`` (loss, lse, prediction, correct, target_log_probability,
            entropy, z_loss), all from the same pass over the logits.
        class_group: Process group of ranks that share the classes (a vocabulary-parallel head): ``input``, class
            probabilities and a ``class_mask`` of its shape hold this rank's, any number of them, zero included, in the
            order of ranks; class indices, ``weight`` and a (classes,) ``class_mask`` are of all ranks. Every rank
            computes the same loss, bit for bit, and gets the gradient of its own ``input``, and the whole gradient
            of what all ranks have alike (``token_weight``, ``weight``, probabilities of indices).
        class_start: The first class of this rank, and
        classes: how many all ranks have. Given both, nothing need be asked of the other ranks; else a call gathers
            their sizes. That the ranks' classes neither overlap nor leave one out cannot be seen, and is not checked.
        row_group: Process group of ranks that share the rows (data or context parallel), any number of them, zero
            included, or a tuple of groups, as the dimensions of a mesh over which rows are spread: the mean's
            denominator, and what ``empty`` is about, is that of all ranks, so that their losses add up to the mean over
            all rows. What averages gradients over ranks, as DDP and FSDP do, divides them by the group's size once
            more: multiply the loss by it there.

    Returns:
        The loss: a scalar, or the shape of ``input`` without its class dimension for ``"none"``.

    Raises:
        ValueError: unknown ``reduction`` or ``empty``; batch sizes of input and target that differ; ``normalizer``
            without the mean; a number out of its range; nothing counts and ``empty="raise"``; one of ``class_start``
            and ``classes`` without the other or without ``class_group``, or a rank's classes beyond ``classes``.
        RuntimeError: a tensor of another dtype or shape than said above; ``label_smoothing`` above 1; ``weight`` that
            requires grad with class indices; ``ignore_index`` of a class with class probabilities;
            ``inplace_backward`` with a leaf, with elements that share memory, with ``create_graph``, or under
            torch.compile and torch.func; ordinary logits beside DTensors, or DTensors on several meshes.
        IndexError: a class index outside [0, classes) that is not ``ignore_index``; ``input`` is a scalar. With process
            groups all their ranks raise for the class index of one.
        NotImplementedError: ``input`` is not of one of the four floating-point dtypes; process groups under
            torch.jit.trace, under nested forward-mode AD, or in torch.func inside of torch.compile.
        TypeError: something that must be a tensor, a number or a process group is none.

    Note:
        16-bit logits are computed in float32 and rounded once. Each row's loss and gradient depend on that row alone,
        whatever the number of threads. Differentiable any number of times; beyond class indices alone the second
        derivative is plain PyTorch, and so is torch.func.grad. The gradient of ignored rows is zero even where their
        logits are not finite.

        With process groups all ranks must make the same calls, and take the same derivatives: a tensor that all have
        alike, or ``token_weight`` with ``row_group``, requires grad on all of them or on none. ``class_group`` costs
        one gather of 7 numbers a row (9 with outputs; one more number first where a mask of rows meets smoothing), from
        64 ranks on two all-reduces of 3 and of 9 (one more of 1 with outputs), and none in the backward of ``input``;
        ``row_group`` one gather of two numbers. A wrong argument (a shape, a dtype) raises
        on the rank that has it, before it has told the others anything: they wait until the group's timeout.

        DTensors need no process groups, and no ``loss_parallel()``: the placements of ``input`` say along which
        dimensions of its mesh the ranks share classes or rows. All else may be a DTensor, placed in any way, or a
        tensor that every rank has whole. The result is a DTensor: replicated where ranks share classes, a sum over rows
        ``Partial`` where they share rows, and what there is of each row placed as the rows are. What ``input`` has as
        ``Partial`` is summed first, and classes that several dimensions divide are gathered along all but the first.

    Source: the one-step backward is derived in docs/cross_entropy.md.
    """
    one_process = class_group is None and row_group is None and class_start is None and classes is None
    alone = (
        weight is None
        and label_smoothing == 0
        and token_weight is None
        and class_mask is None
        and softcap is None
        and loss_dtype is None
        and normalizer is None
        and size_average is None
        and reduce is None
        and type(z_loss) in _NUMBERS
        and z_loss == 0
        and not return_outputs
        and type(logit_scale) in _NUMBERS
        and logit_scale == 1
        and empty == "nan"
        and one_process
    )
    if alone and not (inplace_backward or torch.compiler.is_compiling()):
        try:
            small = functions.small_loss(input, target, ignore_index, reduction)
        except RuntimeError:
            check_ignore_index(ignore_index)  # the dispatcher does not say that an integer is too large
            raise
        if small is not None:
            return small
    overridden = has_torch_function(input, target, weight)
    if overridden or any_dtensor(input, target, weight, class_mask, token_weight, normalizer):
        given: dict[str, Any] = {
            "weight": weight,
            "size_average": size_average,
            "ignore_index": ignore_index,
            "reduce": reduce,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }
        own: dict[str, Any] = {
            "z_loss": z_loss,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "token_weight": token_weight,
            "normalizer": normalizer,
            "class_mask": class_mask,
            "empty": empty,
            "loss_dtype": loss_dtype,
            "inplace_backward": inplace_backward,
            "return_outputs": return_outputs,
            "class_group": class_group,
            "class_start": class_start,
            "classes": classes,
            "row_group": row_group,
        }
        if overridden:
            function: Any = cross_entropy
            return handle_torch_function(function, (input, target, weight), input, target, **given, **own)  # type: ignore[no-any-return]
        return _of_dtensors(input, target, {**given, **own})
    if alone:
        indices = index_door(input, target, ignore_index, reduction)
        if indices is not None:
            if inplace_backward:
                _check_inplace(input)
            return index_loss(input, indices, ignore_index, reduction, inplace_backward)
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)  # type: ignore[assignment]
    if inplace_backward and isinstance(input, Tensor):
        _check_inplace(input)
    ranks = None
    if not one_process:
        ranks = check_ranks(Ranks(class_group, class_start, classes, row_group))
    check_places(input, target, weight, class_mask, token_weight)
    numbers = Numbers(ignore_index, label_smoothing, z_loss, logit_scale, softcap)
    some = class_group is not None
    call = prepare(input, target, weight, class_mask, token_weight, numbers, loss_dtype, some)
    run = partial(rows, inplace_backward=inplace_backward)
    wanted = Reduction(reduction, normalizer, empty, return_outputs, ranks).check()
    return reduced_loss(call, wanted, run, inplace_backward)
