"""Raw text to token files: plain text, jsonl, jsonl.gz, jsonl.zst and parquet -> PREFIX.bin, PREFIX.idx,
PREFIX.json.

The input is split into work units (a group of small files, a byte range of a jsonl file, some row groups of a
parquet file). Each unit becomes one part in PREFIX.parts/, named by a hash of the settings and of the path,
size and mtime of its input; a part with its record (KEY.json) is whole. Parts are joined in input order at
the end. So the result does not depend on the number of processes, and a killed run continues with the parts
it has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import fnmatch
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from moetrain.data.indexed import IndexedReader, IndexedWriter, best_dtype, read_meta, with_suffix
from moetrain.data.tokenizer import Tokenizer, load_tokenizer

TEXT_EXTENSIONS = (
    ".txt", ".md", ".rst", ".tex", ".html", ".css", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu",
    ".cuh", ".rs", ".go", ".java", ".kt", ".js", ".ts", ".rb", ".php", ".swift", ".scala", ".hs", ".lua",
    ".r", ".jl", ".sh", ".sql",
)  # fmt: skip
RECORD_EXTENSIONS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
DEFAULT_EXTENSIONS = TEXT_EXTENSIONS + RECORD_EXTENSIONS
MAX_DOCUMENT_BYTES = (
    256 << 20
)  # of one plain text file or one jsonl line; a tokenizer needs many times that in memory
MAX_EXAMPLES = 20
VERSION = 1  # part of every key: raise it when the same settings would give other bytes


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far `prepare` is; given to its `progress` callable after every unit."""

    units_done: int
    units_total: int
    bytes_done: int  # of input, as stored
    bytes_total: int
    documents: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did.

    prefixes: {"all": prefix}, or {"train": prefix, "valid": prefix} with a validation fraction.
    documents, tokens, text_bytes: totals per key of `prefixes`; text_bytes counts UTF-8 without the eos.
    sources: per input, as it was given, the same three counts over all splits, and "files".
    broken_lines: lines or rows left out because they could not be read; broken_examples: the first 20 as
        "file:line: why".
    skipped: files and empty documents left out, counted by reason.
    units, units_resumed: work units, and how many of them an earlier, interrupted run had finished.
    seconds: wall time of this call.
    """

    prefixes: dict[str, str]
    documents: dict[str, int]
    tokens: dict[str, int]
    text_bytes: dict[str, int]
    sources: dict[str, dict[str, int]]
    broken_lines: int
    broken_examples: list[str]
    skipped: dict[str, int]
    units: int
    units_resumed: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What the tokens of a part depend on, besides its input."""

    tokenizer: str
    eos: str | int | None
    parse_special: bool
    fingerprint: str
    text_key: str
    append_eos: bool
    validation_fraction: float
    strict: bool
    seed: int

    def identity(self) -> dict:
        """For keys: where the tokenizer lies does not matter, its fingerprint does."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "tokenizer"}

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "valid") if self.validation_fraction else ("all",)


@dataclasses.dataclass(frozen=True)
class _Unit:
    """One piece of input. start, stop: bytes of a jsonl file, row groups of a parquet file, else unused."""

    kind: str
    source: int
    files: tuple[tuple[str, int, int], ...]  # (path, size, mtime in ns)
    num_bytes: int  # of input, as stored; for parquet about
    start: int = 0
    stop: int = 0

    def key(self, settings: _Settings, limit: int | None) -> str:
        content = [VERSION, settings.identity(), self.kind, self.files, self.start, self.stop, limit]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    tokenizer: str,
    *,
    text_key: str = "text",
    extensions: Sequence[str] = DEFAULT_EXTENSIONS,
    exclude: Sequence[str] = (),
    workers: int = 1,
    append_eos: bool = True,
    validation_fraction: float = 0.0,
    strict: bool = False,
    resume: bool = True,
    max_documents: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    seed: int = 0,
    eos: str | int | None = None,
    parse_special: bool = False,
    unit_bytes: int = 64 << 20,
) -> PrepareReport:
    """Tokenize `inputs` into OUTPUT.bin/.idx/.json or, with a validation fraction, OUTPUT_train.* and
    OUTPUT_valid.*.

    The files are a pure function of the inputs and the settings: the same bytes for any `workers` and
    `unit_bytes` and after any interruption. A call whose result is already there does nothing but return its
    report.

    Args:
        inputs: files and folders. Folders are walked in sorted order without hidden entries; of their files
            those with one of `extensions` are read. A plain text file is one document; a line of jsonl or a
            row of parquet is one.
        output: path without suffix.
        tokenizer: "byte", a tokenizer.json, or a folder with one. `eos`, `parse_special`: see
            `load_tokenizer`.
        exclude: glob patterns; a file or folder whose path below its input folder matches one is left out. `*` matches `/` too.
        text_key: key or column that holds the text.
        append_eos: end each document with the tokenizer's eos.
        validation_fraction: in [0, 1); a document goes to the validation split by a hash of its text and
            `seed`, so equal documents go together, and adding inputs moves nothing.
        strict: stop at the first line or file that can't be read, instead of counting it.
        resume: use finished parts of an interrupted run, and a finished result.
        max_documents: only the first so many documents, over both splits.
        workers: processes (started by spawn). Memory of each is bounded by its largest document.
        unit_bytes: aimed size of a work unit. A compressed jsonl file is always one unit.

    Raises:
        ValueError: nothing to read, an option or a file that can't work, a cut archive, or with `strict` a
            broken line. Finished parts are kept for the next run.
    """
    began = time.monotonic()
    if str(output).endswith(os.sep):
        raise ValueError(f"output {output}: a prefix is wanted, such as {output}train, not a folder")
    if isinstance(inputs, (str, Path)):
        inputs = [inputs]
    if not 0.0 <= validation_fraction < 1.0:
        raise ValueError(f"validation_fraction ({validation_fraction}) must be at least 0 and below 1")
    for name, value in (("workers", workers), ("max_documents", max_documents), ("unit_bytes", unit_bytes)):
        if value is not None and value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
    loaded = load_tokenizer(tokenizer, eos=eos, parse_special=parse_special)
    settings = _Settings(
        str(tokenizer), eos, parse_special, loaded.to_dict()["fingerprint"], text_key, append_eos,
        float(validation_fraction), strict, seed,
    )  # fmt: skip
    names = [str(item) for item in inputs]
    parts = with_suffix(output, ".parts")
    units, files, skipped = _plan(
        names, tuple(extension.lower() for extension in extensions), tuple(exclude), unit_bytes, parts
    )
    keys = [unit.key(settings, max_documents) for unit in units]
    digest = _digest(names, units, settings, max_documents)
    prefixes = {split: str(output) if split == "all" else f"{output}_{split}" for split in settings.splits}

    parts.mkdir(parents=True, exist_ok=True)
    with _lock(parts):
        if not resume:
            _clear(parts)
        elif (done := _finished(prefixes, digest)) is not None:
            shutil.rmtree(parts)
            return dataclasses.replace(
                done, units=len(units), units_resumed=len(units), seconds=time.monotonic() - began
            )
        records, resumed = _tokenize(units, keys, settings, parts, workers, max_documents, loaded, progress)
        _trim_to_limit(units, keys, records, settings, parts, max_documents, loaded)
        report = _report(prefixes, names, files, skipped, units, records, resumed)
        for split in settings.splits:
            if not report.documents[split]:
                raise ValueError(_nothing_found(split, names, report))
        for split, prefix in prefixes.items():
            writer = IndexedWriter(prefix, best_dtype(loaded.vocab_size))
            try:
                for key in keys[: len(records)]:
                    writer.append(IndexedReader(parts / f"{key}.{split}"))
                writer.finalize(_meta(split, digest, loaded, settings, report, records))
            except BaseException:
                writer.abort()
                raise
        shutil.rmtree(parts)
    return dataclasses.replace(report, seconds=time.monotonic() - began)


def _digest(names: list[str], units: list[_Unit], settings: _Settings, limit: int | None) -> str:
    """Identifies all that the result depends on; not how the input was cut into units."""
    files = list(dict.fromkeys(file for unit in units for file in unit.files))
    content = [VERSION, names, files, settings.identity(), limit]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# Planning: which files, cut into which units.


def _plan(
    inputs: list[str], extensions: tuple[str, ...], exclude: tuple[str, ...], unit_bytes: int, parts: Path
) -> tuple[list[_Unit], list[int], dict[str, int]]:
    """Units in output order, the number of files of each input, and the files left out by reason."""
    units: list[_Unit] = []
    counts: list[int] = []
    skipped: Counter[str] = Counter()
    seen: set[str] = set()
    for source, name in enumerate(inputs):
        path = Path(name)
        if not path.exists():
            raise ValueError(f"input {name}: no such file or folder")
        if not (path.is_dir() or path.is_file()):
            raise ValueError(f"input {name}: neither a folder nor a regular file; write it to a file first")
        group: list[tuple[str, int, int]] = []
        count = 0
        for file in _walk(path, extensions, exclude, skipped, parts) if path.is_dir() else [path]:
            if (real := os.path.realpath(file)) in seen:
                skipped["repeated file"] += 1
                continue
            seen.add(real)
            count += 1
            status = os.stat(file)
            entry = (str(file), status.st_size, status.st_mtime_ns)
            kind = _kind(str(file))
            # Small text files share a unit; any other file, or a full group, closes it.
            if group and (kind != "text" or sum(size for _, size, _ in group) + status.st_size > unit_bytes):
                units.append(_text_unit(source, group))
                group = []
            if kind == "text":
                if status.st_size > MAX_DOCUMENT_BYTES:
                    raise ValueError(
                        f"{file}: {status.st_size >> 20} MiB; a plain text file is one document of at most "
                        f"{MAX_DOCUMENT_BYTES >> 20} MiB; split it, or make it jsonl with one "
                        "document per line"
                    )
                group.append(entry)
            else:
                units += _split(kind, source, entry, unit_bytes)
        if group:
            units.append(_text_unit(source, group))
        counts.append(count)
    return units, counts, {reason: count for reason, count in sorted(skipped.items()) if count}


def _text_unit(source: int, files: list[tuple[str, int, int]]) -> _Unit:
    return _Unit("text", source, tuple(files), sum(size for _, size, _ in files))


def _walk(
    folder: Path, extensions: tuple[str, ...], exclude: tuple[str, ...], skipped: Counter[str], parts: Path
) -> Iterator[Path]:
    """Files to read below a folder, in order; `parts`, our own workplace, is passed over."""

    def excluded(root: str, name: str) -> bool:
        path = Path(root, name).relative_to(folder).as_posix()
        matches = any(fnmatch.fnmatchcase(path, pattern) for pattern in exclude)
        skipped["excluded"] += matches
        return matches

    def fail(error: OSError) -> None:
        raise ValueError(f"{error.filename}: can't be listed: {error.strerror}")

    for root, folders, files in os.walk(folder, onerror=fail):
        skipped["hidden"] += sum(name.startswith(".") for name in folders + files)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and Path(root, name).absolute() != parts.absolute() and not excluded(root, name)
        )
        for name in sorted(name for name in files if not name.startswith(".")):
            if not name.lower().endswith(extensions):
                skipped["other extension"] += 1
            elif excluded(root, name):
                continue
            elif not (path := Path(root, name)).is_file():
                skipped["not a regular file"] += 1
            else:
                yield path


def _kind(path: str) -> str:
    for extension in RECORD_EXTENSIONS:
        if path.lower().endswith(extension):
            return extension[1:]
    return "text"


def _split(kind: str, source: int, entry: tuple[str, int, int], unit_bytes: int) -> Iterator[_Unit]:
    path, size, _ = entry
    if kind == "jsonl":
        for start in range(0, size, unit_bytes):
            stop = min(start + unit_bytes, size)
            yield _Unit(kind, source, (entry,), stop - start, start, stop)
    elif kind == "parquet":
        metadata = _open_parquet(path).metadata
        start = pending = 0
        for group in range(metadata.num_row_groups):
            pending += metadata.row_group(group).total_byte_size
            if pending >= unit_bytes or group == metadata.num_row_groups - 1:
                share = size * (group + 1 - start) // metadata.num_row_groups
                yield _Unit(kind, source, (entry,), share, start, group + 1)
                start, pending = group + 1, 0
    else:
        if kind == "jsonl.zst":
            _import_zstandard(path)
        yield _Unit(kind, source, (entry,), size)


# Running units, here or in processes.


def _tokenize(
    units: list[_Unit],
    keys: list[str],
    settings: _Settings,
    parts: Path,
    workers: int,
    limit: int | None,
    tokenizer: Tokenizer,
    progress: Callable[[Progress], None] | None,
) -> tuple[list[dict], int]:
    """Records of the units in order, as many as it takes to reach `limit` documents; and how many were there
    before.
    """
    records: dict[int, dict] = {}
    total_bytes = sum(unit.num_bytes for unit in units)
    done_bytes = documents = tokens = 0
    prefix = prefix_documents = 0  # units 0..prefix-1 are done; they decide whether the limit is reached

    def done(number: int, record: dict) -> None:
        nonlocal done_bytes, documents, tokens, prefix, prefix_documents
        records[number] = record
        done_bytes += units[number].num_bytes
        documents += sum(record["documents"].values())
        tokens += sum(record["tokens"].values())
        while prefix in records and (limit is None or prefix_documents < limit):
            prefix_documents += sum(records[prefix]["documents"].values())
            prefix += 1
        if progress is not None:
            progress(Progress(len(records), len(units), done_bytes, total_bytes, documents, tokens))

    waiting = []
    for number, key in enumerate(keys):
        record = _read_record(parts, key, settings)
        if record is None:
            waiting.append(number)
        else:
            done(number, record)
    resumed = len(records)

    def enough() -> bool:
        return limit is not None and prefix_documents >= limit

    if workers == 1 or len(waiting) < 2:
        for number in waiting:
            if enough():
                break
            done(number, _run_unit(units[number], keys[number], settings, parts, limit, tokenizer))
    else:
        queue = iter(waiting)
        # spawn: fork would copy the threads and locks of torch and of `tokenizers`.
        pool = ProcessPoolExecutor(
            min(workers, len(waiting)), multiprocessing.get_context("spawn"), _start_worker, (settings,)
        )
        running = {}
        try:
            while True:
                while (
                    len(running) < 2 * workers and not enough() and (number := next(queue, None)) is not None
                ):
                    running[
                        pool.submit(_run_in_worker, units[number], keys[number], settings, parts, limit)
                    ] = number
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    done(running.pop(future), future.result())
        except BrokenProcessPool:
            raise ValueError(
                "a worker process was killed, most likely for want of memory; finished parts are "
                f"kept in {parts}: "
                f"run the same command again with fewer workers (now {workers})"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return [records[number] for number in range(prefix)], resumed


def _trim_to_limit(units, keys, records, settings, parts, limit, tokenizer) -> None:
    """Where the last record passes the limit, run its unit again up to the document where it is reached."""
    before = sum(sum(record["documents"].values()) for record in records[:-1])
    if limit is None or not records or before + sum(records[-1]["documents"].values()) <= limit:
        return
    last = len(records) - 1
    keys[last] = units[last].key(settings, limit - before)
    record = _read_record(parts, keys[last], settings)
    records[last] = record or _run_unit(units[last], keys[last], settings, parts, limit - before, tokenizer)


_worker_tokenizer: Tokenizer | None = None


def _start_worker(settings: _Settings) -> None:
    global _worker_tokenizer
    # One thread per process: the processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = load_tokenizer(
        settings.tokenizer, eos=settings.eos, parse_special=settings.parse_special
    )

    def leave_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    # A parent killed by SIGKILL can't stop its workers, which would otherwise wait for work for ever.
    threading.Thread(target=leave_with_parent, daemon=True).start()


def _run_in_worker(unit: _Unit, key: str, settings: _Settings, parts: Path, limit: int | None) -> dict:
    return _run_unit(unit, key, settings, parts, limit, _worker_tokenizer)


def _run_unit(
    unit: _Unit, key: str, settings: _Settings, parts: Path, limit: int | None, tokenizer: Tokenizer
) -> dict:
    """Tokenize one unit into parts/KEY.SPLIT.bin and .idx, then write and return its record, KEY.json."""
    splits = settings.splits
    zeros = dict.fromkeys(splits, 0)
    record = {
        "documents": zeros, "tokens": dict(zeros), "text_bytes": dict(zeros),
        "max_token_id": dict.fromkeys(splits, -1),
        "lines": 0, "broken_lines": 0, "broken_examples": [], "skipped": {},
    }  # fmt: skip
    threshold = int(settings.validation_fraction * 2.0**64)
    salt = settings.seed.to_bytes(16, "little", signed=True)
    # A name of its own: a worker that outlived a killed run may still be writing the same unit.
    private = {split: parts / f"{key}.{os.getpid()}.{split}" for split in splits}
    with contextlib.ExitStack() as stack:
        dtype = best_dtype(tokenizer.vocab_size)
        writers = {split: stack.enter_context(IndexedWriter(private[split], dtype)) for split in splits}
        total = 0
        for text in _documents(unit, settings, record):
            try:
                raw = text.encode("utf-8")
            except UnicodeEncodeError:
                _broken(unit, settings, record, "holds a lone surrogate, which is not valid Unicode")
                continue
            ids = tokenizer.encode(text)
            if not ids.size:
                record["skipped"]["empty document"] = record["skipped"].get("empty document", 0) + 1
                continue
            split = splits[0]
            if threshold:
                hashed = hashlib.blake2b(raw, digest_size=8, key=salt).digest()
                split = "valid" if int.from_bytes(hashed, "little") < threshold else "train"
            largest = int(ids.max())
            if settings.append_eos:
                ids = np.append(ids, np.int32(tokenizer.eos_id))
                largest = max(largest, tokenizer.eos_id)
            writers[split].add_document(ids)
            record["documents"][split] += 1
            record["tokens"][split] += int(ids.size)
            record["text_bytes"][split] += len(raw)
            record["max_token_id"][split] = max(record["max_token_id"][split], largest)
            total += 1
            if total == limit:
                break
    for split, prefix in private.items():
        for suffix in (".bin", ".idx"):
            os.replace(with_suffix(prefix, suffix), with_suffix(parts / f"{key}.{split}", suffix))
    temporary = parts / f"{key}.{os.getpid()}.json"
    temporary.write_text(json.dumps(record), encoding="utf-8")
    os.replace(temporary, parts / f"{key}.json")
    return record


def _read_record(parts: Path, key: str, settings: _Settings) -> dict | None:
    """The record of a finished part, or None if it is not there or not whole."""
    try:
        record = json.loads((parts / f"{key}.json").read_text(encoding="utf-8"))
        for split in settings.splits:
            if IndexedReader(parts / f"{key}.{split}").num_tokens != record["tokens"][split]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record


# Reading documents.


def _documents(unit: _Unit, settings: _Settings, record: dict) -> Iterator[str]:
    """Texts of a unit in order. Counts lines, and what it leaves out, in `record`."""
    path = unit.files[0][0]
    if unit.kind == "text":
        for path, _, _ in unit.files:
            raw = Path(path).read_bytes()
            if b"\0" in raw:
                _skip_file(path, settings, record, "binary file")
                continue
            try:
                yield raw.decode("utf-8-sig")
            except UnicodeDecodeError:
                _skip_file(path, settings, record, "not UTF-8")
    elif unit.kind == "parquet":
        for value in _rows(unit, settings.text_key):
            record["lines"] += 1
            try:
                text = value.as_py()
            except UnicodeDecodeError:
                _broken(unit, settings, record, "not UTF-8")
                continue
            if isinstance(text, str):
                yield text
            else:
                found = "null" if text is None else type(text).__name__
                _broken(unit, settings, record, f"{settings.text_key!r} is {found}, not a string")
    else:
        for line in _lines(unit):
            record["lines"] += 1
            if line is None:
                _broken(unit, settings, record, f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB")
            elif line.strip():
                text, reason = _parse_line(line, settings.text_key)
                if text is None:
                    _broken(unit, settings, record, reason)
                else:
                    yield text


def _parse_line(line: bytes, key: str) -> tuple[str | None, str]:
    """(text, "") or (None, why not)."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte {error.start})"
    except RecursionError:
        return None, "bad JSON: nested too deeply"
    except ValueError as error:
        return None, f"bad JSON: {error}"
    if not isinstance(value, dict):
        return None, f"a JSON object expected, found {type(value).__name__}"
    if key not in value:
        return None, f"no key {key!r} (text_key)"
    if not isinstance(value[key], str):
        return None, f"{key!r} is {type(value[key]).__name__}, not a string"
    return value[key], ""


def _rows(unit: _Unit, column: str) -> Iterator:
    """Values, as Arrow scalars, of one column in the unit's row groups."""
    path = unit.files[0][0]
    file = _open_parquet(path)
    names = file.schema_arrow.names
    if column not in names:
        raise ValueError(f"{path}: no column {column!r} (text_key); it has {', '.join(names)}")
    batches = file.iter_batches(256, row_groups=range(unit.start, unit.stop), columns=[column])
    while True:
        try:
            batch = next(batches, None)
        except (ValueError, OSError) as error:  # Arrow's errors are these two
            raise ValueError(
                f"{path}: corrupt: {error}; fetch it again or take it out of the inputs"
            ) from None
        if batch is None:
            return
        yield from batch.column(0)


def _lines(unit: _Unit) -> Iterator[bytes | None]:
    """Lines that begin inside the unit; None stands for one that is too long to be held."""
    path = unit.files[0][0]
    try:
        with _open_stream(unit) as stream:
            position, stop = unit.start, unit.stop if unit.kind == "jsonl" else None
            if position:
                # The line that reaches into this range belongs to the range before.
                stream.seek(position - 1)
                position += _read_line(stream)[1] - 1
            while stop is None or position < stop:
                line, size = _read_line(stream)
                if not size:
                    break
                position += size
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}: cut short or corrupt: {error}; fetch it again or take it out of the inputs"
        ) from None


def _read_line(stream: io.BufferedIOBase) -> tuple[bytes | None, int]:
    """(line, its size); the line is None if it is too long, the size 0 at the end of the stream."""
    line = stream.readline(MAX_DOCUMENT_BYTES)
    size = len(line)
    if size < MAX_DOCUMENT_BYTES or line.endswith(b"\n"):
        return line, size
    while rest := stream.readline(1 << 20):
        size += len(rest)
        if rest.endswith(b"\n"):
            break
    return None, size


def _open_stream(unit: _Unit) -> io.BufferedIOBase:
    path = unit.files[0][0]
    if unit.kind == "jsonl":
        return open(path, "rb")
    if unit.kind == "jsonl.gz":
        return gzip.open(path, "rb")
    return io.BufferedReader(_ZstdStream(path), 1 << 20)


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a .zst file of any number of frames.

    zstandard's own stream_reader takes the end of a cut file for the end of the data; this one raises
    EOFError.
    """

    def __init__(self, path: str):
        self._zstandard = _import_zstandard(path)
        self._file = open(path, "rb")
        self._frame = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            self._input = self._input or self._file.read(1 << 17)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last zstd frame has no end")
                return 0
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                self._output = self._frame.decompress(self._input)
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _import_zstandard(path: str):
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            f"{path}: reading .zst needs the zstandard package: pip install 'moetrain[data]'"
        ) from None
    return zstandard


def _open_parquet(path: str):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path}: reading .parquet needs the pyarrow package: pip install 'moetrain[data]'"
        ) from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (ValueError, OSError) as error:  # Arrow's errors are these two
        raise ValueError(
            f"{path}: not a whole parquet file: {error}; fetch it again or take it out of the inputs"
        ) from None


def _broken(unit: _Unit, settings: _Settings, record: dict, reason: str) -> None:
    """Count the line that was read last as broken; with `strict`, stop there."""
    path = unit.files[0][0]
    if settings.strict:
        raise ValueError(f"{path}:{_lines_before(unit) + record['lines']}: {reason} (strict)")
    record["broken_lines"] += 1
    if len(record["broken_examples"]) < MAX_EXAMPLES:
        # Counted from the unit's first line; `_report`, which knows the units before, makes it the file's.
        record["broken_examples"].append([path, record["lines"], reason])


def _skip_file(path: str, settings: _Settings, record: dict, reason: str) -> None:
    if settings.strict:
        raise ValueError(f"{path}: {reason} (strict)")
    record["skipped"][reason] = record["skipped"].get(reason, 0) + 1


def _lines_before(unit: _Unit) -> int:
    """Lines, or rows, of the file before the unit. Costs a pass over them, so only for an error that ends the
    run.
    """
    path = unit.files[0][0]
    if unit.kind == "parquet":
        metadata = _open_parquet(path).metadata
        return sum(metadata.row_group(group).num_rows for group in range(unit.start))
    return sum(1 for _ in _lines(dataclasses.replace(unit, start=0, stop=unit.start))) if unit.start else 0


# Reporting.


def _report(
    prefixes: dict[str, str],
    names: list[str],
    files: list[int],
    skipped: dict[str, int],
    units: list[_Unit],
    records: list[dict],
    resumed: int,
) -> PrepareReport:
    counts = ("documents", "tokens", "text_bytes")
    totals = {count: dict.fromkeys(prefixes, 0) for count in counts}
    sources = {name: {"files": 0, **dict.fromkeys(counts, 0)} for name in names}
    for name, number in zip(names, files, strict=True):
        sources[name]["files"] += number
    left_out = Counter(skipped)
    examples: list[str] = []
    lines: Counter[str] = Counter()
    for unit, record in zip(units, records, strict=False):
        path = unit.files[0][0]
        for count in counts:
            for split, value in record[count].items():
                totals[count][split] += value
                sources[names[unit.source]][count] += value
        left_out.update(record["skipped"])
        examples += [
            f"{file}:{lines[path] + line}: {reason}" for file, line, reason in record["broken_examples"]
        ]
        lines[path] += record["lines"]
    return PrepareReport(
        prefixes=prefixes,
        **totals,
        sources=sources,
        broken_lines=sum(record["broken_lines"] for record in records),
        broken_examples=examples[:MAX_EXAMPLES],
        skipped=dict(sorted(left_out.items())),
        units=len(units),
        units_resumed=resumed,
        seconds=0.0,
    )


def _meta(
    split: str,
    digest: str,
    tokenizer: Tokenizer,
    settings: _Settings,
    report: PrepareReport,
    records: list[dict],
) -> dict:
    """PREFIX.json: how the token file came about. Holds no time and no worker count: it is as reproducible as
    the tokens.
    """
    return {
        "format": "moetrain tokens",
        "version": VERSION,
        "input_digest": digest,
        "tokenizer": tokenizer.to_dict(),
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "max_token_id": max(record["max_token_id"][split] for record in records),
        "append_eos": settings.append_eos,
        "text_key": settings.text_key,
        "split": split,
        "validation_fraction": settings.validation_fraction,
        "seed": settings.seed,
        "documents": report.documents[split],
        "tokens": report.tokens[split],
        "text_bytes": report.text_bytes[split],
        "sources": report.sources,
        "broken_lines": report.broken_lines,
        "broken_examples": report.broken_examples,
        "skipped": report.skipped,
    }


def _finished(prefixes: dict[str, str], digest: str) -> PrepareReport | None:
    """The report of an earlier run with the same inputs and settings, if its files are there and whole."""
    metas = {}
    for split, prefix in prefixes.items():
        try:
            metas[split] = read_meta(prefix)
            if metas[split] is None or metas[split]["input_digest"] != digest:
                return None
            if IndexedReader(prefix).num_tokens != metas[split]["tokens"]:
                return None
        except (ValueError, KeyError):
            return None
    first = next(iter(metas.values()))
    return PrepareReport(
        prefixes=prefixes,
        documents={split: meta["documents"] for split, meta in metas.items()},
        tokens={split: meta["tokens"] for split, meta in metas.items()},
        text_bytes={split: meta["text_bytes"] for split, meta in metas.items()},
        sources=first["sources"],
        broken_lines=first["broken_lines"],
        broken_examples=first["broken_examples"],
        skipped=first["skipped"],
        units=0,
        units_resumed=0,
        seconds=0.0,
    )


def _nothing_found(split: str, names: Iterable[str], report: PrepareReport) -> str:
    left_out = ", ".join(f"{count} {reason}" for reason, count in report.skipped.items()) or "nothing"
    found = f"{sum(report.documents.values())} documents in {', '.join(names)}"
    broken = (
        f"; {report.broken_lines} broken lines, first: {report.broken_examples[0]}"
        if report.broken_examples
        else ""
    )
    if split == "all" or not sum(report.documents.values()):
        return (
            f"no document found ({found}; left out: {left_out}{broken}); check inputs, text_key, extensions"
        )
    return (
        f"the {split} split is empty ({found}{broken}); change validation_fraction or seed, or add documents"
    )


@contextlib.contextmanager
def _lock(parts: Path) -> Iterator[None]:
    """Keep a second run off the same output. The system drops the lock with the process, however it ends."""
    with open(parts / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{parts} is in use: another prepare writes the same output; wait for it or choose another"
            ) from None
        yield


def _clear(parts: Path) -> None:
    for path in parts.iterdir():
        if path.name != "lock":
            path.unlink()
