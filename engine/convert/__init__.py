"""Making model files: quantising."""

from .files import SUFFIXES, quantize
from .ggml import ENCODERS, encode
from .recipes import RECIPES, ROLES
from .report import Report

__all__ = ["ENCODERS", "RECIPES", "ROLES", "SUFFIXES", "Report", "encode", "quantize"]
