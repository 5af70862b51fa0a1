"""Training and evaluation samples from token files, and the iterator that batches them.

A sample is a pure function of (files, settings, seed, global index): nothing here depends on the number of
ranks, on what was read before, or on numpy's random generators, whose streams may change between versions. So
the position in the data is one integer, and a run continues with the same samples under any layout.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from moetrain.data.indexed import IndexedReader, read_meta, with_suffix

IGNORE = -100  # label of a position that predicts nothing; torch's cross entropy skips it
GROUP = 512  # documents that are shuffled among each other
BLEND_BITS = 62  # precision of blend weights
BLEND_BLOCK = 64  # samples whose sources are rotated together
_U64 = (1 << 64) - 1


@dataclasses.dataclass(frozen=True)
class Source:
    """One set of documents of a blend. prefix: path without .bin/.idx. weight: relative share of samples, >
    0.
    """

    name: str
    prefix: str | Path
    weight: float | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sequence of S tokens.

    tokens (S,) int64; padding, only at the end of an epoch's last window, is 0.
    labels (S,) int64: the next token, IGNORE where there is none to predict.
    positions (S,) int64: 0, 1, ... from the start of the sample and, with isolated documents, of each
    document. document_ids (S,) int32: 0, 1, ... within the sample, padding counts as a document; all 0
    without isolation.
    source: number of the source in the blend. index: the global index asked for.
    """

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    document_ids: np.ndarray
    source: int
    index: int


class BlendedDataset:
    """An endless sequence of samples, drawn from several sources in fixed shares.

    Within a source, an epoch is: all documents in shuffled order, concatenated, cut into windows of seq_len
    tokens, the windows in shuffled order. A window's labels look one token past its end. The last window of
    an epoch is padded, not carried over, so each token is an input exactly once per epoch and every epoch has
    the same number of windows. The next epoch is shuffled anew.

    Documents are shuffled on two levels, groups of 512 neighbours and documents within a group, which keeps
    memory at 16 bytes per 512 documents; windows by a keyed permutation, which needs none.

    Args:
        sources: at least one, with different names.
        seq_len: S, tokens per sample.
        seed: of every shuffle.
        temperature: shares p_i ~ n_i^temperature of the sources' token counts n_i: 1 (the default) is
            proportional, 0 uniform. Not together with weights.
        isolate_documents: no label crosses a document boundary, positions restart and document_ids tell
            documents apart.
        shuffle: False keeps documents and windows in file order.
        vocab_size: the model's. A token id beyond it is a ValueError, at opening if PREFIX.json tells, else
            when read.

    Over any first n samples the count of source i is within a few samples of n * p_i.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seq_len: int,
        seed: int,
        *,
        temperature: float | None = None,
        isolate_documents: bool = True,
        shuffle: bool = True,
        vocab_size: int | None = None,
    ):
        if not sources:
            raise ValueError("data sources: at least one is needed")
        repeated = [
            name
            for name, count in collections.Counter(source.name for source in sources).items()
            if count > 1
        ]
        if repeated:
            raise ValueError(f"data sources: the name {repeated[0]!r} is used more than once")
        self.sources = tuple(sources)
        self.seq_len = seq_len
        self.seed = seed
        self.isolate_documents = isolate_documents
        self.shuffle = shuffle
        self._streams = [
            _Stream(
                source.name,
                source.prefix,
                seq_len,
                isolate_documents,
                vocab_size,
                _mix(seed, 1, number),
                shuffle,
            )
            for number, source in enumerate(sources)
        ]
        #: Share of each source, sums to 1.
        self.probabilities = _probabilities(
            sources, [stream.num_tokens for stream in self._streams], temperature
        )
        self._blend = _Blend(self.probabilities, seed)

    @property
    def num_tokens(self) -> tuple[int, ...]:
        """Tokens of each source."""
        return tuple(stream.num_tokens for stream in self._streams)

    @property
    def windows_per_epoch(self) -> tuple[int, ...]:
        """Samples in one epoch of each source."""
        return tuple(stream.num_windows for stream in self._streams)

    def __getitem__(self, index: int) -> Sample:
        source, number = self._locate(index)
        stream = self._streams[source]
        return stream.sample(*divmod(number, stream.num_windows), source, index)

    def locate(self, index: int) -> tuple[int, int, int]:
        """(source, epoch, number of the sample within the epoch) of a global index."""
        source, number = self._locate(index)
        return source, *divmod(number, self._streams[source].num_windows)

    def samples_of(self, index: int) -> tuple[int, ...]:
        """How many of the samples 0 .. index-1 come from each source."""
        return tuple(self._blend.count(source, index) for source in range(len(self.sources)))

    def describe(self) -> dict:
        """Settings and data that decide which sample has which index (JSON values); paths do not."""
        return {
            "version": 1,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "isolate_documents": self.isolate_documents,
            "shuffle": self.shuffle,
            "sources": [
                {"name": source.name, "probability": probability, "data": stream.fingerprint()}
                for source, probability, stream in zip(
                    self.sources, self.probabilities, self._streams, strict=True
                )
            ],
        }

    def fingerprint(self) -> str:
        """Hash of `describe`: equal fingerprints give equal samples. Reads at most a few MB per source."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()

    def _locate(self, index: int) -> tuple[int, int]:
        if index < 0:
            raise IndexError(f"sample index {index} is negative")
        return self._blend.locate(index)


class EvalSet:
    """One file in its own order: consecutive windows of seq_len tokens, the last one padded.

    Each token is an input once, and predicted once if there is a token before it (with isolate_documents: in
    its own document). max_sequences keeps only the first so many windows. `source` of its samples is 0.
    """

    def __init__(
        self,
        name: str,
        prefix: str | Path,
        seq_len: int,
        isolate_documents: bool = True,
        max_sequences: int | None = None,
        *,
        vocab_size: int | None = None,
    ):
        if max_sequences is not None and max_sequences < 1:
            raise ValueError(f"data set {name!r}: max_sequences ({max_sequences}) must be at least 1")
        self.name = name
        self._stream = _Stream(name, prefix, seq_len, isolate_documents, vocab_size, 0, shuffle=False)
        self._length = min(self._stream.num_windows, max_sequences or self._stream.num_windows)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._length:
            raise IndexError(f"data set {self.name!r}: sequence {index} of {self._length}")
        return self._stream.sample(0, index, 0, index)


class BatchIterator:
    """Optimizer steps, each a list of micro-batches of this rank, built ahead by a background thread.

    Micro-batch m of a step that starts at global sample s holds on rank r the samples
    s + m*(micro_batch_size*dp_world) + r*micro_batch_size + i, i < micro_batch_size: over all ranks the same
    set for any dp_world with the same micro_batch_size*dp_world. It is a dict of torch tensors: tokens,
    labels, positions (B, S) int64, document_ids (B, S) int32, sample_index, source (B,) int64.

    With end_sample (of an EvalSet, by itself, its length), a last step that reaches past it is filled with
    blank samples (labels all IGNORE, sample_index and source -1), so that all ranks have equally many
    micro-batches and no sample is lost or repeated.

    Use it as an iterator and `close()` it, or as a context manager. Errors of the thread are raised by
    `next`.

    Args:
        dataset: BlendedDataset, EvalSet, or anything that gives a Sample for an index.
        start_sample: global index to begin at; `state()["consumed_samples"]` of an earlier run.
        prefetch: steps built ahead; 0 builds in the caller's thread.
    """

    def __init__(
        self,
        dataset: BlendedDataset | EvalSet,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_world: int,
        start_sample: int = 0,
        prefetch: int = 2,
        end_sample: int | None = None,
    ):
        for name, value, least in (
            ("global_batch_size", global_batch_size, 1), ("micro_batch_size", micro_batch_size, 1),
            ("data-parallel world", dp_world, 1), ("start_sample", start_sample, 0),
            ("prefetch", prefetch, 0),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} ({value}) must be at least {least}")
        if not 0 <= dp_rank < dp_world:
            raise ValueError(f"data-parallel rank ({dp_rank}) must be 0..{dp_world - 1}")
        wave = micro_batch_size * dp_world
        if global_batch_size % wave:
            low = global_batch_size // wave * wave
            nearest = f"{low} or {low + wave}" if low else f"{wave}"
            raise ValueError(
                f"global_batch_size ({global_batch_size}) must be a multiple of micro_batch_size "
                f"({micro_batch_size}) x "
                f"data-parallel world ({dp_world}) = {wave}; nearest: {nearest}"
            )
        self._global_batch_size = global_batch_size
        self._next_sample = start_sample
        if end_sample is None and isinstance(dataset, EvalSet):
            end_sample = len(dataset)
        self._end_sample = end_sample
        self._queue: queue.Queue | None = None
        self._error: BaseException | None = None
        self._stop = threading.Event()
        offsets = [
            [micro * wave + dp_rank * micro_batch_size + i for i in range(micro_batch_size)]
            for micro in range(global_batch_size // wave)
        ]
        steps = _steps(dataset, offsets, global_batch_size, start_sample, end_sample)
        self._steps = steps
        if prefetch:
            self._queue = queue.Queue(maxsize=prefetch)
            # The thread holds no reference to self: an iterator that is dropped without close() can be
            # collected.
            self._thread = threading.Thread(
                target=_fill, args=(steps, self._queue, self._stop), name="data prefetch", daemon=True
            )
            self._thread.start()

    def __iter__(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        return self

    def __next__(self) -> list[dict[str, torch.Tensor]]:
        if self._error is not None:
            raise self._error
        if self._stop.is_set():
            raise RuntimeError("this BatchIterator is closed")
        step = self._queue.get() if self._queue is not None else _next_or_error(self._steps)
        if isinstance(step, BaseException):
            # Nothing comes after it: the same answer for every further call.
            self._error = step
            raise step
        self._next_sample += self._global_batch_size
        if self._end_sample is not None:
            self._next_sample = min(self._next_sample, self._end_sample)
        return step

    def state(self) -> dict[str, int]:
        """{"consumed_samples": n}: the global index after the last step that was *given out*, not built
        ahead.
        """
        return {"consumed_samples": self._next_sample}

    def close(self) -> None:
        """Stop the thread and wait for it. Safe to call twice."""
        self._stop.set()
        if self._queue is not None:
            self._thread.join()

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_stop"):
            self._stop.set()


def _steps(dataset, offsets: list[list[int]], step_size: int, start: int, end: int | None) -> Iterator:
    blank = None
    while end is None or start < end:
        step = []
        for micro in offsets:
            samples = []
            for offset in micro:
                index = start + offset
                if end is None or index < end:
                    samples.append(dataset[index])
                else:
                    blank = blank or _blank_like(dataset[start])
                    samples.append(blank)
            step.append(_collate(samples))
        yield step
        start += step_size


def _fill(steps: Iterator, out: queue.Queue, stop: threading.Event) -> None:
    """Body of the prefetch thread: steps until the end, an error, or `stop`."""

    def put(item) -> bool:
        while not stop.is_set():
            try:
                out.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    while not stop.is_set():
        step = _next_or_error(steps)
        if not put(step) or isinstance(step, BaseException):
            return


def _next_or_error(steps: Iterator) -> list[dict[str, torch.Tensor]] | BaseException:
    try:
        return next(steps)
    except BaseException as error:
        return error


def _collate(samples: list[Sample]) -> dict[str, torch.Tensor]:
    batch = {
        name: torch.from_numpy(np.stack([getattr(sample, name) for sample in samples]))
        for name in ("tokens", "labels", "positions", "document_ids")
    }
    batch["sample_index"] = torch.tensor([sample.index for sample in samples], dtype=torch.int64)
    batch["source"] = torch.tensor([sample.source for sample in samples], dtype=torch.int64)
    return batch


def _blank_like(sample: Sample) -> Sample:
    """A sample of the same length that predicts nothing."""
    size = sample.tokens.size
    zeros = np.zeros(size, dtype=np.int64)
    return Sample(
        zeros, np.full(size, IGNORE), np.arange(size), np.zeros(size, dtype=np.int32), source=-1, index=-1
    )


# One source: epochs of shuffled documents, cut into windows.


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """Order of one epoch: groups (g,) in stream order; starts (g + 1,), where each begins in the stream."""

    groups: np.ndarray
    starts: np.ndarray


class _Stream:
    """The windows of one file, epoch by epoch."""

    def __init__(
        self,
        name: str,
        prefix: str | Path,
        seq_len: int,
        isolate_documents: bool,
        vocab_size: int | None,
        seed: int,
        shuffle: bool,
    ):
        if seq_len < 1:
            raise ValueError(f"seq_len ({seq_len}) must be at least 1")
        self.name = name
        self._reader = IndexedReader(prefix)
        self.num_tokens = self._reader.num_tokens
        if not self.num_tokens:
            raise ValueError(f"data set {name!r} ({prefix}): holds no tokens; leave it out")
        largest = (read_meta(prefix) or {}).get("max_token_id", -1)
        if vocab_size is not None and largest >= vocab_size:
            raise ValueError(self._beyond_vocabulary(largest, vocab_size))
        self.num_windows = -(-self.num_tokens // seq_len)
        self._seq_len = seq_len
        self._isolate = isolate_documents
        self._vocab_size = vocab_size
        self._seed = seed
        self._shuffle = shuffle
        # Where each group begins.
        self._group_starts = np.append(
            self._reader.document_starts(0, self._reader.num_documents, GROUP), self.num_tokens
        )
        self._lock = threading.Lock()
        self._epochs: collections.OrderedDict[int, _Epoch] = collections.OrderedDict()

    def sample(self, epoch: int, number: int, source: int, index: int) -> Sample:
        """Sample `number` of an epoch; the last two arguments are stored in it."""
        size = self._seq_len
        window = _permute(number, self.num_windows, _mix(self._seed, 2, epoch)) if self._shuffle else number
        begin = window * size
        # One token more than the window holds: the label of its last position.
        length = min(size + 1, self.num_tokens - begin)
        places, starts = self._places(epoch, begin, length)
        ids = self._reader.tokens[places].astype(np.int64)
        self._reader.check()
        if self._vocab_size is not None and not (ids.min() >= 0 and ids.max() < self._vocab_size):
            raise ValueError(
                self._beyond_vocabulary(int(ids.max() if ids.min() >= 0 else ids.min()), self._vocab_size)
            )
        used = min(size, length)
        tokens = np.zeros(size, dtype=np.int64)
        tokens[:used] = ids[:used]
        labels = np.full(size, IGNORE, dtype=np.int64)
        labels[: length - 1] = ids[1:]
        positions = np.arange(size, dtype=np.int64)
        document_ids = np.zeros(size, dtype=np.int32)
        if self._isolate:
            # starts: where in the window documents begin. The token before each of them has nothing to
            # predict.
            starts = starts[starts < length]
            labels[starts[starts > 0] - 1] = IGNORE
            starts = starts[starts < used]
            if used < size:
                starts = np.append(starts, used)
            lengths = np.diff(starts, append=size)
            positions -= np.repeat(starts, lengths)
            document_ids = np.repeat(np.arange(starts.size, dtype=np.int32), lengths)
        return Sample(tokens, labels, positions, document_ids, source, index)

    def fingerprint(self) -> str:
        """Hash of sizes, counts, and up to 256 pages of the index and 64 of the tokens, evenly spaced."""
        reader = self._reader
        digest = hashlib.sha256(
            json.dumps(
                [str(reader.dtype), reader.num_tokens, reader.num_sequences, reader.num_documents]
            ).encode()
        )
        for suffix, pages in ((".idx", 256), (".bin", 64)):
            path = with_suffix(reader.prefix, suffix)
            size, page = path.stat().st_size, 4096
            offsets = (
                range(0, size, page)
                if size <= page * pages
                else (i * (size - page) // (pages - 1) for i in range(pages))
            )
            with open(path, "rb") as file:
                for offset in offsets:
                    file.seek(offset)
                    digest.update(file.read(page))
        return digest.hexdigest()

    def _places(self, epoch: int, begin: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Where in the file the epoch's tokens begin .. begin+length-1 lie, (length,) int64, and where in
        this window
        documents begin, ascending; the first entry is 0, whether or not a document begins there."""
        order = self._epoch(epoch)
        pieces = []  # (file positions, lengths) of runs of tokens, a run is one document or its rest
        group = int(np.searchsorted(order.starts, begin, side="right")) - 1
        missing = length
        skip = begin - int(order.starts[group])
        while missing:
            first, lengths = self._documents(epoch, int(order.groups[group]))
            ends = np.cumsum(lengths)
            # Runs that overlap [skip, skip + missing) of this group's stream.
            low = int(np.searchsorted(ends, skip, side="right"))
            high = min(int(np.searchsorted(ends, skip + missing, side="left")) + 1, ends.size)
            first, counts = first[low:high].copy(), lengths[low:high].copy()
            if counts.size:
                cut = skip - int(ends[low] - lengths[low])
                first[0] += cut
                counts[0] -= cut
                counts[-1] -= max(0, int(ends[high - 1]) - skip - missing)
                missing -= int(counts.sum())
                pieces.append((first[counts > 0], counts[counts > 0]))
            group += 1
            skip = 0
        first = np.concatenate([piece[0] for piece in pieces])
        counts = np.concatenate([piece[1] for piece in pieces])
        starts = np.concatenate(([0], np.cumsum(counts[:-1])))
        return np.repeat(first - starts, counts) + np.arange(length), starts

    def _documents(self, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        """(file positions, lengths) of a group's documents in the epoch's order, int64."""
        first = group * GROUP
        starts = self._reader.document_starts(first, min(first + GROUP, self._reader.num_documents) + 1)
        begin, lengths = starts[:-1], np.diff(starts)
        if self._shuffle:
            order = _shuffled(lengths.size, _mix(self._seed, 3, epoch, group))
            begin, lengths = begin[order], lengths[order]
        return begin, lengths

    def _epoch(self, epoch: int) -> _Epoch:
        # Two are kept: around the end of an epoch, samples of both are wanted in turn.
        with self._lock:
            order = self._epochs.get(epoch)
            if order is None:
                lengths = np.diff(self._group_starts)
                groups = np.arange(lengths.size)
                if self._shuffle:
                    groups = _shuffled(lengths.size, _mix(self._seed, 4, epoch))
                order = _Epoch(groups, np.concatenate(([0], np.cumsum(lengths[groups]))))
                self._epochs[epoch] = order
                if len(self._epochs) > 2:
                    self._epochs.popitem(last=False)
            else:
                self._epochs.move_to_end(epoch)
            return order

    def _beyond_vocabulary(self, token: int, vocab_size: int) -> str:
        return (
            f"data set {self.name!r} ({self._reader.prefix}): holds token id {token}, but the "
            "model's vocab_size is "
            f"{vocab_size}; was it prepared with another tokenizer?"
        )


# Blending.


def _probabilities(
    sources: Sequence[Source], tokens: list[int], temperature: float | None
) -> tuple[float, ...]:
    given = [source for source in sources if source.weight is not None]
    if given and temperature is not None:
        raise ValueError(
            f"data sources: weights (of {given[0].name!r}) and a temperature ({temperature}) exclude "
            "each other; leave one out"
        )
    if given:
        for source in sources:
            if source.weight is None or not 0 < source.weight < float("inf"):
                raise ValueError(
                    f"data source {source.name!r}: weight is {source.weight}; with weights, every "
                    "source needs one above 0"
                )
        shares = np.array([source.weight for source in sources], dtype=np.float64)
    else:
        exponent = 1.0 if temperature is None else temperature
        if not 0 <= exponent < float("inf"):
            raise ValueError(f"data temperature ({temperature}) must be at least 0")
        # Relative to the largest, which keeps the power inside the range of floats.
        shares = (np.array(tokens, dtype=np.float64) / max(tokens)) ** exponent
    # 12 digits: the last bits of a power differ between machines, and the order of samples must not.
    return tuple(float(f"{share:.12g}") for share in shares / shares.sum())


@dataclasses.dataclass(frozen=True)
class _Split:
    """Inner node of the blend's tree: of its first m samples, (m * share + phase) >> BLEND_BITS go left."""

    share: int
    phase: int
    left: _Split | int
    right: _Split | int


class _Blend:
    """Which source each sample comes from, as a function of its index that needs no table.

    A binary tree of the sources, built by joining the two smallest shares as Huffman's code does. Each inner
    node divides its samples between its sides in one fixed ratio as evenly as whole numbers can, which bounds
    the error of any prefix by 1 per node. Deterministic spacing alone could fall into step with the ranks, so
    that one rank would see one source for ever; so each block of 64 samples is rotated by a random amount.
    """

    def __init__(self, probabilities: Sequence[float], seed: int):
        nodes: list[tuple[float, int, _Split | int]] = [(p, i, i) for i, p in enumerate(probabilities)]
        while len(nodes) > 1:
            nodes.sort(key=lambda node: node[:2], reverse=True)
            (small, tie, right), (large, _, left) = nodes.pop(), nodes.pop()
            share = int(large / (large + small) * (1 << BLEND_BITS))
            phase = _mix(seed, 5, len(nodes)) >> (64 - BLEND_BITS)
            nodes.append((large + small, tie, _Split(share, phase, left, right)))
        self._root = nodes[0][2]
        self._seed = seed
        self._paths: list[list[tuple[int, int, bool]]] = [[] for _ in probabilities]
        self._add_paths(self._root, [])

    def locate(self, index: int) -> tuple[int, int]:
        """(source, how many samples of that source come before) of a sample."""
        block, place = divmod(index, BLEND_BLOCK)
        node, m = self._root, block * BLEND_BLOCK + (place + self._rotation(block)) % BLEND_BLOCK
        while isinstance(node, _Split):
            before = (m * node.share + node.phase) >> BLEND_BITS
            if ((m + 1) * node.share + node.phase) >> BLEND_BITS > before:
                node, m = node.left, before
            else:
                node, m = node.right, m - before
        return node, self.count(node, index)

    def count(self, source: int, index: int) -> int:
        """How many of the samples 0 .. index-1 come from `source`."""
        block, place = divmod(index, BLEND_BLOCK)
        if not place:
            return self._unrotated(source, index)
        base = block * BLEND_BLOCK
        low = base + self._rotation(block)
        high = low + place
        end = base + BLEND_BLOCK
        count = (
            self._unrotated(source, base)
            + self._unrotated(source, min(high, end))
            - self._unrotated(source, low)
        )
        if high > end:
            count += self._unrotated(source, high - BLEND_BLOCK) - self._unrotated(source, base)
        return count

    def _unrotated(self, source: int, m: int) -> int:
        for share, phase, left in self._paths[source]:
            before = (m * share + phase) >> BLEND_BITS
            m = before if left else m - before
        return m

    def _rotation(self, block: int) -> int:
        return _mix(self._seed, 6, block) % BLEND_BLOCK

    def _add_paths(self, node: _Split | int, path: list[tuple[int, int, bool]]) -> None:
        if isinstance(node, _Split):
            self._add_paths(node.left, [*path, (node.share, node.phase, True)])
            self._add_paths(node.right, [*path, (node.share, node.phase, False)])
        else:
            self._paths[node] = path


# Random numbers as pure functions of their keys (SplitMix64; Steele, Lea and Flood 2014, figure 15).


def _mix(*keys: int) -> int:
    """64 bits that depend on all keys and on their order."""
    state = 0
    for key in keys:
        state = (state ^ key) + 0x9E3779B97F4A7C15 & _U64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _U64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _U64
        state ^= state >> 31
    return state


def _shuffled(count: int, seed: int) -> np.ndarray:
    """A permutation of 0 .. count-1, (count,) int64: the order of `count` random keys."""
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.argsort(state ^ state >> np.uint64(31), kind="stable")


def _permute(number: int, count: int, seed: int) -> int:
    """Place of `number` in a keyed permutation of 0 .. count-1, without a table.

    A Feistel network over the next power of 4, applied until the result is in range (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains", section 5).
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = number >> half, number & mask
        for round_ in range(4):
            left, right = right, left ^ (_mix(seed + round_, right) & mask)
        number = left << half | right
        if number < count:
            return number
