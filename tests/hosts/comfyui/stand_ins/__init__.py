"""Nodes that treat the network of a MODEL as widespread packs do, written from what those packs are known to do.

Loaded by ComfyUI beside Flux Kit. Each knows core's Flux only: its class name, its attributes and BFL's signatures.
"""

from .blocks import FirstBlockCache, Processors
from .forwards import Identity, StepCache
from .values import AnyText

NODE_CLASS_MAPPINGS = {f"StandIn{node.__name__}": node for node in (StepCache, FirstBlockCache, Identity, Processors,
                                                                    AnyText)}
