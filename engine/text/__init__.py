"""Prompts to text states: tokenizers, where they are found, prompt weights, encoding."""

from .encode import TextEncoders, Tokens
from .find import encoder_files, find_tokenizer
from .tokenizer import T5_LENGTHS, ClipTokenizer, T5Tokenizer, Token
from .weighting import parse_weights

__all__ = ["T5_LENGTHS", "ClipTokenizer", "T5Tokenizer", "TextEncoders", "Token", "Tokens", "encoder_files",
           "find_tokenizer", "parse_weights"]
