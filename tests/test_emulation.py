"""Proves the source of csrc/cuda/*.cu, run on the CPU by tests/emulation: the operators, the experts and the layer give their references' values over
it. And that the emulator would tell: kernels that are wrong in one way each are reported, right ones give the right numbers."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.emulation import build, run
from tests.emulation.rewrite import rewrite

needs_compiler = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulation")


@needs_compiler
def test_operators_and_layer_over_the_emulated_kernels(cache: Path) -> None:
    """The tests of the operators, the experts and the layer, and emulated.py's own, in one process with the emulated extension."""
    library = build.extension(cache / "_C.abi3.so", cache)
    done = subprocess.run(run.words(["-q", "-x", "-rs"]), cwd=build.ROOT, env=run.environment(library), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "no float16" not in done.stdout, "the kernels for float16 are not left out"


# --- the rewriting of launches and shared memory ---


@pytest.mark.parametrize(
    "text, expected",
    [
        ("k<<<1, 2>>>(x);", '::emulator::launch("k", ::emulator::Config(1, 2), k, x);'),
        ("k<<<g(a, b[c >> 3]), dim3{1, 2}, 0, s>>>();", '::emulator::launch("k", ::emulator::Config(g(a, b[c >> 3]), dim3{1, 2}, 0, s), k);'),
        ("if (x) n::k<decltype(z), (a > b)>\n    <<<1,\n2>>>\n(f(x), y);",
         'if (x) ::emulator::launch("n::k<decltype(z), (a > b)>", ::emulator::Config(1,\n2), n::k<decltype(z), (a > b)>\n    , f(x), y);'),
        ("k<A<B>, C><<<1, 2>>>(x); k2<<<1, 2>>>(y);",
         '::emulator::launch("k<A<B>, C>", ::emulator::Config(1, 2), k<A<B>, C>, x); ::emulator::launch("k2", ::emulator::Config(1, 2), k2, y);'),
        ("// k<<<1, 2>>>(x)\n\"k<<<1>>>(x)\" 1'000 /* k<<<( */ k<<<')', 2>>>(x)",
         "// k<<<1, 2>>>(x)\n\"k<<<1>>>(x)\" 1'000 /* k<<<( */ ::emulator::launch(\"k\", ::emulator::Config(')', 2), k, x)"),
        ("a >> b << c; x<y<<z>>w;", "a >> b << c; x<y<<z>>w;"),
        ("__shared__ float t[4][N + 1];",
         "typedef float t_shared[4][N + 1]; t_shared& t = *static_cast<t_shared*>(::emulator::shared(1, sizeof(t_shared)));"),
        ("__shared__ unsigned long *p;",
         "typedef unsigned long * p_shared; p_shared& p = *static_cast<p_shared*>(::emulator::shared(1, sizeof(p_shared)));"),
        ("extern __shared__ __align__(16) char t[];", "char* const t = static_cast<char*>(::emulator::dynamic_shared());"),
        ("// __shared__\n", "// __shared__\n"),
    ],
)  # fmt: skip
def test_rewrite(text: str, expected: str) -> None:
    assert rewrite(text, "a.cu") == f'#line 1 "a.cu"\n{expected}'


@pytest.mark.parametrize(
    "text, message",
    [
        ("\nk<<<1, 2>>;", "a.cu:2: this launch can't be read"),
        ("k<<<(1, 2>>>(x);", "a.cu:1: this launch can't be read"),
        ("k<<<1, 2>>>;", "a.cu:1: this launch can't be read"),
        ("<<<1, 2>>>(x)", "a.cu:1: this launch can't be read"),
        ("__shared__ int a, b;", "a.cu: a variable in shared memory must be declared alone"),
        ("__shared__ int a; __shared__ int b;", "a.cu: a variable in shared memory must be declared alone"),
    ],
)
def test_rewrite_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        rewrite(text, "a.cu")


def test_rewrite_leaves_every_line_of_the_kernels_in_its_place() -> None:
    for path in (build.CSRC / "cuda").glob("*.cu"):
        text, found = path.read_text(encoding="utf-8"), rewrite(path.read_text(encoding="utf-8"), path.name)
        assert "<<<" not in found and found.count("::emulator::launch(") == text.count("<<<") > 0
        before, after = text.splitlines(), found.splitlines()[1:]
        assert len(before) == len(after)
        assert sum(a != b for a, b in zip(before, after)) <= 2 * text.count("<<<")


# --- the emulator itself ---


class Dim3(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in "xyz"]


class Snippets:
    """The kernels of snippets.cu, on int32 arrays."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulator_seed.argtypes = [ctypes.c_uint64]
        self.library.emulator_patience.argtypes = [ctypes.c_double]

    def __call__(self, name: str, data: np.ndarray, n: int = 0, grid=(1, 1, 1), block=(32, 1, 1), shared: int = 0) -> str | None:
        """What went wrong, or None."""
        assert data.flags.c_contiguous and data.itemsize == 4
        function = self.library[f"{name}_"]
        function.restype = ctypes.c_char_p
        function.argtypes = [ctypes.c_void_p, ctypes.c_int, Dim3, Dim3, ctypes.c_size_t]
        text = function(data.ctypes.data, n, Dim3(*grid), Dim3(*block), shared)
        return text.decode() if text is not None else None


@pytest.fixture(scope="session")
def snippets(cache: Path) -> Snippets:
    if problem := build.why_not():
        pytest.skip(problem)
    return Snippets(build.library([build.HERE / "snippets.cu"], cache / "snippets.so", cache))


def zeros(size: int) -> np.ndarray:
    """int32, aligned to 16 bytes."""
    memory = np.zeros(size + 3, np.int32)
    return memory[-(memory.ctypes.data // 4) % 4 :][:size]


# name: (what is said of it, n, grid, block)
WRONG = {
    "missing_barrier": (r"(reads|writes) 4 bytes at .*snippets.cu:17.*, a race with block \(0, 0, 0\) thread \(", 0, 1, 64),
    "missing_warp_barrier": (r"snippets.cu:2[245].*, a race with block \(0, 0, 0\)", 0, 1, 32),
    "missing_second_barrier": (r"snippets.cu:(33|35).*, a race with block \(0, 0, 0\)", 0, 1, 64),
    "race_of_blocks": (r"writes 4 bytes at .*snippets.cu:40.*, a race with block \(", 0, 2, 1),
    "race_with_atomic": (r"writes 4 bytes at .*snippets.cu:4[34].*, a race with block \(0, 0, 0\)", 0, 1, 32),
    "barrier_of_some": ("__syncthreads", 0, 1, 32),
    "barrier_after_return": ("__syncthreads", 31, 1, 32),
    "different_collectives": ("nobody can go on: .* waits at __ballot_sync with mask 0xffffffff, as do 15 others; .* at __shfl_down_sync", 0, 1, 32),
    "collective_of_some": ("(but lane 31 has ended|ends while lanes of its warp wait for it at __shfl_xor_sync)", 31, 1, 32),
    "waiting_for_each_other": ("nobody can go on: .* at __syncthreads, as do 47 others; .* at __syncwarp .*, as do 15 others", 0, 1, 64),
    "lane_outside_the_mask": ("reads lane (8|9|1.|2.), which is not in the mask 0x0000ffff", 0, 1, 32),
    "lane_out_of_range": ("__shfl_sync: lane 32 is outside a segment of 32", 0, 1, 32),
    "not_in_its_own_mask": ("__syncwarp with mask 0xfffffffe, which doesn't name its own lane 0", 0, 1, 32),
    "mask_of_missing_lanes": ("names lanes that the block doesn't have", 0, 1, 20),
    "misaligned": ("an access that needs an address aligned to 16 bytes, found 4 more at .*snippets.cu", 0, 1, 1),
    "past_a_local_array": ("an index out of an array's bounds at .*snippets.cu", 4, 1, 1),
    "shift_by_too_much": ("a shift by too much or of a negative number at .*snippets.cu", 32, 1, 1),
    "overflow": (r"a signed overflow of \+ at .*snippets.cu", 1, 1, 1),
    "other_thread_s_stack": ("which is on another thread's stack", 0, 1, 32),
    "spinning": ("spins and nothing changes", 0, 1, 32),
    "trapping": (r'block \(1, 0, 0\) thread \(3, 0, 0\): __trap after "seen 5"', 5, 2, 32),
    "no_blocks": (r"a grid of \(0, 1, 1\) blocks", 0, 0, 32),
    "too_many_threads": (r"a block of \(1025, 1, 1\) threads", 0, 1, 1025),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_reported(name: str, snippets: Snippets) -> None:
    """Whatever the order: under four seeds. Afterwards the emulator works as before."""
    said, n, grid, block = WRONG[name]
    snippets.library.emulator_patience(0.05)
    for seed in range(4):
        snippets.library.emulator_seed(seed)
        message = snippets("order" if name in ("no_blocks", "too_many_threads") else name, zeros(250), n, (grid, 1, 1), (block, 1, 1))
        assert message is not None and re.search(said, message), message
    data = np.arange(128, dtype=np.int32)
    assert snippets("warp_ring", data[:64], 0, (1, 1, 1), (64, 1, 1)) is None


@needs_compiler
def test_accesses_out_of_bounds_are_reported(snippets: Snippets) -> None:
    """With AddressSanitizer's library in the process: one element past the end, one before the start, one past an array in shared memory."""
    variables = run.sanitizer()
    if not variables:
        pytest.skip("GCC has no AddressSanitizer here")
    program = """if True:
        import sys, numpy as np
        from tests.test_emulation import Snippets
        run, data = Snippets(sys.argv[1]), np.zeros(4096, np.int32)
        assert run("past_the_end", data, 4096 - 32) is None and run("past_shared", data, 0) is None
        for name, n in [("past_the_end", 4096 - 31), ("past_the_end", -1), ("past_shared", 1)]:
            print(run(name, data, n))
    """
    environment = {**os.environ, **variables, "PYTHONPATH": str(build.ROOT)}
    done = subprocess.run([sys.executable, "-c", program, snippets.library._name], env=environment, cwd=build.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert re.search(r"writes 4 bytes at .*snippets.cu:\d+.*, out of bounds$", line), line


def test_a_result_that_depends_on_order_differs_between_seeds(snippets: Snippets) -> None:
    """Of blocks, of threads in a block, and of memory that nobody wrote; the same seed gives the same again."""
    for name, grid, block in [("order", 30, 1), ("order", 1, 30), ("unwritten", 1, 32)]:
        found = []
        for seed in (1, 2):
            snippets.library.emulator_seed(seed)
            data = np.zeros(32, np.int32)
            assert snippets(name, data, 0, (grid, 1, 1), (block, 1, 1)) is None
            found.append(data)
        assert not np.array_equal(*found), name
        if name == "order":
            assert all(sorted(f[1:31]) == list(range(30)) for f in found)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_right_kernels(seed: int, snippets: Snippets) -> None:
    """Barriers, shared memory, every collective and atomic, against what they are defined to give."""
    snippets.library.emulator_seed(seed)
    values = np.random.default_rng(0).integers(-1000, 1000, 128).astype(np.int32)

    data = np.concatenate([values[:100], np.zeros(5, np.int32)])
    assert snippets("block_sum", data, 100, (5, 1, 1), (128, 1, 1), shared=512) is None
    assert (data[100:] == values[:100].sum()).all()

    data = values[:64].copy()
    assert snippets("warp_ring", data, 0, (1, 1, 1), (64, 1, 1)) is None
    assert np.array_equal(data, np.concatenate([np.roll(values[:32], -8), np.roll(values[32:64], -8)]))

    lanes = np.arange(32)
    for width in (4, 8, 32):
        data = np.zeros(160, np.int32)
        assert snippets("shuffles", data, width) is None
        segment = lanes // width * width
        assert np.array_equal(data[:32], segment + 3)
        assert np.array_equal(data[32:64], np.where(lanes - 3 < segment, lanes, lanes - 3))
        assert np.array_equal(data[64:96], np.where(lanes + 3 >= segment + width, lanes, lanes + 3))
        assert np.array_equal(data[96:128], np.where((lanes ^ 5) >= segment + width, lanes, lanes ^ 5))
        assert np.array_equal(data[128:], 2 * np.minimum(lanes + 1, 31) + 1)

    data = np.zeros(96, np.int32)
    assert snippets("halves", data) is None
    assert (data[:16] == sum(range(16))).all() and np.array_equal(data[16:32], lanes[16:] + (lanes[16:] ^ 1))
    ballots = [sum(1 << i for i in half if i % 3 == 0) for half in (range(16), range(16, 32))]
    assert (data[32:48].view(np.uint32) == ballots[0]).all() and (data[48:64].view(np.uint32) == ballots[1]).all()
    assert (data[64:80] == 1).all() and (data[80:] == 2).all()

    data = np.array([7, -5, 5, 0, -1, 0, 0], np.int32)
    assert snippets("atomics", data, 0, (3, 1, 1), (40, 1, 1)) is None
    assert list(data) == [7 + sum(range(120)), 119, -119, -1, -1 << 16, 1, 77]

    data = np.zeros(2, np.int32)
    assert snippets("flags", data, 5, (1, 1, 1), (64, 1, 1)) is None
    assert list(data) == [5, 6]

    data = zeros(12 * 75)
    data[:300] = rows = np.arange(300)
    assert snippets("through_a_table", data, 75) is None
    even = np.arange(300) // 4 % 2 == 0
    assert np.array_equal(data, np.concatenate([rows, rows * even, rows * ~even]))

    data = np.zeros(64 * 12, np.int32)
    assert snippets("indices", data, 0, (3, 2, 2), (4, 8, 2)) is None
    assert (data == 32).all()


def test_half_and_bfloat16_convert_as_torch_does(snippets: Snippets) -> None:
    """Every one of the 65536 patterns to float, and to either type: every float that has a short mantissa, the middles between two neighbours, and
    what lies just beside. NaN to NaN."""
    patterns = np.arange(1 << 16, dtype=np.int32)
    n = len(patterns)
    data = np.concatenate([patterns, np.zeros(2 * n, np.int32)])
    assert snippets("from_half", data, n, (n // 1024, 1, 1), (1024, 1, 1)) is None
    bits = torch.from_numpy(patterns.astype(np.uint16).view(np.int16))
    floats = torch.from_numpy(data.view(np.float32))
    for found, dtype in ((floats[n : 2 * n], torch.float16), (floats[2 * n :], torch.bfloat16)):
        expected = bits.view(dtype).float()
        assert torch.equal(found.isnan(), expected.isnan())
        same = ~expected.isnan()
        assert torch.equal(found[same].view(torch.int32), expected[same].view(torch.int32)), "the sign of 0 too"
    # Both types' numbers, their middles (one bit more), and those by one unit of float32 up or down.
    tops = np.arange(1 << 16, dtype=np.uint32) << 16
    halves = bits.view(torch.float16).float().numpy().view(np.uint32)
    bases = np.concatenate([tops, tops + 0x8000, halves, halves + 0x1000, np.arange(0x33000000, 0x38800000, 0x3331, dtype=np.uint32)])
    x = np.unique(np.concatenate([bases, bases + np.uint32(1), bases - np.uint32(1)])).view(np.float32)
    x = np.concatenate([x, np.zeros(-len(x) % 1024, np.float32)])
    n = len(x)
    data = np.concatenate([x.view(np.int32), np.zeros(2 * n, np.int32)])
    assert snippets("to_half", data, n, (n // 1024, 1, 1), (1024, 1, 1)) is None
    for found, dtype in ((data[n : 2 * n], torch.float16), (data[2 * n :], torch.bfloat16)):
        expected = torch.from_numpy(x).to(dtype)
        nan = expected.isnan().numpy()
        assert (found[nan] == 0x7FFF).all()
        assert np.array_equal(found[~nan].astype(np.uint16), expected.view(torch.int16).numpy().view(np.uint16)[~nan])
