"""The tokenizers of tiny-flux: of the same kinds as FLUX.1's, with vocabularies of a few hundred pieces.

T5's is a Unigram model whose words are single pieces and whose letters are the fallback; CLIP's is a byte-level BPE
with `</w>` endings. Both are built from the word list alone, so they never change by accident.
"""

from __future__ import annotations

import json

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from .scenes import PALETTE, PLACE_WORDS, SHAPES, SIZE_WORDS, WORDINGS

# words that later members of the family (edits, fills, styles) and people's own sentences need
MORE_WORDS = """
    add and another as at back be behind below beside between big both bright by canny canvas change color
    colors colour colored coloured corner dark depth drawing draw each edge empty everything fill filled flat
    for from front full give gray grey has have here huge icon image in inside instead into is it its keep leave
    left less light little lower make makes middle mid more move my near new next no not nothing now object of
    off old one only or other out outside paint painting photo picture place plain please put recolor red remove
    replace resize right same scene shape shapes shift show shows side simple size small solid some style swap
    that the their them then there thing this tiny to turn two under up upper use using very was where which
    white with without you your pink brown cyan magenta teal square circle triangle ring star diamond heart
    hexagon cross line dot disc disk background foreground figure ground reference centred
"""
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PUNCTUATION = ".,;:!?'\"()-_/&%+*#@=<>[]{}|~^$`\\"


def words() -> list[str]:
    """Every word of the grammar and of `MORE_WORDS`, sorted."""
    texts = [*PALETTE, *SHAPES, *(w for group in PLACE_WORDS.values() for w in group),
             *(w for group in SIZE_WORDS.values() for w in group), *WORDINGS, "an", MORE_WORDS]
    found = {word for text in texts for word in "".join(c if c.isalpha() else " " for c in text).split()}
    return sorted(found)


def t5_tokenizer() -> Tokenizer:
    """Unigram with T5's special pieces: `<pad>` 0, `</s>` 1, `<unk>` 2; appends `</s>`."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\u2581{word}", -5.0 - 0.01 * i) for i, word in enumerate(words())]
    pieces += [(piece, -12.0 - 0.01 * i) for i, piece in enumerate(["\u2581", *LETTERS, *PUNCTUATION])]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def clip_tokenizer() -> Tokenizer:
    """Byte-level BPE with `</w>`; the last two ids are start and end of text, which frame every prompt."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    split = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trained.pre_tokenizer = split
    trained.train_from_iterator(
        [" ".join(words())] * 10, trainers.BpeTrainer(vocab_size=4000, end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(c + "</w>" for c in alphabet)]
    known = set(pieces)
    for left, right in merges:
        if left + right not in known:
            known.add(left + right)
            pieces.append(left + right)
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    start, end = len(pieces) - 2, len(pieces) - 1
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges,
                                     end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", start), ("<|endoftext|>", end)])
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return tokenizer
