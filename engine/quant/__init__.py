"""Packed weights: the formats they are stored in, and layers that hold them."""

from .cache import UnpackedCache
from .codebooks import MissingCodebook
from .formats import FORMATS, QuantFormat
from .ops import PACKED, Embedding, Linear, PackedOps, packed_like

__all__ = ["FORMATS", "PACKED", "Embedding", "Linear", "MissingCodebook", "PackedOps", "QuantFormat", "UnpackedCache",
           "packed_like"]
