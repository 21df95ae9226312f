"""Plain-PyTorch twins of the kernels: every intermediate, and the closed form. Also what runs where no kernel does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One call of an op's public function; each ``reference/<op>.py`` lists its own in ``samples()``.

    The same list feeds gradcheck, gradgradcheck, forward-mode AD and opcheck, in the tests and in the command line.
    """

    name: str
    args: tuple[Any, ...]  # tensors that require grad are the ones that are checked
    kwargs: dict[str, Any] = field(default_factory=dict)
