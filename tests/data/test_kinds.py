"""The kind of a token comes from its text and the token before it in its document, for bytes and for tokenizers with blanks inside tokens."""

from __future__ import annotations

import json

import pytest
import torch

from moetrain.data.kinds import KINDS, TokenKinds, token_texts
from moetrain.data.tokenizer import ByteTokenizer, load_tokenizer

CPU = torch.device("cpu")


def kinds(of: TokenKinds, ids: list[int], positions: list[int] | None = None) -> list[str]:
    tokens = torch.tensor([ids])
    places = torch.arange(len(ids))[None] if positions is None else torch.tensor([positions])
    return [KINDS[k] for k in of.of(tokens, places)[0].tolist()]


def test_bytes():
    """A letter after a letter is inside a word, unless a document begins there; parts of characters and unused ids are `other`."""
    of = TokenKinds(ByteTokenizer(), 300, CPU)
    short = {"b": "beginning of a word", "i": "inside a word", "d": "digit", "s": "space", "l": "line break", "p": "punctuation", "o": "other"}
    short["x"] = "special"
    text = "def f2(x):\n\té+"
    ids = ByteTokenizer().encode(text).tolist()
    assert kinds(of, [*ids, 257, 299]) == [short[c] for c in "biisbdpbpplsoopxo"]
    assert kinds(of, [97, 98, 99, 100], [5, 6, 0, 1]) == [short[c] for c in "bibi"]


@pytest.mark.parametrize("blank", ["Ġ", "▁"])
def test_tokenizers_with_blanks_in_their_tokens(tmp_path, blank):
    """Byte-level and SentencePiece tokenizers: a blank at the front begins a word, whatever is before it; special tokens are told from text."""
    words = ["<s>", ".", "the", f"{blank}cat", "s", f"{blank}7", blank, "Ċ" if blank == "Ġ" else "\n", "_x"]
    if blank == "Ġ":
        decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    else:
        decoder = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    special = {"id": 0, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {"type": "BPE", "vocab": {w: i for i, w in enumerate(words)}, "merges": [], "unk_token": None, "dropout": None,
             "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}  # fmt: skip
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": None, "pre_tokenizer": None,
             "post_processor": None, "decoder": decoder, "model": model}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert token_texts(tokenizer) == [None, ".", "the", " cat", "s", " 7", " ", "\n", "_x"]
    of = TokenKinds(tokenizer, 9, CPU)
    found = kinds(of, [2, 4, 3, 4, 1, 4, 5, 6, 7, 0, 8])
    b, i = KINDS[0], KINDS[1]
    assert found == [b, i, b, i, "punctuation", b, "digit", "space", "line break", "special", "punctuation"]


def test_a_tokenizer_that_is_gone():
    """No statistic, no error."""
    assert TokenKinds.of_tokenizer(None, 300, CPU) is None and TokenKinds.of_tokenizer("/nowhere/tokenizer", 300, CPU) is None
    assert TokenKinds.of_tokenizer("byte", 300, CPU) is not None
