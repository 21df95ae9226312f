"""Makes the backend known to torch.compile by its name, where the entry point of an installed package does not.

``import fused_ops`` must not import Dynamo, so the backend is registered when somebody else does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from fused_ops.core.torch_private import BACKEND_REGISTRY

_NAME = "fused_ops"


def _backend(graph_module: Any, example_inputs: list[Any], **options: Any) -> Callable[..., Any]:
    from fused_ops.conversion.backend import fused_ops

    return fused_ops(graph_module, example_inputs, **options)


def _register(registry: ModuleType) -> None:
    with contextlib.suppress(AssertionError):  # it is registered
        registry.register_backend(_backend, _NAME)


class _WhenImported(MetaPathFinder):
    """Registers the backend when Dynamo's registry is imported, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != BACKEND_REGISTRY or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_backend() -> None:
    """Registers the backend, now or when Dynamo is imported."""
    registry = sys.modules.get(BACKEND_REGISTRY)
    if registry is None:
        sys.meta_path.insert(0, _WhenImported())
    else:
        _register(registry)


register_backend()
