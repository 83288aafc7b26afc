"""Flux Kit's nodes. Choose a host (`hosts.use`) before importing this package: the classes are built from its io."""

from .fill import FluxKitFill
from .images import FluxKitDecode, FluxKitEncode, FluxKitSave
from .inspect import FluxKitInspect
from .kontext import FluxKitKontext
from .loaders import (
    FluxKitLoadFlux,
    FluxKitLoadRedux,
    FluxKitLoadTextEncoders,
    FluxKitLoadTransformer,
    FluxKitLoadVAE,
)
from .lora import (
    FluxKitLoraApply,
    FluxKitLoraBlockWeights,
    FluxKitLoraInspect,
    FluxKitLoraRegion,
    FluxKitLoraSchedule,
    FluxKitLoraSweep,
)
from .lora_files import FluxKitLoraSave
from .lora_stack import FluxKitLoraStack
from .memory import FluxKitMemoryEstimate
from .quantise import FluxKitQuantize
from .redux import FluxKitRedux
from .regions import FluxKitMaskRefine, FluxKitOutpaintCanvas, FluxKitRegionCrop, FluxKitRegionPaste
from .sampling import FluxKitEmptyLatent, FluxKitSampler
from .shift import FluxKitAutoShift
from .structure import FluxKitStructure, FluxKitStructureMap
from .text import FluxKitEncodePrompt

NODES = [FluxKitLoadFlux, FluxKitLoadTransformer, FluxKitLoadTextEncoders, FluxKitLoadVAE, FluxKitLoadRedux,
         FluxKitEncodePrompt, FluxKitEmptyLatent, FluxKitSampler, FluxKitDecode, FluxKitEncode, FluxKitSave,
         FluxKitQuantize, FluxKitInspect, FluxKitMemoryEstimate, FluxKitLoraStack, FluxKitLoraApply,
         FluxKitLoraBlockWeights, FluxKitLoraSchedule, FluxKitLoraRegion, FluxKitLoraInspect, FluxKitLoraSweep,
         FluxKitLoraSave, FluxKitRedux, FluxKitKontext, FluxKitAutoShift, FluxKitMaskRefine,
         FluxKitOutpaintCanvas, FluxKitRegionCrop, FluxKitRegionPaste, FluxKitFill,
         FluxKitStructureMap, FluxKitStructure]

__all__ = ["NODES"]
