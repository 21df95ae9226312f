"""Imports torchvision beside a torch that its compiled library was not built for: its models need none of its ops.

``make models`` installs it, and what needs it, in a folder that only this file puts on the path.
"""

import importlib
import importlib.machinery
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import torch

LIBRARIES = str(Path(sys.prefix, "model_libraries"))
_DEFINED: list[torch.library.Library] = []  # a Library takes its definitions along when it is freed


def is_installed(name: str) -> bool:
    """Whether a package can be imported, here or once torchvision is."""
    return importlib.machinery.PathFinder.find_spec(name, [*sys.path, LIBRARIES]) is not None


def import_torchvision() -> ModuleType | None:
    """torchvision, whose ops have but names where its library does not load; None where it is not installed."""
    if not is_installed("torchvision"):
        return None
    if LIBRARIES not in sys.path:
        sys.path.append(LIBRARIES)
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:  # it registers rules for ops that nothing has defined
        library = torch.library.Library("torchvision", "FRAGMENT")
        spec = importlib.util.find_spec("torchvision")
        assert spec is not None and spec.origin is not None
        rules = Path(spec.origin).with_name("_meta_registrations.py").read_text(encoding="utf-8")
        for name in sorted(set(re.findall(r'"torchvision::(\w+)"', rules))):
            library.define(f"{name}(Tensor input) -> Tensor")
        _DEFINED.append(library)
        return importlib.import_module("torchvision")
