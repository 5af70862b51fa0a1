"""Proves that a checkpoint loads bit for bit under any layout, that one with its final name is whole whatever killed its writer, and that
damage, in every file and in the manifest, is found and passed over."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import moetrain.checkpoint as checkpoint
from moetrain.checkpoint import Checkpoints, find_damage, find_steps, read_full, read_meta
from moetrain.config import CheckpointConfig

# A server that has torch loaded forks each rank: a rank starts in milliseconds, and no thread of the test process is copied into it.
_context = multiprocessing.get_context("forkserver")
# torch._dynamo: DTensor imports it at its first use, which takes longer than all else here.
_context.set_forkserver_preload(["pytest", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "moetrain.checkpoint"])

SECONDS = 60

# pytest puts aside the filter that moetrain.checkpoint sets.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


def _rank(work, rank, world, store, errors, args):
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
        work(rank, world, *args)
        dist.destroy_process_group()
    except BaseException:
        Path(errors, f"rank-{rank}").write_text(traceback.format_exc())
        os._exit(1)


def _start(tmp_path: Path, world: int, work, *args) -> tuple[list, Path]:
    place = tmp_path / f"ranks-{time.monotonic_ns()}"
    place.mkdir()
    ranks = [_context.Process(target=_rank, args=(work, r, world, str(place / "store"), str(place), args)) for r in range(world)]
    for process in ranks:
        process.start()
    return ranks, place


def _run(tmp_path: Path, world: int, work, *args) -> None:
    """`work(rank, world, *args)` on so many processes; any failure fails the test with its traceback."""
    ranks, place = _start(tmp_path, world, work, *args)
    end = time.monotonic() + SECONDS
    for process in ranks:
        process.join(max(0, end - time.monotonic()))
    hung = [r for r, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
    failures = "\n".join(f"{p.name}: {p.read_text()}" for p in sorted(place.glob("rank-*")))
    assert not failures, failures
    assert not hung, f"ranks {hung} did not end in {SECONDS} s"
    assert [p.exitcode for p in ranks] == [0] * world


# ------------------------------------------------------------------------------------------------------------------ tensors

SHAPES = {
    "model.embed.weight": ((7, 6), torch.float32),
    "model.layers.0.ffn.experts.gate_up": ((4, 8, 6), torch.bfloat16),
    "model.layers.0.ffn.experts.down": ((3, 6, 5), torch.float32),
    "model.layers.1.strided.weight": ((8, 6), torch.float32),
    "model.norm.weight": ((6,), torch.float64),
    "optim.exp_avg.embed.weight": ((7, 6), torch.float32),
    "optim.step": ((), torch.float32),
    "optim.count": ((5,), torch.int64),
    "optim.nothing": ((0, 4), torch.float32),
}


def _value(name: str, step: int = 0) -> torch.Tensor:
    shape, dtype = SHAPES[name]
    generator = torch.Generator().manual_seed(sum(name.encode()) + 1000 * step)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * 1000).to(dtype)


def _values(step: int = 0) -> dict[str, torch.Tensor]:
    return {name: _value(name, step) for name in SHAPES}


def _lay_out(mesh, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mixed placements on a (dp, ep) mesh: uneven shards, two dims of one tensor, replication beside sharding, FSDP inside an expert shard."""
    experts = "model.layers.0.ffn.experts."
    placements = {
        "model.embed.weight": (Replicate(), Shard(0)),
        experts + "gate_up": (Shard(1), Shard(0)),
        experts + "down": (Shard(0), Shard(0)),
        "optim.exp_avg.embed.weight": (Shard(1), Shard(0)),
    }
    laid = {n: distribute_tensor(v, mesh, placements[n]) if n in placements else v.clone() for n, v in values.items()}
    strided = "model.layers.1.strided.weight"
    linear = torch.nn.Linear(6, 8, bias=False)
    linear.weight = torch.nn.Parameter(distribute_tensor(values[strided], mesh["ep"], [Shard(0)]))
    fully_shard(linear, mesh=mesh["dp"])
    laid[strided] = linear.weight
    return laid


def _zeros() -> dict[str, torch.Tensor]:
    return {n: torch.zeros(s, dtype=d) for n, (s, d) in SHAPES.items()}


def _assert_equal(tensors: dict[str, torch.Tensor], step: int = 0) -> None:
    for name, tensor in tensors.items():
        if name == "model.layers.1.strided.weight" and isinstance(tensor, DTensor):
            # Its own shard, computed by hand: the ep shard first, then the dp shard inside of it.
            dp, ep = tensor.device_mesh["dp"], tensor.device_mesh["ep"]
            part = _value(name, step).chunk(ep.size())[ep.get_local_rank()].chunk(dp.size())
            tensor, want = tensor.to_local(), part[dp.get_local_rank()]
        else:
            tensor, want = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor, _value(name, step)
        assert tensor.dtype == want.dtype and torch.equal(tensor, want), name


def _on_mesh(shape: tuple[int, int], values) -> dict[str, torch.Tensor]:
    return _lay_out(init_device_mesh("cpu", shape, mesh_dim_names=("dp", "ep")), values)


def _config(**options) -> CheckpointConfig:
    return CheckpointConfig(**options)


# --------------------------------------------------------------------------------------------------------- change of layout


def _save_on_mesh(rank, world, folder, shape):
    tensors = _on_mesh(shape, _values())
    store = Checkpoints(folder, _config())
    store.save(7, tensors, {"rank": rank, "text": "é"})
    for tensor in tensors.values():  # training goes on while the thread writes
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().fill_(-1)
    store.close()


def _load_on_mesh(rank, world, folder, shape):
    tensors = _on_mesh(shape, _zeros())
    store = Checkpoints(folder, _config())
    assert store.load(tensors) == {"rank": 0, "text": "é"}
    _assert_equal(tensors)
    store.close()


@pytest.mark.parametrize("shape", [(2, 2), (1, 3)])
def test_a_checkpoint_loads_bit_for_bit_under_every_other_layout(tmp_path, shape):
    """Saved by 4 (or 3) ranks and altered in memory at once after `save`; loaded by 1 to 4, and by one without a process group."""
    folder = tmp_path / "run"
    _run(tmp_path, shape[0] * shape[1], _save_on_mesh, folder, shape)
    for other in [(4, 1), (2, 2), (1, 3), (2, 1), (1, 2), (1, 1)] if shape == (2, 2) else [(2, 2), (2, 1)]:
        _run(tmp_path, other[0] * other[1], _load_on_mesh, folder, other)
    alone = _zeros()
    assert Checkpoints(folder, _config()).load(alone)["rank"] == 0
    _assert_equal(alone)
    whole = dict(read_full(folder / "step-00000007"))
    assert list(whole) == sorted(SHAPES)
    _assert_equal(whole)


def test_one_process_to_several(tmp_path):
    """The other way: saved without a process group, loaded by ranks."""
    Checkpoints(tmp_path / "run", _config(asynchronous=False)).save(7, _values(), {"rank": 0, "text": "é"})
    _run(tmp_path, 4, _load_on_mesh, tmp_path / "run", (2, 2))


def test_a_tensor_larger_than_a_file_and_many_files(tmp_path, monkeypatch):
    """With a tiny bound on a file's bytes every rank writes several, and they load all the same."""
    monkeypatch.setattr(checkpoint, "_MAX_FILE_BYTES", 200)
    store = Checkpoints(tmp_path, _config())
    store.save(1, _values(), {}, wait=True)
    assert len(list((tmp_path / "step-00000001").glob("*.safetensors"))) > 3
    loaded = _zeros()
    store.load(loaded)
    _assert_equal(loaded)


# ------------------------------------------------------------------------------------------------------- one process: basics


def _saved(folder: Path, steps=(1, 2), **options) -> Checkpoints:
    store = Checkpoints(folder, _config(keep_last=5, **options))
    for step in steps:
        store.save(step, _values(step), {"step": step})
    store.wait()
    return store


def test_meta_steps_and_whole_tensors(tmp_path):
    """steps, latest, read_meta and read_full agree with what was saved; a prefix leaves the optimizer out; nothing exists before the first save."""
    assert Checkpoints(tmp_path / "none", _config()).latest() is None and not (tmp_path / "none").exists()
    store = _saved(tmp_path)
    assert store.steps() == [1, 2] and store.latest() == 2 and find_steps(tmp_path) == [1, 2]
    assert store.read_meta(1) == read_meta(tmp_path / "step-00000001") == {"step": 1}
    names = [n for n, _ in store.read_full(2, "model.")]
    assert names == sorted(n for n in SHAPES if n.startswith("model."))
    loaded = _zeros()
    assert store.load(loaded, step=1) == {"step": 1}
    _assert_equal(loaded, 1)


def test_awkward_tensors(tmp_path):
    """Views, transposes, parameters and two names for one tensor are saved by value; strides of the target don't matter."""
    base = torch.arange(24.0).view(4, 6)
    tensors = {"t": base.t(), "slice": base[1:3, ::2], "tied.a": base, "tied.b": base, "parameter": torch.nn.Parameter(base.clone())}
    store = Checkpoints(tmp_path, _config())
    store.save(1, tensors, {}, wait=True)
    into = {n: torch.zeros(t.shape[::-1]).t() for n, t in tensors.items() if n != "parameter"} | {"parameter": torch.nn.Parameter(torch.zeros(4, 6))}
    store.load(into)
    for name, tensor in tensors.items():
        assert torch.equal(into[name], tensor), name
    assert into["parameter"].requires_grad and into["parameter"].grad_fn is None


def test_names_shapes_and_dtypes_that_do_not_fit(tmp_path):
    """One ValueError lists what is missing, what is too much and what has another shape or dtype; nothing is loaded."""
    store = _saved(tmp_path, [1])
    wrong = _zeros()
    del wrong["optim.count"]
    wrong |= {"model.new": torch.zeros(1), "model.norm.weight": torch.zeros(6), "model.embed.weight": torch.zeros(6, 7)}
    with pytest.raises(ValueError) as caught:
        store.load(wrong)
    text = str(caught.value)
    assert "1 not in the checkpoint: model.new" in text and "1 only in the checkpoint: optim.count" in text
    assert "model.embed.weight (saved (7, 6) float32, wanted (6, 7) float32)" in text and "wanted (6,) float32" in text
    assert all((t == 0).all() for t in wrong.values())
    with pytest.raises(ValueError, match=r"8 not in the checkpoint: a0, a1, a2, a3, a4, \.\.\."):
        store.load(_zeros() | {f"a{i}": torch.zeros(1) for i in range(8)})


def test_nothing_to_load(tmp_path):
    """No checkpoint, or none with that step, is a ValueError that names the folder."""
    with pytest.raises(ValueError, match=f"no checkpoint in {tmp_path}"):
        Checkpoints(tmp_path, _config()).load(_zeros())
    store = _saved(tmp_path, [1])
    with pytest.raises(ValueError, match=r"step-00000009 is damaged: there is no such folder; other steps here: \[1\]"):
        store.load(_zeros(), step=9)


def test_retention(tmp_path):
    """keep_last newest and every keep_every-th stay; later steps of a run that was set back are neither counted nor removed."""
    store = Checkpoints(tmp_path, _config(keep_last=2, keep_every=4))
    for step in range(1, 10):
        store.save(step, {"x": torch.tensor(float(step))}, {})
    store.wait()
    assert store.steps() == [4, 8, 9]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{s:08d}" for s in (4, 8, 9)]
    store = Checkpoints(tmp_path, _config(keep_last=1))
    store.save(5, {"x": torch.tensor(5.0)}, {}, wait=True)
    assert store.steps() == [5, 8, 9]
    store.save(8, {"x": torch.tensor(-8.0)}, {}, wait=True)  # reached again: replaced
    assert store.steps() == [8, 9] and dict(store.read_full(8))["x"] == -8


def test_asynchronous_saves_follow_each_other(tmp_path):
    """`save` returns before the files are there, and the next one waits for it."""
    store = Checkpoints(tmp_path, _config())
    order, real = [], store._finish

    def slow(final, step, *rest):
        order.append(("begin", step))
        time.sleep(0.1)
        real(final, step, *rest)
        order.append(("end", step))

    store._finish = slow
    store.save(1, _values(1), {})
    assert store.steps() == []
    store.save(2, _values(2), {})
    store.close()
    assert order == [("begin", 1), ("end", 1), ("begin", 2), ("end", 2)] and store.steps() == [1, 2]
    store.save(3, _values(3), {}, wait=True)
    assert store.steps() == [2, 3]


# --------------------------------------------------------------------------------------------------------------------- damage


def _flip(path: Path, at: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _edit(folder: Path, change) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


SHARD = "rank00000-001.safetensors"


def _rename_shard(folder: Path) -> None:
    (folder / SHARD).rename(folder / "rank00009-001.safetensors")


def _escape(folder: Path) -> None:
    shutil.copy(folder / SHARD, folder.parent / "x")

    def change(manifest):
        manifest["files"]["../x"] = manifest["files"].pop(SHARD)

    _edit(folder, change)
    (folder / SHARD).unlink()


def _link(folder: Path) -> None:
    (folder / SHARD).rename(folder.parent / "elsewhere")
    (folder / SHARD).symlink_to(folder.parent / "elsewhere")


DAMAGE = {
    "flipped byte": (lambda f: _flip(f / SHARD), f"{SHARD} has another checksum"),
    "flipped byte in a header": (lambda f: _flip(f / SHARD, 20), f"{SHARD} has another checksum"),
    "flipped byte in meta": (lambda f: _flip(f / "meta.json"), "meta.json has another checksum"),
    "truncated": (lambda f: os.truncate(f / SHARD, 100), f"{SHARD} has 100 bytes"),
    "emptied": (lambda f: os.truncate(f / SHARD, 0), f"{SHARD} has 0 bytes"),
    "missing": (lambda f: (f / SHARD).unlink(), f"{SHARD} is missing"),
    "missing meta": (lambda f: (f / "meta.json").unlink(), "meta.json is missing"),
    "extra": (lambda f: shutil.copy(f / SHARD, f / "more.safetensors"), "more.safetensors is not in manifest.json"),
    "extra, hidden": (lambda f: shutil.copy(f / SHARD, f / ".more.safetensors"), ".more.safetensors is not in manifest.json"),
    "renamed": (_rename_shard, "rank00009-001.safetensors is not in manifest.json"),
    "a link": (_link, f"{SHARD} is no regular file"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest cut": (lambda f: os.truncate(f / "manifest.json", 50), "manifest.json: is not valid JSON"),
    "manifest of another step": (lambda f: _edit(f, lambda m: m.update(step=1)), "manifest.json is of step 1"),
    "manifest of the future": (lambda f: _edit(f, lambda m: m.update(format=99)), "manifest.json has format 99"),
    "manifest without a file": (lambda f: _edit(f, lambda m: m["files"].pop(SHARD)), f"{SHARD} is not in manifest.json"),
    "manifest without meta": (lambda f: _edit(f, lambda m: m["files"].pop("meta.json")), "does not list meta.json"),
    "manifest with another digest": (lambda f: _edit(f, lambda m: m["files"][SHARD].update(sha256="0" * 64)), "another checksum"),
    "manifest with wrong types": (lambda f: _edit(f, lambda m: m["files"].update(x=3)), "does not list files with size and sha256"),
    "manifest that is a list": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json: must be a JSON object, found a list"),
    "escaping name": (_escape, "names '../x'"),
    "absolute name": (lambda f: _edit(f, lambda m: m["files"].update({"/etc/hostname": m["files"][SHARD]})), "names '/etc/hostname'"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_passed_over(tmp_path, kind):
    """The newest checkpoint is damaged: refused when asked for by step, else the one before it is loaded with a warning."""
    damage, reason = DAMAGE[kind]
    store = _saved(tmp_path)
    damage(tmp_path / "step-00000002")
    assert reason in find_damage(tmp_path / "step-00000002") and find_damage(tmp_path / "step-00000001") is None
    loaded = _zeros()
    with pytest.warns(UserWarning, match="step-00000002 is damaged: .*trying the one before it"):
        assert store.load(loaded) == {"step": 1}
    _assert_equal(loaded, 1)
    assert reason in store.damaged[2]
    for refuse in (lambda: store.load(_zeros(), step=2), lambda: store.read_full(2)):
        with pytest.raises(ValueError, match="step-00000002 is damaged") as caught:
            refuse()
        assert reason in str(caught.value)
    store.save(2, _values(2), {"step": 2}, wait=True)  # the run comes by again: a whole one takes the damaged one's place
    assert store.load(_zeros()) == {"step": 2} and not store.damaged


def test_only_damaged_ones(tmp_path):
    """Every reason is in the error."""
    store = _saved(tmp_path)
    for step in (1, 2):
        _flip(tmp_path / f"step-{step:08d}" / SHARD)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=f"no whole checkpoint in {tmp_path}: step 2: {SHARD} .*; step 1: {SHARD} "):
        store.load(_zeros())


def test_parts_that_do_not_cover_a_tensor(tmp_path):
    """A header that leaves a hole, under a manifest that agrees with it, is refused: the hole would keep what was in memory."""
    store = _saved(tmp_path, [1])
    path = tmp_path / "step-00000001" / SHARD
    tensors = load_file(path)
    offsets = {n: {"saved_offsets": [0] * t.dim()} for n, t in tensors.items()}
    offsets["model.norm.weight"]["saved_offsets"] = [2]
    save_file(tensors, path, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
    _edit(path.parent, lambda m: m["files"][SHARD].update(checkpoint._entry(path)))
    for refuse in (lambda: store.load(_zeros()), lambda: store.read_full(1)):
        with pytest.raises(ValueError, match=r"the parts of model.norm.weight have 6 elements, its shape \(8,\) 8"):
            refuse()


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_a_pickle_is_never_opened(tmp_path):
    """DCP's own index is a pickle; one that a stranger put there, or one named as a shard, does not run."""
    store, mark = _saved(tmp_path / "run"), tmp_path / "executed"
    bomb = pickle.dumps(_Bomb(mark))
    for name in (".metadata", ".0.metadata"):
        (tmp_path / "run" / "step-00000002" / name).write_bytes(bomb)
    loaded = _zeros()
    assert store.load(loaded) == {"step": 2}
    _assert_equal(dict(store.read_full(2)), 2)
    folder = tmp_path / "run" / "step-00000002"
    (folder / SHARD).write_bytes(bomb)
    _edit(folder, lambda m: m["files"][SHARD].update(checkpoint._entry(folder / SHARD)))
    for refuse in (lambda: store.load(_zeros(), step=2), lambda: store.read_full(2)):
        with pytest.raises(ValueError, match="headers of its files can't be read"):
            refuse()
    assert not mark.exists()
    pickle.loads(bomb).close()
    assert mark.exists()  # it would have


# --------------------------------------------------------------------------------------------------------------- several ranks


def _damage_and_share(rank, world, folder):
    store = Checkpoints(folder, _config())
    for step in (1, 2, 3):
        store.save(step, _on_mesh((1, world), _values(step)), {"step": step})
    store.wait()
    if rank == 0:
        _flip(folder / "step-00000003" / f"rank{world - 1:05d}-001.safetensors")
    dist.barrier()
    tensors = _on_mesh((1, world), _zeros())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert store.load(tensors) == {"step": 2}
    assert [rank == 0] == [any("step-00000003 is damaged" in str(w.message) for w in caught)]
    assert "another checksum" in store.damaged[3]
    _assert_equal(tensors, 2)
    wrong = tensors | ({"only.here": torch.zeros(1)} if rank == world - 1 else {})
    with pytest.raises(ValueError, match="not in the checkpoint: only.here"):  # on all ranks, though only one asks for it
        store.load(wrong)

    newer = _on_mesh((1, world), _values(4))
    if rank == world - 1:  # one rank can't write: every rank must hear of it, and none may wait for ever
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    store.save(4, newer, {"step": 4})
    with pytest.raises(OSError, match=f"step-00000004: rank {world - 1}: File too large") as error:
        store.wait()
    assert error.value.errno == errno.EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.wait()  # told once
    if rank == 0:
        assert [p.name for p in sorted(folder.iterdir())] == ["step-00000002", "step-00000003"]
    dist.barrier()  # the next save is not to begin before rank 0 has looked
    store.save(4, newer, {"step": 4}, wait=True)
    assert store.load(tensors) == {"step": 4}
    _assert_equal(tensors, 4)
    store.close()

    file = folder.parent / "file"  # only rank 0 makes the folder, so only rank 0 sees that it can't be made
    file.touch()
    store = Checkpoints(file / "run", _config())
    store.save(5, newer, {})
    with pytest.raises(OSError, match="step-00000005: Not a directory"):
        store.close()


def test_ranks_agree(tmp_path):
    """Damage in one rank's file, a wrong name on one rank, a full disk on one rank: the same outcome on all of them."""
    _run(tmp_path, 3, _damage_and_share, tmp_path / "run")


# -------------------------------------------------------------------------------------------------------------- full disk


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    """On a real file system of 300 KiB: OSError with path and reason, the old checkpoint loads, no temporary folder is left."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        store = Checkpoints(disk / "run", _config())
        store.save(1, {"x": torch.ones(30_000)}, {}, wait=True)
        store.save(2, {"x": torch.ones(60_000)}, {})
        with pytest.raises(OSError, match="step-00000002: No space left on device") as caught:
            store.save(3, {"x": torch.ones(10)}, {})
        assert caught.value.errno == errno.ENOSPC
        assert [p.name for p in (disk / "run").iterdir()] == ["step-00000001"]
        x = {"x": torch.zeros(30_000)}
        store.load(x)
        assert (x["x"] == 1).all()
        store.save(3, {"x": torch.ones(10)}, {}, wait=True)
        assert store.steps() == [1, 3]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_can_not_be_made(tmp_path):
    """The error has the path and the reason, at once or, from the thread, at the next call."""
    (tmp_path / "file").write_text("")
    store = Checkpoints(tmp_path / "file" / "run", _config())
    with pytest.raises(OSError, match="step-00000001: Not a directory: .*file/run"):
        store.save(1, _values(), {}, wait=True)
    store.save(1, _values(), {})
    with pytest.raises(NotADirectoryError):
        store.close()


def test_left_overs_are_swept_by_the_next_writer_only(tmp_path):
    """A reader leaves `.tmp` alone (a live run may be writing it); the first save of a new run removes it."""
    _saved(tmp_path, [1])
    (tmp_path / "step-00000002.tmp").mkdir()
    reader = Checkpoints(tmp_path, _config())
    reader.load(_zeros())
    assert (tmp_path / "step-00000002.tmp").is_dir() and reader.steps() == [1]
    reader.save(3, _values(), {}, wait=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


# ------------------------------------------------------------------------------------------------------------------------ kill


def _save_until_event(folder: Path, last: int, done) -> None:
    """Saves step 3 and dies, as by kill -9, at the last-th thing it does to a file in the folder."""
    store = Checkpoints(folder, _config(keep_last=2, asynchronous=False))
    count = 0

    def hook(event: str, args) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir") and str(folder) in str(args[0]):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    store.save(3, _values(3), {"step": 3})
    done.set()


def test_killed_at_every_file_operation(tmp_path):
    """Whatever operation of a save (retention and the sweep of an earlier kill's left-overs included) is the last, all that has a final name
    is whole, the newest is the old or the new one, and the next save cleans up."""
    start = tmp_path / "start"
    _saved(start, [1, 2])
    (start / "step-00000009.tmp").mkdir()
    shutil.copy(start / "step-00000001" / SHARD, start / "step-00000009.tmp")
    newest, events = set(), 0
    for last in range(1, 200):
        folder = tmp_path / f"run-{last}"
        shutil.copytree(start, folder)
        done = _context.Event()
        process = _context.Process(target=_save_until_event, args=(folder, last, done))
        process.start()
        process.join(SECONDS)
        if done.is_set():
            break
        assert process.exitcode == -signal.SIGKILL
        events = last
        steps = find_steps(folder)
        assert [find_damage(folder / f"step-{s:08d}") for s in steps] == [None] * len(steps) and len(steps) >= 2
        loaded, store = _zeros(), Checkpoints(folder, _config(keep_last=2))
        assert store.load(loaded) == {"step": max(steps)}
        _assert_equal(loaded, max(steps))
        newest.add(max(steps))
        store.save(4, _values(4), {}, wait=True)
        assert not list(folder.glob("*.tmp"))
        shutil.rmtree(folder)
    assert process.exitcode == 0 and events > 15 and newest == {2, 3}, (process.exitcode, events, newest)


def _save_for_ever(rank, world, folder):
    store = Checkpoints(folder, _config(keep_last=2))
    for step in range(1, 10_000):
        store.save(step, _on_mesh((1, world), _values(step)), {"step": step})


def test_ranks_killed_while_they_save(tmp_path):
    """Two ranks save without pause and are killed -9, at eight random moments: all that is there is whole and loads."""
    draw, highest = random.Random(0), 0
    folder = tmp_path / "run"
    for _ in range(8):
        ranks, _ = _start(tmp_path, 2, _save_for_ever, folder)
        before, end = len(find_steps(folder)) and max(find_steps(folder)), time.monotonic() + SECONDS
        while (max(find_steps(folder), default=0) == before) and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.1))
        for process in ranks:
            os.kill(process.pid, signal.SIGKILL)
        for process in ranks:
            process.join()
        steps = find_steps(folder)
        assert [find_damage(folder / f"step-{s:08d}") for s in steps] == [None] * len(steps) and steps
        loaded = _zeros()
        newest = Checkpoints(folder, _config()).load(loaded)["step"]
        assert newest == max(steps)
        _assert_equal(loaded, newest)
        highest = max(highest, newest)
        if draw.random() < 0.5:
            shutil.rmtree(folder)
    assert highest > 1
