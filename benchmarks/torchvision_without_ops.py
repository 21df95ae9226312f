"""Imports torchvision beside a torch that its compiled library was not built for: its models need none of its ops."""

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import torch

_DEFINED: list[torch.library.Library] = []  # a Library takes its definitions along when it is freed


def import_torchvision() -> ModuleType | None:
    """torchvision, whose ops have but names where its library does not load; None where it is not installed."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.submodule_search_locations is None:
        return None
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:  # it registers rules for ops that nothing has defined
        library = torch.library.Library("torchvision", "FRAGMENT")
        rules = Path(spec.submodule_search_locations[0], "_meta_registrations.py").read_text(encoding="utf-8")
        for name in sorted(set(re.findall(r'"torchvision::(\w+)"', rules))):
            library.define(f"{name}(Tensor input) -> Tensor")
        _DEFINED.append(library)
        return importlib.import_module("torchvision")
