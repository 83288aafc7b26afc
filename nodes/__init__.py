"""Flux Kit's nodes. Choose a host (`hosts.use`) before importing this package: the classes are built from its io."""

from .images import FluxKitDecode, FluxKitEncode, FluxKitSave
from .loaders import (
    FluxKitLoadFlux,
    FluxKitLoadRedux,
    FluxKitLoadTextEncoders,
    FluxKitLoadTransformer,
    FluxKitLoadVAE,
)
from .sampling import FluxKitEmptyLatent, FluxKitSampler
from .text import FluxKitEncodePrompt

NODES = [FluxKitLoadFlux, FluxKitLoadTransformer, FluxKitLoadTextEncoders, FluxKitLoadVAE, FluxKitLoadRedux,
         FluxKitEncodePrompt, FluxKitEmptyLatent, FluxKitSampler, FluxKitDecode, FluxKitEncode, FluxKitSave]

__all__ = ["NODES"]
