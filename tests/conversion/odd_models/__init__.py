"""Small models that do what real ones sometimes do, each a case, and the check that a transform changes none of it.

A case says nothing about how models are transformed: ``check(case, transform, mode)`` holds whatever the transform
gives to the untouched model: outputs (types, values, strides, aliases), gradients, buffers, python state, random
numbers drawn, what was printed, errors.
"""

from odd_models import (
    answers,
    batch_statistics,
    changed_later,
    containers,
    contexts,
    hooks,
    layouts,
    questions,
    state,
    writes,
)
from odd_models.case import CASES, Case
from odd_models.check import MODES, Difference, check

__all__ = [
    "CASES",
    "MODES",
    "Case",
    "Difference",
    "answers",
    "batch_statistics",
    "changed_later",
    "check",
    "containers",
    "contexts",
    "hooks",
    "layouts",
    "questions",
    "state",
    "writes",
]
