"""Checkpoints: saved while training goes on, whole or absent, loaded under any layout, never unpickled.

    folder/step-00000120/
        manifest.json                       size and SHA-256 of every other file; written last
        meta.json                           whatever the trainer needs beside tensors
        rank00000-001.safetensors ...       tensors, by the rank that wrote them

Tensors go through torch.distributed.checkpoint's safetensors storage: each file's header says which part of which tensor it holds, so there is
no pickled index. A checkpoint is written to `step-N.tmp`, flushed to disk and renamed; a folder without `.tmp` is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from moetrain.config import CheckpointConfig
from moetrain.files import read_object

FORMAT = 1
_MANIFEST, _META = "manifest.json", "meta.json"
_MAX_FILE_BYTES = 1 << 30  # ranks that load share the files to check between them
_TIMEOUT = timedelta(minutes=30)  # a slow disk of one rank makes the others wait
_STEP = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_T = TypeVar("_T")

# DCP says so at each save and load of a process that has no process group; here that is a supported way to work.
warnings.filterwarnings("ignore", message="torch.distributed is (disabled, )?unavailable or uninitialized")


class Checkpoints:
    """The checkpoints of one run.

    The constructor, `save`, `load`, `wait` and `close` are collective: every rank calls them in the same order. Without a process group they
    work on one process.
    """

    def __init__(self, folder: Path | str, config: CheckpointConfig) -> None:
        """folder: on a file system that all ranks share; made by the first save. Nothing is read, written or removed here."""
        self.folder = Path(folder)
        self.config = config
        self.damaged: dict[int, str] = {}
        """Step -> reason, for each checkpoint that `load` had to pass over."""
        parallel = dist.is_available() and dist.is_initialized()
        # A group of its own: the writing thread's collectives run beside training's and must never pair up with them.
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if parallel else None
        self._rank = dist.get_rank() if parallel else 0
        self._world = dist.get_world_size() if parallel else 1
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._swept = False
        self.saving: int | None = None
        """Step that a thread is writing."""

    # ---------------------------------------------------------------------------------------------------------------- save

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, wait: bool = False) -> None:
        """Save under `step`. Returns once the tensors are copied to host memory; a thread writes them, unless `wait` or not `config.asynchronous`.

        tensors: flat names; a DTensor is saved by its shards (any mesh, Shard and Replicate), any other tensor is the same on all ranks and saved
        once. meta: plain JSON data; rank 0's is kept. Waits for the previous save first and raises its error, if it had one.

        Raises OSError (disk full, read-only, folder not shared): then no trace of this save is left and older checkpoints are untouched.
        """
        self.wait()
        text = json.dumps(meta)
        staged = _stage(tensors)
        if self.config.asynchronous and not wait:
            # daemon: a process that dies of an error elsewhere must not hang here waiting for ranks that are gone; a torn save leaves only .tmp
            self.saving = step
            self._thread = threading.Thread(target=self._write_in_thread, args=(step, staged, text), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(step, staged, text)

    def wait(self) -> bool:
        """Wait for the save under way; whether there was one. Raises its error (once)."""
        found = self._thread is not None
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return found

    @property
    def failure(self) -> BaseException | None:
        """The error that `wait` is going to raise, as soon as this rank knows it. Not collective."""
        return self._error

    def close(self) -> None:
        """Wait as `wait` does, and free the process group."""
        try:
            self.wait()
        finally:
            if self._group is not None and dist.is_initialized():
                dist.destroy_process_group(self._group)
            self._group = None

    def _write_in_thread(self, step: int, staged: dict[str, Tensor], text: str) -> None:
        try:
            self._write(step, staged, text)
        except BaseException as error:  # handed to the training thread by `wait`
            self._error = error
        finally:
            self.saving = None

    def _write(self, step: int, staged: dict[str, Tensor], text: str) -> None:
        final = self.folder / f"step-{step:08d}"
        temporary = _temporary(final)
        where = f"checkpoint {final}"
        try:
            self._together(where, lambda: self._prepare(temporary))
            writer = _Writer(temporary, self._rank)
            planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            options = {"planner": planner, "process_group": self._group, "no_dist": self._group is None}
            self._together(where, lambda: dcp.save(staged, storage_writer=writer, **options))
            files = self._together(where, lambda: writer.files)
            self._together(where, lambda: self._finish(final, step, text, {k: v for part in files for k, v in part.items()}))
        except BaseException:
            if self._rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                self._swept = False  # what can't be removed now is tried again by the next save
            raise

    def _prepare(self, temporary: Path) -> None:
        if self._rank != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._swept:
            # Here, not in the constructor: an evaluation that reads the folder of a live run must not remove what that run is writing.
            for left in self.folder.glob("step-*.tmp"):
                shutil.rmtree(left)
            self._swept = True
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def _finish(self, final: Path, step: int, text: str, files: dict[str, dict[str, Any]]) -> None:
        """Rank 0: manifest, rename, retention. Every tensor file is on disk by now."""
        if self._rank != 0:
            return
        temporary = _temporary(final)
        for name, entry in files.items():
            path = temporary / name
            if not path.is_file() or path.stat().st_size != entry["size"]:
                raise OSError(f"{path}: not seen by rank 0 as another rank wrote it; all ranks must share the folder's file system")
        _write_flushed(temporary / _META, text)
        files[_META] = _entry(temporary / _META)
        manifest = {"format": FORMAT, "step": step, "ranks": self._world, "torch": torch.__version__, "files": dict(sorted(files.items()))}
        _write_flushed(temporary / _MANIFEST, json.dumps(manifest, indent=1))
        _flush_folder(temporary)
        if final.exists():
            # A damaged one that `load` passed over, or the same step saved again. Between the two renames this step has no final name;
            # older checkpoints are still there, for they are removed after it.
            replaced = final.with_name(final.name + ".replaced.tmp")
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
            temporary.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            temporary.rename(final)
        _flush_folder(self.folder)
        self._retire(step)

    def _retire(self, step: int) -> None:
        # Steps after this one are left by a run that went further and was set back; they are neither counted nor removed.
        steps = [s for s in self.steps() if s <= step]
        every = self.config.keep_every
        for old in steps[: -self.config.keep_last]:
            if every is not None and old % every == 0:
                continue
            path = self.folder / f"step-{old:08d}"
            try:
                # Renamed first: a process killed while it removes leaves nothing half under a final name.
                path.rename(_temporary(path))
                shutil.rmtree(_temporary(path))
            except OSError as error:  # the new checkpoint is safe, so this is no reason to stop a run
                warnings.warn(f"checkpoint {path} could not be removed: {error}", stacklevel=2)

    # ---------------------------------------------------------------------------------------------------------------- load

    def load(self, tensors: Mapping[str, Tensor], *, step: int | None = None) -> dict[str, Any]:
        """Fill `tensors` in place, whatever layout they were saved under, and return the meta data.

        Takes the newest checkpoint whose files agree with their checksums, with a warning (and an entry in `damaged`) for each that does not;
        `step` asks for that one and no other.

        Raises ValueError if there is none, if the one asked for is damaged, or if names, shapes or dtypes differ.
        """
        self.wait()
        self.damaged = {}
        where = f"checkpoints {self.folder}"
        steps = [step] if step is not None else self._together(where, lambda: self.steps()[::-1])[0]
        if not steps:
            raise ValueError(f"no checkpoint in {self.folder}")
        for candidate in steps:
            folder = self.folder / f"step-{candidate:08d}"
            problem = self._problem(folder)
            if problem is None:
                return self._fill(folder, tensors)
            if step is not None:
                raise ValueError(f"checkpoint {folder} is damaged: {problem}; other steps here: {[s for s in self.steps() if s != step]}")
            self.damaged[candidate] = problem
            if self._rank == 0:
                warnings.warn(f"checkpoint {folder} is damaged: {problem}; trying the one before it", stacklevel=2)
        reasons = "; ".join(f"step {s}: {p}" for s, p in self.damaged.items())
        raise ValueError(f"no whole checkpoint in {self.folder}: {reasons}; mend them, or start anew with another run_dir")

    def _problem(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, the same answer on all ranks, each of which reads its share of the bytes; None: it is whole."""

        def read() -> tuple[dict[str, Any], str | None]:
            if self._rank != 0:
                return {}, None
            try:
                return _read_manifest(folder), None
            except (ValueError, OSError) as error:
                return {}, str(error)

        files, problem = self._together(f"checkpoint {folder}", read)[0]
        if problem is None:
            mine = _shares(files, self._world)[self._rank]
            found = self._together(f"checkpoint {folder}", lambda: _check_files(folder, {name: files[name] for name in mine}))
            problem = next((p for p in found if p), None)
        return problem

    def _fill(self, folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        where = f"checkpoint {folder}"
        # One rank reads the headers for all: with many ranks there are many files.
        metadata, meta = self._together(where, lambda: (_read_index(folder), read_meta(folder)) if self._rank == 0 else None)[0]
        known = {name: (tuple(m.size), m.properties.dtype) for name, m in metadata.state_dict_metadata.items()}
        wanted = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        everywhere = {k: v for part in self._together(where, lambda: wanted) for k, v in part.items()}
        problems = _differences(known, everywhere)
        if problems:
            raise ValueError(f"checkpoint {folder} does not fit: " + "; ".join(problems))
        state = {name: t.detach() for name, t in tensors.items()}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        reader = _Reader(folder, metadata)
        options = {"planner": planner, "process_group": self._group, "no_dist": self._group is None}
        self._together(where, lambda: dcp.load(state, storage_reader=reader, **options))
        return meta

    # ---------------------------------------------------------------------------------------------------------------- look

    def steps(self) -> list[int]:
        """Steps saved, ascending. Not collective."""
        return find_steps(self.folder)

    def latest(self) -> int | None:
        """The newest step saved. Not collective."""
        return max(self.steps(), default=None)

    def read_meta(self, step: int) -> dict[str, Any]:
        """The meta data saved with a step. Not collective."""
        return read_meta(self.folder / f"step-{step:08d}")

    def read_full(self, step: int, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """As the function `read_full`. Not collective."""
        return read_full(self.folder / f"step-{step:08d}", prefix)

    def _together(self, where: str, work: Callable[[], _T]) -> list[_T]:
        """Run `work` on all ranks and return all results; if it fails on one, raise the same error on every rank, so that none is left waiting."""
        result, failure, cause = None, None, None
        try:
            result = work()
        except (Exception, dcp.CheckpointException) as error:
            cause, failure = error, _describe(error, self._rank)
        if self._group is None:
            outcomes = [(result, failure)]
        else:
            outcomes = [(None, None)] * self._world
            dist.all_gather_object(outcomes, (result, failure), group=self._group)
        first = next((f for _, f in outcomes if f is not None), None)
        if first is not None:
            kind, number, text = first
            text = f"{where}: {text}"
            raise (OSError(number, text) if number is not None else kind(text)) from cause
        return [r for r, _ in outcomes]


class _Writer(dcp.HuggingFaceStorageWriter):
    """DCP's safetensors writer but for the writing itself: the library builds each file in memory while it holds the interpreter's lock, which
    stops the training thread for seconds."""

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__(str(path), save_distributed=True)
        self._folder, self._file_prefix = path, f"rank{rank:05d}"
        self.files: dict[str, dict[str, Any]] = {}
        """Name -> size and sha256 of the files of this rank."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        for number, items in enumerate(_by_file(plan.items), 1):
            name = f"{self._file_prefix}-{number:03d}.safetensors"
            path = self._folder / name
            offsets = {item.index.fqn: {"saved_offsets": list(item.tensor_data.chunk.offsets)} for item in items}
            # The names that dcp.HuggingFaceStorageReader looks for.
            header = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
            try:
                save_file({item.index.fqn: planner.resolve_data(item) for item in items}, path, metadata=header)
            except SafetensorError as error:
                # The library keeps the system's error as text.
                system = re.search(r"\(os error (\d+)\)", str(error))
                raise (OSError(int(system[1]), os.strerror(int(system[1])), str(path)) if system else error) from None
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            self.files[name] = _entry(path)
            results += [WriteResult(item.index, item.tensor_storage_size() or 0, name) for item in items]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


class _Reader(dcp.HuggingFaceStorageReader):
    """DCP's safetensors reader with the headers read already."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(str(path))
        self._metadata = metadata

    def read_metadata(self) -> Metadata:
        return self._metadata


# ------------------------------------------------------------------------------------------------- reading on one process


def find_steps(folder: Path | str) -> list[int]:
    """Steps of the checkpoints in a run's checkpoint folder, ascending."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for p in folder.iterdir() if (m := _STEP.fullmatch(p.name)) and p.is_dir())


def read_meta(folder: Path | str) -> dict[str, Any]:
    """The meta data of one checkpoint folder. Raises ValueError if there is none."""
    path = Path(folder) / _META
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {folder}: {_META} can't be read: {error}") from None


def read_full(folder: Path | str, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of one checkpoint folder, whole, on the CPU, in the order of names, one in memory at a time; no process group is used.

    prefix: only names that start with it. Raises ValueError, before the first tensor, if the checkpoint is damaged.
    """
    folder = Path(folder)
    problem = find_damage(folder)
    if problem is not None:
        raise ValueError(f"checkpoint {folder} is damaged: {problem}")
    return _whole_tensors(_read_index(folder), prefix)


def find_damage(folder: Path | str) -> str | None:
    """What is wrong with a checkpoint folder (file and reason), or None. Reads every byte."""
    try:
        return _check_files(Path(folder), _read_manifest(Path(folder)))
    except (ValueError, OSError) as error:
        return str(error)


def _whole_tensors(index: Metadata, prefix: str) -> Iterator[tuple[str, Tensor]]:
    with ExitStack() as stack:
        handles: dict[str, Any] = {}
        for name, info in sorted(index.state_dict_metadata.items()):
            if not name.startswith(prefix):
                continue
            whole = torch.empty(info.size, dtype=info.properties.dtype)
            for chunk in info.chunks:
                path = index.storage_data[MetadataIndex(name, chunk.offsets)].relative_path
                if path not in handles:
                    handles[path] = stack.enter_context(safe_open(path, framework="pt"))
                place = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
                whole[place] = handles[path].get_tensor(name)
            yield name, whole


def _read_index(folder: Path) -> Metadata:
    """Which file holds which part of which tensor, from the files' headers. Raises ValueError if a part is missing or overlaps."""
    try:
        index = dcp.HuggingFaceStorageReader(str(folder)).read_metadata()
    except Exception as error:  # whatever a header that was not written by us makes the library raise
        raise ValueError(f"{folder}: the headers of its files can't be read: {error}") from None
    for name, info in index.state_dict_metadata.items():
        covered = sum(math.prod(chunk.sizes) for chunk in info.chunks)
        if covered != math.prod(info.size) or any(o < 0 for chunk in info.chunks for o in chunk.offsets):
            raise ValueError(f"{folder}: the parts of {name} have {covered} elements, its shape {tuple(info.size)} {math.prod(info.size)}")
    return index


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """File -> size and sha256, after checking that the folder holds these files and no other. Raises ValueError or OSError."""
    path = folder / _MANIFEST
    if not folder.is_dir():
        raise ValueError("there is no such folder")
    if not path.is_file():
        raise ValueError(f"{_MANIFEST} is missing")
    manifest = read_object(path)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(e, dict) and isinstance(e.get("size"), int) and isinstance(e.get("sha256"), str) for e in files.values()
    ):
        raise ValueError(f"{_MANIFEST} does not list files with size and sha256")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{_MANIFEST} has format {manifest.get('format')!r}; this version reads {FORMAT}")
    named = _STEP.fullmatch(folder.name)
    if named and manifest.get("step") != int(named[1]):
        raise ValueError(f"{_MANIFEST} is of step {manifest.get('step')!r}")
    for name in files:
        if not _FILE.fullmatch(name):
            raise ValueError(f"{_MANIFEST} names {name!r}, which is no plain file name")
    if _META not in files:
        raise ValueError(f"{_MANIFEST} does not list {_META}")
    present = {entry.name for entry in os.scandir(folder)} - {_MANIFEST}
    # File systems and desktops leave dot files (.nfs..., .DS_Store); nothing reads them.
    strange = sorted(n for n in present - files.keys() if not n.startswith(".") or n.endswith(".safetensors"))
    if strange:
        raise ValueError(f"{strange[0]} is not in {_MANIFEST}")
    return files


def _check_files(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    for name, entry in files.items():
        path = folder / name
        try:
            if path.is_symlink() or not path.is_file():
                return f"{name} is missing" if not path.exists() else f"{name} is no regular file"
            found = path.stat().st_size
            if found != entry["size"]:
                return f"{name} has {found} bytes, {entry['size']} expected"
            if _sha256(path) != entry["sha256"]:
                return f"{name} has another checksum than when it was written"
        except OSError as error:
            return f"{name} can't be read: {error}"
    return None


def _differences(known: dict[str, tuple], wanted: dict[str, tuple]) -> list[str]:
    missing = sorted(wanted.keys() - known.keys())
    unexpected = sorted(known.keys() - wanted.keys())
    other = [f"{n} (saved {_kind(*known[n])}, wanted {_kind(*wanted[n])})" for n in sorted(known.keys() & wanted.keys()) if known[n] != wanted[n]]
    titled = (("not in the checkpoint", missing), ("only in the checkpoint", unexpected), ("of another shape or dtype", other))
    return [f"{len(names)} {title}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" for title, names in titled if names]


def _kind(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{shape} {str(dtype).removeprefix('torch.')}"


# ----------------------------------------------------------------------------------------------------------------- pieces


def _stage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory (pinned when they come from a GPU) that later steps can't change."""
    staged: dict[str, Tensor] = {}
    on_gpu = False
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        copy.copy_(local, non_blocking=True)
        on_gpu |= local.is_cuda
        # The constructor, as DTensor.from_local would send the copy back to the mesh's device.
        staged[name] = DTensor(copy, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else copy
    if on_gpu:
        torch.cuda.synchronize()
    return staged


def _by_file(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """Split in order, so that no file is larger than a bound (or than one tensor)."""
    part: list[WriteItem] = []
    used = 0
    for item in items:
        size = item.tensor_storage_size() or 0
        if part and used + size > _MAX_FILE_BYTES:
            yield part
            part, used = [], 0
        part.append(item)
        used += size
    if part:
        yield part


def _shares(files: dict[str, dict[str, Any]], ranks: int) -> list[list[str]]:
    """Split the files so that each rank has about as many bytes to read."""
    shares: list[list[str]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for name in sorted(files, key=lambda n: (-files[n]["size"], n)):
        rank = load.index(min(load))
        shares[rank].append(name)
        load[rank] += files[name]["size"]
    return shares


def _describe(error: BaseException, rank: int) -> tuple[type[Exception], int | None, str]:
    """(class to raise, errno of an OSError, text): what the other ranks need to raise the same error."""
    if isinstance(error, dcp.CheckpointException):
        rank, (error, _) = next(iter(error.failures.items()))
    kind = next((k for k in (ValueError, OSError) if isinstance(error, k)), RuntimeError)
    number = error.errno if isinstance(error, OSError) else None
    text = error.strerror if number is not None else str(error)
    if number is not None and error.filename:
        text = f"{text}: {error.filename}"
    if kind is RuntimeError:
        text = f"{type(error).__name__}: {text}"
    return kind, number, text if rank == 0 else f"rank {rank}: {text}"


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _write_flushed(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
