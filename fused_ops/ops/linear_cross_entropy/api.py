"""Linear cross-entropy: the public function, and which way a call goes."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function
from typing_extensions import Unpack

from fused_ops.core.checks import check_tensors
from fused_ops.core.graph import needs_formulas, no_script
from fused_ops.core.torch_private import forward_ad, has_torch_function, transforms_active
from fused_ops.distributed.dtensor import any_dtensor
from fused_ops.ops.cross_entropy.api import cross_entropy, index_loss, rows
from fused_ops.ops.cross_entropy.arguments import Call, Empty, Numbers, ReductionName, Target, prepare, target_tensors
from fused_ops.ops.cross_entropy.functions import REDUCTIONS
from fused_ops.ops.cross_entropy.reduction import (
    CrossEntropyOutput,
    Reduction,
    denominator_of_ranks,
    reduced_loss,
    row_scale,
)
from fused_ops.ops.cross_entropy.row import RowArgs, RowOptions, rows_shape
from fused_ops.ops.cross_entropy.shards import Ranks, check_place, check_ranks, find_place
from fused_ops.ops.linear_cross_entropy import by_shards, dtensors, reference
from fused_ops.ops.linear_cross_entropy.arguments import (
    LinearCallOptions,
    PerRow,
    at_least_one,
    checked_ignore_index,
    flat,
    flat_target,
    head_of,
    main_grad_matrix,
    shapes,
    shifted,
    with_all_rows,
)
from fused_ops.ops.linear_cross_entropy.by_shards import Spread
from fused_ops.ops.linear_cross_entropy.functions import linear_rows, linear_sum
from fused_ops.ops.linear_cross_entropy.plan import Cut
from fused_ops.ops.linear_cross_entropy.reference import Head
from fused_ops.ops.linear_cross_entropy.small import are_plain, is_small, small_logits, small_loss

_NUMBERS = (float, int)
_LARGE = 2**62  # an ignore_index beyond takes the long way, which asks whether it fits in 64 bits


def _whole_rows(head: Head, classes: int, a: RowArgs, o: RowOptions) -> tuple[Tensor, ...]:
    """The rows of logits that exist all at once."""
    return rows(a._replace(input=reference.logits(head, classes)), o)


def _is_sum(call: Call, head: Head, reduction: Reduction, spread: bool) -> int:
    """Which of the head's gradients the forward may find at once, as bits; 0 if the rows must be kept apart.

    If the classes are spread over ranks, some may be without any, and goes the way of the others.
    """
    if reduction.name == "none" or reduction.outputs or not torch.is_grad_enabled() or transforms_active():
        return 0
    nothing = 0 in rows_shape(call.args.input) if spread else call.args.input.numel() == 0
    if nothing and not torch.compiler.is_compiling():
        return 0
    others = (call.args.probabilities, call.args.weight, call.token_weight, reduction.normalizer)
    if forward_ad._current_level >= 0 or any(isinstance(t, Tensor) and t.requires_grad for t in others):
        return 0
    return sum(1 << i for i, t in enumerate(head) if t is not None and t.requires_grad)


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Target,
    *,
    return_outputs: Literal[False] = False,
    **more: Unpack[LinearCallOptions],
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Target,
    *,
    return_outputs: Literal[True],
    **more: Unpack[LinearCallOptions],
) -> CrossEntropyOutput: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Target,
    *,
    return_outputs: bool,
    **more: Unpack[LinearCallOptions],
) -> Tensor | CrossEntropyOutput: ...
@no_script
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Target,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: ReductionName = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    class_mask: Tensor | None = None,
    empty: Empty = "nan",
    loss_dtype: torch.dtype | None = None,
    shift: bool = False,
    lora: tuple[Tensor, Tensor, float] | None = None,
    chunk_rows: int | None = None,
    max_memory_bytes: int | None = None,
    return_outputs: bool = False,
    class_group: Any = None,
    class_start: int | None = None,
    classes: int | None = None,
    row_group: Any = None,
    sequence_parallel: bool = False,
    compact: bool = False,
    main_grad: Tensor | None = None,
) -> Tensor | CrossEntropyOutput:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)`` without the logits.

    A drop-in for ``torch.nn.functional.linear_cross_entropy``. Of the logits one chunk of rows exists at a time.

    Args:
        input: (..., in_features); float32, float64, bfloat16 or float16.
        linear_weight: (classes, in_features), or (classes, d1, ..., in_features) for a loss at several positions; the
            dtype of ``input``.
        target: As for ``cross_entropy`` of logits (..., classes, d1, ...): class indices of shape (..., d1, ...), class
            probabilities, (indices, probabilities), or (target_a, target_b, lam).
        linear_bias: (classes,) or (classes, d1, ...).
        weight: (classes,), the factor of each class.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: Class index whose rows count for nothing; they are left out of the matrix products (on the CPU).
            Default: -100.
        label_smoothing: In [0, 1].
        options: ``torch.nn.LinearCrossEntropyOptions``, accepted and not needed.
        z_loss: As in ``cross_entropy``, like the next seven.
        logit_scale: Multiplies the logits.
        softcap: Bounds them.
        token_weight: A factor of each row, of the shape of the loss without reduction.
        normalizer: Replaces the mean's denominator.
        class_mask: bool, (classes,) or the shape of the logits.
        empty: ``"nan"``, ``"zero"`` or ``"raise"``.
        loss_dtype: Of the loss.
        shift: Each position's target is that of the next one, as in a language model: input (..., positions,
            in_features), target (..., positions); the last position counts for nothing. With ``"none"`` and in the
            outputs it is there with a loss of 0.
        lora: (A, B, scale) of shapes (rank, in_features) and (classes, rank): adds ``scale * input @ A.T @ B.T`` to the
            logits.
        chunk_rows: Rows whose logits exist at once. Default: chosen with the memory, see ``max_memory_bytes``.
        max_memory_bytes: What the call may take beyond inputs and gradients. Default on the CPU: 3 % of the logits, or
            what it takes for products that lose no more than 3/64 of their rate in float32, 3/32 in 16 bit: at most
            the logits of 512 rows or of half of them, and in 16 bit of 470 rows and two copies of ``linear_weight``,
            but never more than all the logits; these, if they are at most 1 MiB. With less memory than keeps every row,
            some logits are computed twice. Default on CUDA: 1024 rows of logits or as many as the second-level cache
            holds; with 16-bit weights whose gradient is wanted at least 2048 rows, or as many as there are features,
            beside a float32 sum of that gradient, or all rows at once where that is less; of class indices without
            options 32 MiB, if there are no more rows than features.
        return_outputs: Returns a ``CrossEntropyOutput``.
        class_group: As in ``cross_entropy``, like the next three, of ranks that share the classes: ``linear_weight``,
            ``linear_bias``, lora's B, class probabilities and a ``class_mask`` of the logits' shape hold this rank's.
            All else is the same on all ranks, and its gradients, those of ``input`` and lora's A too, are whole on
            each: not to be summed again.
        class_start: The first class of this rank.
        classes: How many all ranks have.
        row_group: Of ranks that share the rows, one or a tuple of them.
        sequence_parallel: ``input`` has this rank's entries of its first dimension, any number of them, in the order of
            the ranks of ``class_group``. ``target``, ``token_weight`` and what else has a value per row, and the
            results, are of all of them. The input is gathered, and its gradient is that of this rank's entries.
        compact: Leaves ignored rows out of the matrix products on a GPU too, which the call then waits for, as it has
            to know their number. For class indices that are reduced; without effect while compiling or tracing.
        main_grad: float32 (float64 for such weights), contiguous, of the shape of ``linear_weight``. Each backward adds
            the weight's gradient to it in one pass, before it is rounded to 16 bits (on the CPU once rounded, where it
            is one product of all rows); ``linear_weight.grad`` stays as it is. With ``class_group`` it has this rank's
            classes. With DTensors it is one, placed as the ranks find the gradient: as the weight where that is not
            gathered, ``Partial()`` along what divides the rows.

    Returns:
        The loss, as ``cross_entropy`` of the logits.

    Raises:
        ValueError: as ``cross_entropy``; ``chunk_rows`` or ``max_memory_bytes`` below 1; a ``max_memory_bytes`` that no
            plan keeps (less than a row of logits, or than 128 beside a float32 sum of a 16-bit weight's gradient), but
            of logits of at most 1 MiB; ``sequence_parallel`` without ``class_group``, or with a target of another
            number of rows than the ranks have together; ``compact`` with another target than class indices, without
            reduction, with ``return_outputs`` or ``sequence_parallel``.
        RuntimeError: as ``cross_entropy``; shapes or dtypes of the matrices that do not fit; ``ignore_index`` given
            with class probabilities; ``shift`` with another target than class indices; ``main_grad`` where a backward
            is to be differentiable, as of create_graph and torch.func, and in a graph: torch.compile breaks it there.
        IndexError: a class index outside [0, classes).
        NotImplementedError: ``input`` is not floating-point.
        TypeError: something that must be a tensor or a number is none.

    Note:
        With a scalar loss the forward computes the gradients too, while it has the logits, so that training takes the
        three matrix products that it must; weights' gradients are rounded once, or added up in float32 at least.
        Without reduction, and with ``return_outputs``, the backward computes the logits again, in chunks as well. The
        second derivative is computed in chunks; forward-mode AD, torch.func and derivatives beyond take the logits at
        once.

        With ``class_group`` each chunk is one exchange, which goes on while the next chunk's product is computed; two
        chunks share what ``chunk_rows`` and ``max_memory_bytes`` allow. These, like all arguments that say what is
        computed, must be the same on all ranks, and so must be which gradients are wanted and how often a backward
        runs. The gradient of ``input`` is one sum over ranks: of 16 bits in float32, and rounded once. The second
        derivative takes all logits of a rank at once.

        DTensors need no process groups: along a dimension of the mesh that divides ``linear_weight`` by classes
        (``Shard(0)``) the ranks share classes, along one that divides the rows of ``input`` they share rows, and the
        result is a DTensor, as of ``cross_entropy``. Where one divides both, the ``input`` is gathered if 3 * rows <=
        2 * classes (it travels once in the forward, and its gradient twice in the backward), else the weight (and its
        gradient is reduce-scattered). Features that are divided are gathered. All else may be a DTensor or a tensor
        that every rank has whole.

    Source: chunked gradients in the forward as in Liger Kernel (arXiv:2410.10989); the memory question as in Cut
    Cross-Entropy (arXiv:2411.09009). The derivation is in docs/linear_cross_entropy.md.
    """
    one_process = class_group is None and row_group is None and class_start is None and classes is None
    if (
        lora is None
        and not shift
        and chunk_rows is None
        and max_memory_bytes is None
        and one_process
        and not sequence_parallel
        and not compact
        and main_grad is None
        and (ignore_index is None or (type(ignore_index) is int and -_LARGE < ignore_index < _LARGE))
        and not torch.compiler.is_compiling()
        and is_small(input, linear_weight, linear_bias, target)
    ):
        ignored = -100 if ignore_index is None else ignore_index
        assert isinstance(target, Tensor)
        if (
            weight is None
            and label_smoothing == 0
            and not return_outputs
            and token_weight is None
            and class_mask is None
            and softcap is None
            and normalizer is None
            and loss_dtype is None
            and type(z_loss) in _NUMBERS
            and z_loss == 0
            and type(logit_scale) in _NUMBERS
            and logit_scale == 1
            and empty == "nan"
            and reduction in REDUCTIONS
        ):
            small = small_loss(input, linear_weight, linear_bias, target, ignored, reduction)
            if small is not None:
                return small
        elif token_weight is None and class_mask is None and are_plain(weight, normalizer):
            return cross_entropy(
                small_logits(input, linear_weight, linear_bias, target),
                target,
                weight,
                ignore_index=ignored,
                reduction=reduction,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                logit_scale=logit_scale,
                softcap=softcap,
                normalizer=normalizer,
                empty=empty,
                loss_dtype=loss_dtype,
                return_outputs=return_outputs,
            )
    overridden = not torch.compiler.is_compiling() and has_torch_function(input, linear_weight, linear_bias, target)
    beside = weight, class_mask, token_weight, normalizer, lora
    if overridden or any_dtensor(input, linear_weight, linear_bias, target, *beside):
        everything: dict[str, Any] = {
            "linear_bias": linear_bias,
            "weight": weight,
            "reduction": reduction,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "options": options,
            "z_loss": z_loss,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "token_weight": token_weight,
            "normalizer": normalizer,
            "class_mask": class_mask,
            "empty": empty,
            "loss_dtype": loss_dtype,
            "shift": shift,
            "lora": lora,
            "chunk_rows": chunk_rows,
            "max_memory_bytes": max_memory_bytes,
            "return_outputs": return_outputs,
            "class_group": class_group,
            "class_start": class_start,
            "classes": classes,
            "row_group": row_group,
            "sequence_parallel": sequence_parallel,
            "compact": compact,
            "main_grad": main_grad,
        }
        if overridden:
            tensors = (input, linear_weight, linear_bias, target)
            function: Any = linear_cross_entropy
            return handle_torch_function(function, tensors, input, linear_weight, target, **everything)  # type: ignore[no-any-return]
        parts, mine, logits = dtensors.spread(input, linear_weight, target, everything)
        return logits.result(linear_cross_entropy(*parts, **mine), reduction)  # type: ignore[no-any-return]
    named: list[tuple[str, Any]] = [
        *(("input", input), ("linear_weight", linear_weight), ("linear_bias", linear_bias), *target_tensors(target)),
        *(("weight", weight), ("class_mask", class_mask), ("token_weight", token_weight), ("main_grad", main_grad)),
        *((f"lora[{i}]", value) for i, value in enumerate(lora if isinstance(lora, (tuple, list)) else ())),
    ]
    check_tensors("linear_cross_entropy", named)
    if sequence_parallel and class_group is None:
        raise ValueError("linear_cross_entropy: sequence_parallel=True is for classes that are spread over class_group")
    ranks = None
    if not one_process:
        ranks = check_ranks(Ranks(class_group, class_start, classes, row_group), "linear_cross_entropy")
    if shift:
        target, ignore_index = shifted(input, target, ignore_index)
    wanted = Reduction(reduction, normalizer, empty, return_outputs, ranks).check()
    shape = shapes(input, linear_weight, linear_bias)
    if sequence_parallel:
        shape = with_all_rows(shape, input, target)
    if main_grad is not None:
        main_grad = main_grad_matrix(main_grad, linear_weight)
        linear_weight = linear_weight.view_as(linear_weight)  # with a node that a backward runs or leaves out
    head = head_of(input, linear_weight, linear_bias, lora, shape, class_group if sequence_parallel else None)
    some = class_group is not None
    found = flat_target(target, shape, ignore_index, some)
    cut = Cut(
        math.prod(shape.outputs),
        at_least_one("chunk_rows", chunk_rows),
        at_least_one("max_memory_bytes", max_memory_bytes),
    )
    ignored = checked_ignore_index(ignore_index)
    if class_mask is not None and isinstance(class_mask, Tensor) and class_mask.dim() > 1:
        class_mask = flat("class_mask", class_mask, shape, shape.classes)
    if token_weight is not None:
        token_weight = flat("token_weight", token_weight, shape, None)
    if compact:
        if reduction == "none" or return_outputs or sequence_parallel:
            raise ValueError(
                "linear_cross_entropy: compact=True is for a reduced loss, expected neither reduction='none' nor "
                "return_outputs nor sequence_parallel"
            )
        per_row = PerRow(head, found, token_weight, class_mask)
        if not torch.compiler.is_compiling():
            per_row = per_row.without_ignored(ignored)
        head, found, token_weight, class_mask = per_row
        shape = shape._replace(lead=(head.input.size(0),))
    stand_in = head.input.new_empty(()).expand(shape.with_classes(shape.classes, True))  # the logits' shape and dtype
    given = Numbers(ignored, label_smoothing, z_loss, logit_scale, softcap)
    call = prepare(stand_in, found, weight, class_mask, token_weight, given, loss_dtype, some)
    if call.args.input.dtype != head.input.dtype:  # float64 class probabilities or weights
        head = Head(*(None if t is None else t.to(call.args.input.dtype) for t in head))  # type: ignore[arg-type]
    spread = None
    if ranks is not None:
        head, spread, wanted = _with_ranks(call, head, wanted, math.prod(shape.lead) if sequence_parallel else None)
    result: Any = _run(call, head, shape.classes, cut, wanted, spread, main_grad)
    if reduction != "none" and not return_outputs:
        return result  # type: ignore[no-any-return]
    row_shape = shape.rows(False)
    if not return_outputs:
        return result.reshape(row_shape)  # type: ignore[no-any-return]
    return CrossEntropyOutput(*(t if t is None or t.dim() == 0 else t.reshape(row_shape) for t in result))


def _with_ranks(
    call: Call, head: Head, reduction: Reduction, rows: int | None
) -> tuple[Head, Spread | None, Reduction]:
    """The head with what all ranks have alike, where its classes are, and the reduction with its denominator.

    Args:
        call: The checked call.
        head: The matrices.
        reduction: With process groups.
        rows: Of all ranks, where each has some of the input's.
    """
    ranks = reduction.ranks
    assert ranks is not None
    place = None if ranks.class_group is None else find_place(call.args.input, ranks)
    if place is not None and not isinstance(place, Tensor):
        check_place(call.args, place)
    if ranks.row_group is not None:
        denominator = denominator_of_ranks(call, reduction, place)
        reduction = reduction if denominator is None else reduction._replace(normalizer=denominator)
    reduction = reduction._replace(ranks=None)
    if place is None:
        return head, None, reduction
    return by_shards.spread(head, ranks.class_group, rows), Spread(place, ranks.class_group), reduction


def _run(
    call: Call,
    head: Head,
    classes: int,
    cut: Cut,
    reduction: Reduction,
    spread: Spread | None,
    main_grad: Tensor | None,
) -> Any:
    """The loss of a prepared call, in the way that suits it; what adds to a ``main_grad`` are the chunks."""
    compiling, in_formulas = torch.compiler.is_compiling(), needs_formulas()
    where: tuple[Any, ...] = ()
    if spread is not None:
        if main_grad is None and spread.at_once(head, cut):
            return reduced_loss(call, reduction, partial(spread.whole_rows, head, cut))
        where = spread.where()
    elif in_formulas or (not compiling and main_grad is None and cut.is_small(head)):
        if not in_formulas and reduction.is_ordinary() and call.is_index_alone():
            assert call.args.indices is not None
            logits = reference.logits(head, classes)
            return index_loss(logits, call.args.indices, call.options.ignore_index, reduction.name, of_head=True)
        return reduced_loss(call, reduction, partial(_whole_rows, head, classes))
    needs = _is_sum(call, head, reduction, spread is not None)
    if needs:
        scale = row_scale(call, reduction)
        nan_if_empty = reduction.name == "mean" and reduction.normalizer is None and reduction.empty == "nan"
        options = call.z_loss, call.options, cut, needs, nan_if_empty, where, main_grad
        loss = linear_sum(head, call.args, scale, *options)
        return loss.to(call.loss_dtype)
    return reduced_loss(call, reduction, partial(linear_rows, head, cut, where, main_grad))
