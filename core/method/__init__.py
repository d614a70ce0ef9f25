"""What all methods share."""

from core.anatomy import NORMS
from core.method.attached import Home, home_in, key_of, methods_on
from core.method.base import (
    MethodModule,
    PEFTMethod,
    Spec,
    check_structure,
    decode_extra_state,
    home_of,
    is_overridden,
    sample_name,
    training_batch,
    uncompiled,
)

__all__ = ["NORMS", "Home", "MethodModule", "PEFTMethod", "Spec", "check_structure", "decode_extra_state", "home_in",
           "home_of", "is_overridden", "key_of", "methods_on", "sample_name", "training_batch", "uncompiled"]
