"""The anatomies that Scion knows, by the library they come from: one small function a family (see `core.anatomy`)."""

from core.anatomy.families import (
    timm,
    torch_nn,
    transformers,
    transformers_decoders,
    transformers_encoders,
    transformers_t5,
    transformers_whisper,
)

__all__ = ["timm", "torch_nn", "transformers", "transformers_decoders", "transformers_encoders", "transformers_t5",
           "transformers_whisper"]
