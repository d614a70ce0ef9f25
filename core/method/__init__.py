"""What a method is: defined, attached, merged, saved, trained."""

from core.anatomy import NORMS
from core.method.abilities import AddsLoss, OwnLoss, OwnOptimizer, Prepared, Scheduled, Staged
from core.method.attached import Home, home_in, key_of, methods_on
from core.method.base import PEFTMethod, is_overridden
from core.method.definition import device_and_dtype_beside
from core.method.on_model import uncompiled
from core.method.plan import Plan
from core.method.preparing import sample_name, training_batch
from core.method.state import MethodModule, Spec, check_shapes, check_structure, decode_extra_state, shapes_by_site

home_of = device_and_dtype_beside  # its former name

__all__ = ["NORMS", "AddsLoss", "Home", "MethodModule", "OwnLoss", "OwnOptimizer", "PEFTMethod", "Plan", "Prepared",
           "Scheduled", "Spec", "Staged", "check_shapes", "check_structure", "decode_extra_state",
           "device_and_dtype_beside", "home_in", "home_of", "is_overridden", "key_of", "methods_on", "sample_name",
           "shapes_by_site", "training_batch", "uncompiled"]
