"""Tokenizers with one small interface: the built-in byte tokenizer and any Hugging Face `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from moetrain.files import read_object

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
)  # fmt: skip


class ByteTokenizer:
    """One id per byte of UTF-8: ids 0..255 are the bytes, 256 bos, 257 eos, 258 pad; vocab_size is 259.

    Nothing in a text is ever read as a special token: "<|eos|>" is seven bytes.
    """

    vocab_size = 259
    bos_id: int | None = 256
    eos_id = 257
    pad_id: int | None = 258
    special_tokens = {"<|bos|>": 256, "<|eos|>": 257, "<|pad|>": 258}

    def encode(self, text: str) -> np.ndarray:
        """text -> (n,) int32. UnicodeEncodeError (a ValueError) for a lone surrogate."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def decode(self, ids) -> str:
        """Ids -> text. Special tokens are left out; bytes that are not UTF-8 become U+FFFD."""
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        if ids.size and not (0 <= ids.min() and ids.max() < self.vocab_size):
            raise ValueError(
                f"byte tokenizer: ids must be 0..{self.vocab_size - 1}, found {ids.min()}..{ids.max()}"
            )
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_dict(self) -> dict:
        """What identifies the tokenizer, for a data set's or a checkpoint's record (JSON values)."""
        return _describe(self, "byte", hashlib.sha256(b"moetrain byte tokenizer 1").hexdigest())


class HuggingFaceTokenizer:
    """A `tokenizer.json`, read by the `tokenizers` package; no truncation, padding or added special tokens.

    Special tokens in a text are text, as a page on the web that mentions "</s>" does not end there; with
    `parse_special=True` they become their ids, as prompts and chat-formatted data want. vocab_size is the
    largest id + 1, so that ids with holes are safe.

    Args:
        spec: path of a `tokenizer.json` or of a folder that holds one.
        eos: end-of-document token (text or id), where the files beside it do not name one or another is
            wanted.
        parse_special: see above.
    """

    def __init__(self, spec: str, *, eos: str | int | None = None, parse_special: bool = False):
        from tokenizers import Tokenizer

        path = Path(spec)
        self.spec = str(spec)
        self.file = path / "tokenizer.json" if path.is_dir() else path
        self.parse_special = parse_special
        if not self.file.is_file():
            raise ValueError(
                f"tokenizer: {self.file} does not exist; give 'byte', a tokenizer.json or a folder with one"
            )
        raw = self.file.read_bytes()
        try:
            self._fingerprint = hashlib.sha256(
                json.dumps(json.loads(raw), sort_keys=True).encode()
            ).hexdigest()
            self._tokenizer = Tokenizer.from_buffer(raw)
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ValueError(f"tokenizer: {self.file} can't be read: {error}") from None
        # tokenizer.json may carry the truncation of the last training run: it would silently cut documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = not parse_special
        self._vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values(), default=-1) + 1
        self.eos_id = self._find_eos(eos)
        self.bos_id: int | None = self._special("bos")
        self.pad_id: int | None = self._special("pad")

    def encode(self, text: str) -> np.ndarray:
        """text -> (n,) int32. ValueError for a lone surrogate."""
        try:
            return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        except TypeError:
            text.encode("utf-8")  # the usual cause, said better: UnicodeEncodeError is a ValueError
            raise

    def decode(self, ids) -> str:
        """Ids -> text. Special tokens are left out."""
        return self._tokenizer.decode(
            np.asarray(ids, dtype=np.int64).reshape(-1).tolist(), skip_special_tokens=True
        )

    def to_dict(self) -> dict:
        """What identifies the tokenizer, for a data set's or a checkpoint's record (JSON values)."""
        return _describe(self, self.spec, self._fingerprint)

    def token(self, number: int | None) -> str | None:
        """The text of one token id, or None."""
        return None if number is None else self._tokenizer.id_to_token(number)

    def texts(self) -> list[str | None]:
        """What each id adds to a text that it follows, its blanks included; None for special tokens."""
        # After another token: decoders drop the blank at the beginning of a text.
        before = self._tokenizer.encode(".", add_special_tokens=False).ids[-1:]
        cut = len(self._tokenizer.decode(before, skip_special_tokens=False))
        texts = self._tokenizer.decode_batch([[*before, i] for i in range(self.vocab_size)], skip_special_tokens=False)
        special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        return [None if i in special else text[cut:] for i, text in enumerate(texts)]

    def _find_eos(self, given: str | int | None) -> int:
        if given is None:
            found = self._special("eos")
            if found is None:
                raise ValueError(
                    f"tokenizer: {self.file.parent} names no eos token in tokenizer_config.json, "
                    "special_tokens_map.json, "
                    "config.json or generation_config.json; name one (eos)"
                )
            return found
        number = self._vocab.get(given) if isinstance(given, str) else given
        if number is None or not 0 <= number < self.vocab_size:
            raise ValueError(
                f"tokenizer: eos {given!r} is not a token of {self.file} (vocab_size {self.vocab_size})"
            )
        return number

    def _special(self, name: str) -> int | None:
        """Id of the bos, eos or pad token from the first file beside tokenizer.json that names it."""
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            token = self._read_json(file).get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                if not isinstance(token, str) or token not in self._vocab:
                    raise ValueError(
                        f"tokenizer: {name}_token {token!r} of {self.file.parent / file} is not in "
                        f"{self.file}"
                    )
                return self._vocab[token]
        for file in ("config.json", "generation_config.json"):
            number = self._read_json(file).get(f"{name}_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if isinstance(number, int) and 0 <= number < self.vocab_size:
                return number
        return None

    def _read_json(self, name: str) -> dict:
        path = self.file.parent / name
        try:
            return read_object(path)
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ValueError(f"tokenizer: {error}") from None


Tokenizer = ByteTokenizer | HuggingFaceTokenizer


def load_tokenizer(spec: str, *, eos: str | int | None = None, parse_special: bool = False) -> Tokenizer:
    """ "byte", or the path of a `tokenizer.json` or of a folder with one. ValueError says what is missing."""
    if str(spec) == "byte":
        if eos is not None or parse_special:
            raise ValueError(
                "tokenizer: the byte tokenizer has a fixed eos and no special text; leave eos and "
                "parse_special out"
            )
        return ByteTokenizer()
    return HuggingFaceTokenizer(str(spec), eos=eos, parse_special=parse_special)


def save_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Write the files from which `transformers.AutoTokenizer.from_pretrained(directory)` loads this
    tokenizer.

    Of a Hugging Face tokenizer the files are copied; an eos that was given by hand is written into the copy.
    The byte tokenizer is written as a ByteLevel model; there, unlike here, the texts "<|bos|>", "<|eos|>" and
    "<|pad|>" are read as the special tokens.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config_path = directory / "tokenizer_config.json"
    if isinstance(tokenizer, ByteTokenizer):
        model, config = _byte_level_files(tokenizer)
        (directory / "tokenizer.json").write_text(json.dumps(model, ensure_ascii=False), encoding="utf-8")
    else:
        for name in TOKENIZER_FILES:
            # Not config.json: it is the model's. The name of the file given may differ from tokenizer.json.
            source = tokenizer.file if name == "tokenizer.json" else tokenizer.file.parent / name
            if source.is_file() and source.resolve() != (directory / name).resolve():
                copy_plain(source, directory / name, checked=name == "tokenizer.json")
        config = read_object(config_path) if config_path.is_file() else {}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        config["eos_token"] = tokenizer.token(tokenizer.eos_id)
        for name, number in (("bos_token", tokenizer.bos_id), ("pad_token", tokenizer.pad_id)):
            if number is not None:
                config.setdefault(name, tokenizer.token(number))
    config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_plain(source: Path, target: Path, *, checked: bool = False) -> None:
    """Copy a file of a folder that may be a stranger's. ValueError for a link out of the folder: a copy would carry a file of this machine into what
    is given away. checked: the file was read as what it should be, so it may lie anywhere."""
    home, real = source.parent.resolve(), source.resolve()
    # The cache of huggingface_hub is made of links: models--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH.
    cached = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    if not (checked or cached or real.is_relative_to(home)):
        raise ValueError(f"{source}: is a link out of its folder, to {real}, and would be copied; replace it by the file if you mean it")
    shutil.copyfile(real, target)


def _describe(tokenizer: Tokenizer, spec: str, content: str) -> dict:
    options = {
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "parse_special": getattr(tokenizer, "parse_special", False),
    }
    fingerprint = hashlib.sha256(json.dumps([content, options], sort_keys=True).encode()).hexdigest()
    return {"spec": spec, **options, "fingerprint": fingerprint}


def _byte_level_files(tokenizer: ByteTokenizer) -> tuple[dict, dict]:
    """(tokenizer.json, tokenizer_config.json) of a ByteLevel BPE without merges whose ids are the byte
    values.
    """
    # ByteLevel writes a byte that is a printable Latin-1 character as itself, the other 68 as U+0100 and up,
    # in order.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    symbol = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": number, "content": text, **flags} for text, number in tokenizer.special_tokens.items()]
    model = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {symbol[byte]: byte for byte in range(256)} | tokenizer.special_tokens,
            "merges": [],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
    }
    return model, config
