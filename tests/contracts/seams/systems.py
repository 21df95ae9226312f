"""All systems, registered by the modules that define them."""

from . import compiled, exported, tracers, training, transforms, without_data
from .registry import SYSTEMS, System

MODULES = (transforms, without_data, training, tracers, compiled, exported)

__all__ = ["MODULES", "SYSTEMS", "System"]
