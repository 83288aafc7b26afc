"""LoRA files of every trainer, what they do to a weight, and stacks of them on a model."""

from .adapter import Adapter
from .attach import Applied, Attachment, Entry, attach, planned
from .blocks import block_weights
from .measure import Share, norm_share
from .reading import Lora, Options, inspect_lora, read_lora
from .report import Report
from .sidepath import Mask
from .stack import FluxLoras, Region, Row, parse_rows, rows_of, stack_of

__all__ = ["Adapter", "Applied", "Attachment", "Entry", "FluxLoras", "Lora", "Mask", "Options", "Region", "Report",
           "Row", "Share", "attach", "block_weights", "inspect_lora", "norm_share", "parse_rows", "planned",
           "read_lora", "rows_of", "stack_of"]
