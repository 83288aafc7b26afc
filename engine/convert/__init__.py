"""Making model files: quantising."""

from .files import SUFFIXES, quantize, result_name, role_of
from .ggml import ENCODERS, encode
from .recipes import RECIPES, ROLES
from .report import Report, lines_of

__all__ = ["ENCODERS", "RECIPES", "ROLES", "SUFFIXES", "Report", "encode", "lines_of", "quantize", "result_name",
           "role_of"]
