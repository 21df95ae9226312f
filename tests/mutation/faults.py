"""Which faults are seeded: in each function named here, the first few of a fixed draw among the operators' changes.

A function is found by its name anywhere in its folder; no line is quoted. After a renaming, name it anew here:
tests/release/test_mutation.py says which names stand nowhere.
"""

import hashlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from .operators import Edit, edits

PER_FUNCTION = 1
# the tests that should notice -> folder (its sub-folders too) -> names of functions and structs
PLACES: dict[str, dict[str, str]] = {
    "ce": {
        "fused_ops/ops/cross_entropy": """
            _softmax_jvp double_backward row_scale _residual backward_jvp jvp grad_input grad_probabilities grad_weight
            dot _of_nll _quiet neg_entropy_terms reduced_loss _denominator _mixup _mean _normalizer
            fixed_order_sum small_loss _inplace_gradient""",
        "csrc/cross_entropy": """
            target_residual SplitLse plain_row largest exp_sums_of gradients_of add_exp
            plain_step plain_forward read_scales raise step_gradient step_sums read_targets
            RowTarget add_indices plain_backward count_allowed coefficients_of chain set_target coefficients
            log_sum exponentials finish_gradient cross_entropy_with_gradient forward_in_blocks each_element_alone
            few_classes_sums few_classes_gradient plain_layout_of""",
        "csrc/simd": "exp_ round_to_bfloat16 store_chunk",
    },
    "bn": {
        "fused_ops/ops/batch_norm": """
            linear quadratic tangent rule _statistics forward backward gradients write_running _updated pack
            first_derivative second_derivative batch_norm _mask_rows""",
        "csrc/batch_norm": """
            merge nhwc_moments nchw_moments add ColumnSums nhwc_sums nchw_sums add_line grad_before buffer_before
            applied apply_part zero_invalid grad_run grad_nhwc mask_byte take offset derivative activated merge_moments
            merge_sums for_rows_together set_affine batch_norm_small_forward batch_norm_small_backward
            forward backward""",
        "csrc/simd": "tanh_ normal_below gauss expm1_ sigmoid_ select positive",
    },
    "lce": {
        "fused_ops/ops/linear_cross_entropy": """
            parts_of _chunks product add _add _chunked_second differentiable shifted low_rank small chunk_ tile_sums_
            tile_grads_ head_gradients _row_results backward _gradients finish""",
        "fused_ops/core": "is_one",
        "csrc/linear_cross_entropy": """
            linear_cross_entropy_chunk fold fold_classes tile_sums tile_grads transposed product check_head reduce
            linear_cross_entropy_small readable_tile""",
        "csrc/cross_entropy": "forward_then_backward denominator",
    },
    "guard": {"csrc/simd": "load_tail store_tail load_part store_part"},
}
# What changes no result that is promised, by "file.function operator n", with the reason.
EQUIVALENT: dict[str, str] = {}


class Fault(NamedTuple):
    """One change of one function, the n-th that its operator could make there."""

    suite: str
    file: str
    function: str
    n: int
    edit: Edit

    @property
    def name(self) -> str:
        """What ``EQUIVALENT`` and the reports call it."""
        return f"{Path(self.file).stem}.{self.function} {self.edit.operator} {self.n}"

    def show(self, source: str) -> str:
        """The line before and after."""
        start = source.rfind("\n", 0, self.edit.start) + 1
        end = source.find("\n", self.edit.end)
        line = source[start:end]
        return f"{' '.join(line.split())} -> {' '.join(self.edit.apply(source)[start : end - len(source)].split())}"


def draw(tree: Path) -> list[list[Fault]]:
    """The functions, each with its faults, the first ``PER_FUNCTION`` of which are tried; the others may stand in."""
    places = [(suite, name, files) for suite in PLACES for name, files in found(tree, suite)]
    return [faults for place in places for faults in _drawn(tree, *place)]


def missing(tree: Path) -> list[str]:
    """The names of ``PLACES`` that stand nowhere in their folder."""
    return [f"{suite}: {name}" for suite in PLACES for name, files in found(tree, suite) if not files]


def found(tree: Path, suite: str) -> Iterator[tuple[str, list[str]]]:
    """Each name with the files that it is defined in, those for GPUs aside."""
    for folder, names in PLACES[suite].items():
        paths = [p for p in sorted((tree / folder).rglob("*")) if p.suffix in (".py", ".cpp", ".h")]
        sources = {str(p.relative_to(tree)): p.read_text() for p in paths if "cuda" not in p.name}
        for name in names.split():
            yield name, [file for file, source in sources.items() if edits(source, name, file.endswith(".py"))]


def _drawn(tree: Path, suite: str, function: str, files: list[str]) -> Iterator[list[Fault]]:
    for file in files:
        faults, seen = [], dict[str, int]()
        for edit in edits((tree / file).read_text(), function, file.endswith(".py")):
            n = seen[edit.operator] = seen.get(edit.operator, -1) + 1
            faults.append(Fault(suite, file, function, n, edit))
        yield _in_turn([f for f in faults if f.name not in EQUIVALENT])


def _in_turn(faults: list[Fault]) -> list[Fault]:
    """By a hash of each fault's name, no operator twice before every operator has come once."""

    def rank(text: str) -> bytes:
        return hashlib.sha256(text.encode()).digest()

    ranked = sorted(faults, key=lambda f: (f.edit.operator, rank(f.name)))
    turns = [(i, f) for _, group in groupby(ranked, key=lambda f: f.edit.operator) for i, f in enumerate(group)]
    return [f for i, f in sorted(turns, key=lambda turn: (turn[0], rank(f"{turn[0]} {turn[1].name}")))]
