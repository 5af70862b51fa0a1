"""Token files in Megatron's indexed format: PREFIX.bin holds the tokens, PREFIX.idx says where documents
begin.

Layout of PREFIX.idx, little endian, without alignment:

    9 bytes   magic b"MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     code of the token dtype (DTYPE_CODES)
    uint64    n, the number of sequences
    uint64    d + 1, where d is the number of documents
    int32     (n,)    sequence lengths in tokens
    int64     (n,)    byte offset of each sequence in PREFIX.bin
    int64     (d+1,)  first sequence of each document, and n

We write one sequence per document. We read documents of any number of sequences.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np

from moetrain.files import read_object

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CHUNK = 1 << 20  # index entries handled at a time, so that memory does not grow with the index


def best_dtype(vocab_size: int) -> type[np.generic]:
    """The smallest token dtype that Megatron would choose: uint16 below 65500 ids, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


def with_suffix(prefix: str | Path, suffix: str) -> Path:
    """PREFIX + suffix. Unlike Path.with_suffix it keeps dots in the prefix: 'web.v2' -> 'web.v2.bin'."""
    return Path(f"{prefix}{suffix}")


class IndexedWriter:
    """Streams documents to PREFIX.bin.tmp; `finalize` gives PREFIX.bin and PREFIX.idx their names.

    A crash at any time leaves either no PREFIX.idx or a whole pair. Memory: 4 bytes per document.
    As a context manager it finalizes on success and removes its temporary files on an exception.
    """

    def __init__(self, prefix: str | Path, dtype: type[np.generic]):
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        codes = {np.dtype(known): code for code, known in DTYPE_CODES.items()}
        if self.dtype not in codes:
            raise ValueError(
                f"{prefix}: tokens can't be stored as {self.dtype}; use one of {', '.join(map(str, codes))}"
            )
        self._code = codes[self.dtype]
        self._limits = np.iinfo(self.dtype)
        self._lengths = array.array("i")
        self.num_tokens = 0
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = open(with_suffix(prefix, ".bin.tmp"), "wb")

    def add_document(self, tokens: np.ndarray) -> None:
        """Append one document. tokens: (n,) integers. ValueError where an id does not fit the dtype."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise ValueError(
                f"{self.prefix}: a document must be 1-d integers, found {tokens.ndim}-d {tokens.dtype}"
            )
        if tokens.size > np.iinfo(np.int32).max:
            raise ValueError(
                f"{self.prefix}: a document of {tokens.size} tokens; the format holds at most 2^31 - 1"
            )
        if tokens.size and not (self._limits.min <= tokens.min() and tokens.max() <= self._limits.max):
            raise ValueError(
                f"{self.prefix}: token ids {tokens.min()}..{tokens.max()} do not fit {self.dtype}; "
                "the tokenizer's vocab_size is larger than it says"
            )
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype.newbyteorder("<")))
        self._lengths.append(tokens.size)
        self.num_tokens += tokens.size

    def append(self, other: IndexedReader, max_documents: int | None = None) -> None:
        """Append the first `max_documents` (default: all) documents of another file of the same dtype."""
        if other.dtype != self.dtype:
            raise ValueError(
                f"{other.prefix} holds {other.dtype}, {self.prefix} holds {self.dtype}: can't be joined"
            )
        count = other.num_documents if max_documents is None else min(max_documents, other.num_documents)
        for first in range(0, count, CHUNK):
            starts = other.document_starts(first, min(first + CHUNK, count) + 1)
            self._lengths.frombytes(np.diff(starts).astype(np.int32).tobytes())
        tokens = int(other.document_starts(count, count + 1)[0])
        with open(with_suffix(other.prefix, ".bin"), "rb") as source:
            if count == other.num_documents:
                shutil.copyfileobj(source, self._bin, 1 << 22)
            else:
                _copy_bytes(source, self._bin, tokens * self.dtype.itemsize)
        self.num_tokens += tokens

    def finalize(self, meta: dict | None = None) -> None:
        """Write the index, then rename. `meta`, if given, becomes PREFIX.json."""
        _sync_and_close(self._bin)
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        with open(with_suffix(self.prefix, ".idx.tmp"), "wb") as file:
            file.write(HEADER.pack(MAGIC, 1, self._code, lengths.size, lengths.size + 1))
            for first in range(0, lengths.size, CHUNK):
                file.write(lengths[first : first + CHUNK].astype("<i4"))
            offset = 0
            for first in range(0, lengths.size, CHUNK):
                ends = offset + np.cumsum(
                    lengths[first : first + CHUNK].astype(np.int64) * self.dtype.itemsize
                )
                file.write(np.concatenate(([offset], ends[:-1])).astype("<i8"))
                offset = int(ends[-1])
            for first in range(0, lengths.size + 1, CHUNK):
                file.write(np.arange(first, min(first + CHUNK, lengths.size + 1), dtype="<i8"))
            _sync_and_close(file)
        # The old index goes first and the new one comes last: an index never stands beside another's tokens.
        with_suffix(self.prefix, ".idx").unlink(missing_ok=True)
        with_suffix(self.prefix, ".json").unlink(missing_ok=True)
        os.replace(with_suffix(self.prefix, ".bin.tmp"), with_suffix(self.prefix, ".bin"))
        if meta is not None:
            with open(with_suffix(self.prefix, ".json.tmp"), "w", encoding="utf-8") as file:
                json.dump(meta, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(with_suffix(self.prefix, ".json.tmp"), with_suffix(self.prefix, ".json"))
        os.replace(with_suffix(self.prefix, ".idx.tmp"), with_suffix(self.prefix, ".idx"))

    def abort(self) -> None:
        """Remove what was written so far; files that already have their final name stay."""
        self._bin.close()
        for suffix in (".bin.tmp", ".idx.tmp", ".json.tmp"):
            with_suffix(self.prefix, suffix).unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.finalize()
        else:
            self.abort()


class IndexedReader:
    """Memory-mapped view of PREFIX.bin and PREFIX.idx; checks at opening that both are whole.

    Attributes: `dtype`, `num_documents`, `num_sequences`, `num_tokens`, and `tokens`, (num_tokens,) of
    `dtype`, mapped. Raises ValueError that names the file, and the expected and found sizes, if a file is
    missing, cut or corrupt.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = Path(prefix)
        idx, bin_ = with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")
        for path in (idx, bin_):
            if not path.is_file():
                raise ValueError(
                    f"{path}: no such file; a data set is named by its prefix, the path without .bin or .idx"
                )
        found = idx.stat().st_size
        if found < HEADER.size:
            raise ValueError(f"{idx}: cut short: expected at least {HEADER.size} bytes, found {found}")
        with open(idx, "rb") as file:
            magic, version, code, sequences, bounds = HEADER.unpack(file.read(HEADER.size))
        if magic != MAGIC or version != 1:
            raise ValueError(f"{idx}: not a Megatron index of version 1 (magic {magic!r}, version {version})")
        if code not in DTYPE_CODES:
            raise ValueError(
                f"{idx}: dtype code {code} is not an integer token type; known: {sorted(DTYPE_CODES)}"
            )
        expected = HEADER.size + 12 * sequences + 8 * bounds
        if found == expected + sequences and sequences:
            raise ValueError(f"{idx}: a multimodal index (it holds sequence modes); only text can be read")
        if found != expected or bounds < 1:
            raise ValueError(
                f"{idx}: cut short or corrupt: expected {expected} bytes for {sequences} sequences "
                f"and {bounds - 1} documents, found {found}"
            )
        self.dtype = np.dtype(DTYPE_CODES[code]).newbyteorder("<")
        self.num_sequences, self.num_documents = sequences, bounds - 1
        raw = np.memmap(idx, dtype=np.uint8, mode="r").view(np.ndarray)

        def part(dtype: str, count: int, offset: int) -> np.ndarray:
            return np.frombuffer(raw, dtype=dtype, count=count, offset=offset)

        self._lengths = part("<i4", sequences, HEADER.size)
        self._offsets = part("<i8", sequences, HEADER.size + 4 * sequences)
        self._bounds = part("<i8", bounds, HEADER.size + 12 * sequences)
        self.num_tokens = self._check_index(idx)
        self._check_size(bin_.stat().st_size)
        # An empty file can't be mapped.
        mapped = np.memmap(bin_, dtype=self.dtype, mode="r") if self.num_tokens else None
        self._map = None if mapped is None else mapped._mmap  # its size() is that of the file
        self.tokens = np.empty(0, self.dtype) if mapped is None else mapped.view(np.ndarray)

    def _check_index(self, idx: Path) -> int:
        """Check that sequences follow each other without a gap; return the number of tokens."""
        position = 0
        for first in range(0, self.num_sequences, CHUNK):
            lengths = self._lengths[first : first + CHUNK].astype(np.int64)
            ends = position + np.cumsum(lengths)
            starts = np.concatenate(([position], ends[:-1])) * self.dtype.itemsize
            wrong = np.flatnonzero((lengths < 0) | (starts != self._offsets[first : first + CHUNK]))
            if wrong.size:
                at = int(wrong[0])
                raise ValueError(
                    f"{idx}: corrupt: sequence {first + at} of {self.num_sequences} has length "
                    f"{lengths[at]} and offset "
                    f"{self._offsets[first + at]}, expected offset {starts[at]}"
                )
            position = int(ends[-1])
        if self._bounds[0] != 0 or self._bounds[-1] != self.num_sequences:
            raise ValueError(
                f"{idx}: corrupt: documents span sequences {self._bounds[0]}..{self._bounds[-1]}, "
                f"expected 0..{self.num_sequences}"
            )
        for first in range(0, self.num_documents, CHUNK):
            if np.any(np.diff(self._bounds[first : first + CHUNK + 1]) < 0):
                raise ValueError(f"{idx}: corrupt: document boundaries run backwards")
        return position

    def check(self) -> None:
        """Raise ValueError if the mapped file has another size by now: up to the end of its last page a file that
        was cut reads as zeros, which are tokens like any other.
        """
        if self._map is not None:
            self._check_size(self._map.size())

    def _check_size(self, found: int) -> None:
        expected = self.num_tokens * self.dtype.itemsize
        if found != expected:
            raise ValueError(
                f"{with_suffix(self.prefix, '.bin')}: cut short or not the partner of its .idx: expected {expected} "
                f"bytes ({self.num_tokens} tokens of {self.dtype}), found {found}"
            )

    def document_starts(self, first: int, stop: int, step: int = 1) -> np.ndarray:
        """Position in `tokens` where documents first, first+step, ... < stop begin, (k,) int64.

        Document number `num_documents` is allowed and begins at `num_tokens`.
        """
        sequences = self._bounds[first:stop:step]
        starts = np.full(sequences.shape, self.num_tokens, dtype=np.int64)
        inside = sequences < self.num_sequences
        starts[inside] = self._offsets[sequences[inside]] // self.dtype.itemsize
        return starts

    def document(self, number: int) -> np.ndarray:
        """Tokens of one document, (n,) of `dtype`; a view of the mapped file."""
        if not 0 <= number < self.num_documents:
            raise IndexError(f"{self.prefix}: document {number} of {self.num_documents}")
        start, stop = self.document_starts(number, number + 2)
        return self.tokens[start:stop]


def read_meta(prefix: str | Path) -> dict | None:
    """What `prepare` wrote to PREFIX.json, or None if there is none (a file made by Megatron has none)."""
    path = with_suffix(prefix, ".json")
    try:
        meta = read_object(path)
        for name in ("vocab_size", "max_token_id"):
            # Of numpy's range: they are compared with token ids. bool is an int for Python.
            if name in meta and not (type(meta[name]) is int and -1 <= meta[name] < 2**31):
                raise ValueError(f"{path}: {name} must be a number of tokens, found {json.dumps(meta[name])[:60]}")
        tokenizer = meta.get("tokenizer")
        if tokenizer is not None and not (isinstance(tokenizer, dict) and isinstance(tokenizer.get("spec", ""), str)):
            raise ValueError(f"{path}: tokenizer must be an object with a `spec`, found {json.dumps(tokenizer)[:60]}")
        return meta
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}; remove it or prepare the data again") from None


def write_counts(prefix: str | Path) -> Path:
    """PREFIX.counts.json: a JSON list of how often each token id occurs in the data set. Returns its path."""
    reader, vocab_size = IndexedReader(prefix), (read_meta(prefix) or {}).get("vocab_size", 0)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for first in range(0, reader.num_tokens, CHUNK):
        found = np.bincount(reader.tokens[first : first + CHUNK].astype(np.int64))
        counts = np.pad(counts, (0, max(0, len(found) - len(counts))))
        counts[: len(found)] += found
    path = with_suffix(prefix, ".counts.json")
    partial = with_suffix(prefix, ".counts.json.tmp")
    partial.write_text(json.dumps(counts.tolist()), encoding="utf-8")
    partial.replace(path)
    return path


def _copy_bytes(source, target, count: int) -> None:
    while count:
        block = source.read(min(count, 1 << 22))
        assert block, "the reader checked the size of the file"
        target.write(block)
        count -= len(block)


def _sync_and_close(file) -> None:
    if not file.closed:
        file.flush()
        # Some network file systems refuse fsync; the rename after it is still ordered.
        with contextlib.suppress(OSError):
            os.fsync(file.fileno())
        file.close()
