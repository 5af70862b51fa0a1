"""Runs the source of csrc/cuda/*.cu on the CPU, for tests on machines without a GPU.

    python -m tests.emulation                        the operators, the experts and the layer over the emulated kernels
    python -m tests.emulation tests/test_ops.py -k permute
    MOETRAIN_EMULATION_SEED=7 python -m tests.emulation

rewrite.py turns launches and shared memory into C++, all else of the text is compiled as it is, against include/ instead of the toolkit.
build.py makes moetrain._C of csrc/*.cpp and the kernels, which forward.cpp puts under the operators' CPU names. machine.cpp runs a launch.

What it finds, each as an exception with the kernel and the thread, and nearly always with the line:

* wrong indices, packing, tails, strides, masks, shuffles: the values are the kernels' own;
* a __syncthreads, __syncwarp or collective that not all threads named reach (also one that has ended, which hardware forgives in some cases), a
  lane that is not in the mask, or waiting without end;
* data races in global and shared memory: two threads of a launch touch a byte, one writes, and no barrier is between (races.h). What a race
  could change is not needed for it to be found;
* dependence on order: blocks (up to three at once) and threads run in an order drawn from a seed, and the bits must be the same for each seed;
* misaligned vector accesses, indices past a local array, shifts by too much, signed overflow; launches with shapes that no device takes;
* with AddressSanitizer's library preloaded, as `environment` does where GCC has it: accesses outside a tensor or a variable in shared memory. Fresh
  memory is then full of 0xff (NaN, -1), so that a result which was never written shows.

What it can't find: anything about speed, occupancy or registers; the memory model (here every access is done when the next begins, so a missing
__threadfence is not missed); bugs that need real timing or real warps that run in step; how the compiler for the device rounds (sums and products are
fused as it likes here too, exp is the host's); the toolkit's own parts (the scan is another one here); a CUDA_CHECK_LAUNCH that was forgotten (a
wrong launch throws by itself); two kernels that run at once, because each launch ends before the next.
"""
