"""Kinds of token, by the text that a token stands for: does a model spend as many experts on a blank as on the beginning of a word?"""

from __future__ import annotations

import unicodedata

import numpy as np
import torch
from torch import Tensor

from moetrain.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

KINDS = ("beginning of a word", "inside a word", "digit", "space", "line break", "punctuation", "other", "special")
"""A token is what its first character that is no blank says; `other` is a part of a character, or an id without a text."""
_BEGIN, _INSIDE, _DIGIT, _SPACE, _LINE, _PUNCTUATION, _OTHER, _SPECIAL = range(len(KINDS))


class TokenKinds:
    """The kind of each token of a text. Letters begin a word where a blank comes with them or no letter is before them in their document."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> None:
        """vocab_size: of the model; ids beyond the tokenizer's are `other`."""
        texts = token_texts(tokenizer)[:vocab_size]
        kinds = np.full(vocab_size, _OTHER, dtype=np.int64)
        kinds[: len(texts)] = [_SPECIAL if text is None else _kind(text) for text in texts]
        letter_ends, blank_begins = np.zeros((2, vocab_size), dtype=bool)
        letter_ends[: len(texts)] = [bool(text) and text[-1].isalpha() for text in texts]
        blank_begins[: len(texts)] = [bool(text) and text[0].isspace() for text in texts]
        self.kinds, self.letter_ends, self.blank_begins = (torch.from_numpy(a).to(device) for a in (kinds, letter_ends, blank_begins))

    @classmethod
    def of_tokenizer(cls, spec: str | None, vocab_size: int, device: torch.device) -> TokenKinds | None:
        """By the tokenizer's name; None where it is not known or no longer there: a run does not end for a statistic."""
        try:
            return None if spec is None else cls(load_tokenizer(spec), vocab_size, device)
        except ValueError:
            return None

    def of(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions: (B, S) int64, ids and places in their documents. -> (B, S) int64, places in KINDS."""
        kinds = self.kinds[tokens]
        after_letter = torch.zeros_like(tokens, dtype=torch.bool)
        after_letter[:, 1:] = self.letter_ends[tokens[:, :-1]] & (positions[:, 1:] > 0)
        goes_on = (kinds == _BEGIN) & after_letter & ~self.blank_begins[tokens]
        return torch.where(goes_on, _INSIDE, kinds)


def token_texts(tokenizer: Tokenizer) -> list[str | None]:
    """The text of every id, blanks included; None for a special token, "" for an id without a text."""
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    if isinstance(tokenizer, ByteTokenizer):
        return [None if i in special else chr(i) if i < 128 else "\ufffd" for i in range(tokenizer.vocab_size)]
    texts = tokenizer.texts()
    return [None if i in special else text for i, text in enumerate(texts)]


def _kind(text: str) -> int:
    shown = text.strip()
    if not shown:
        return _LINE if "\n" in text or "\r" in text else _SPACE if text else _OTHER
    first = shown[0]
    if first.isalpha():
        return _BEGIN
    if first.isnumeric():
        return _DIGIT
    return _PUNCTUATION if unicodedata.category(first)[0] in "PS" and first != "\ufffd" else _OTHER
