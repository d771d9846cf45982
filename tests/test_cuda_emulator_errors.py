"""The emulator: what a kernel may not do ends its launch with an error that says who did what where."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_emulator import ORDERS, PARTS, EmulationError
from cuda_text import UnknownTextError

pytestmark = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(scope="module")
def kernels(emulated):
    return emulated((PARTS / "kernels.cu").read_text())


def test_poisoned_shared_memory_is_nan(kernels, order):
    out = np.zeros(32, np.float32)
    kernels["reads_poison"].launch(1, 32, 256, out, order=order)
    assert np.isnan(out).all()


@pytest.mark.parametrize("wait", [0, 1, 2])
def test_wait_of_a_copy(kernels, order, wait):
    words, out = np.arange(128, dtype=np.uint32), np.zeros(32, np.uint32)
    if wait == 0:
        kernels["waits"].launch(1, 32, 512, words, out, wait, order=order)
        np.testing.assert_array_equal(out.sum(), words.sum())
        return
    with pytest.raises(EmulationError, match=r"reads 16 bytes at byte 0 .* cp\.async of thread 0 is in flight"):
        kernels["waits"].launch(1, 32, 512, words, out, wait, order=order)


def test_wait_is_one_threads_own(kernels, order):
    with pytest.raises(EmulationError, match=r"race: it .* of shared memory, which thread .* with no barrier between"):
        kernels["waits_alone"].launch(1, 32, 512, np.zeros(128, np.uint32), np.zeros(32, np.uint32), order=order)


@pytest.mark.parametrize(("kernel", "barrier"), [("exchanges", 0), ("exchanges", 2), ("overwrites", 0)])
def test_missing_barrier(kernels, order, kernel, barrier):
    """Another thread's access, whichever of the two came first."""
    with pytest.raises(EmulationError, match=r"race: it (reads|writes) 4 bytes .* (read|wrote) with no barrier"):
        kernels[kernel].launch(1, 64, 0, np.zeros(64, np.int32), barrier, order=order)


@pytest.mark.parametrize(("kernel", "factor", "offset"), [("exchanges", 1, 0), ("overwrites", 4, 6)])
def test_barriers_that_suffice(kernels, order, kernel, factor, offset):
    out = np.zeros(64, np.int32)
    kernels[kernel].launch(3, 64, 0, out, 1, order=order)
    np.testing.assert_array_equal(out, factor * (63 - np.arange(64)) + offset)


def test_writes_of_the_same(kernels, order):
    """A race by the PTX ISA's memory model, whatever hardware does."""
    with pytest.raises(EmulationError, match=r"race: it writes 4 bytes .* which thread \d+ wrote with no barrier"):
        kernels["agrees"].launch(1, 64, 0, np.zeros(64, np.int32), order=order)


@pytest.mark.parametrize("writes_first", [0, 1])
def test_constant_load_of_what_is_written(kernels, order, writes_first):
    words, out = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    with pytest.raises(EmulationError, match=r"from, which the kernel both writes and reads by ld\.global\.nc"):
        kernels["rereads"].launch(1, 32, 0, words, out, writes_first, order=order)


def test_endless_loop(kernels, order):
    kind = ORDERS.index(order)
    with pytest.raises(EmulationError, match=r"no end: \d+ accesses and warp-wide instructions in a block"):
        kernels["waits_for_ever"].launch(1, 32, 0, np.zeros(1, np.int32), kind, order=order)


def test_deadlock(kernels, order):
    with pytest.raises(EmulationError) as error:
        kernels["divergent_barrier"].launch(1, 64, 0, np.zeros(64, np.int32), order=order)
    assert str(error.value) == (
        "divergent_barrier, block (0, 0, 0), deadlock: warp 0, lanes 0-31: at barrier 0; warp 1, lanes 0-7: at "
        "barrier 0; warp 1, lanes 8-30: at its end; warp 1, lanes 31-31: at barrier 3"
    )


def test_lane_that_left(kernels, order):
    with pytest.raises(EmulationError, match=r"deadlock: warp 0, lanes 0-6: at movmatrix; .* lanes 7-7: at its end"):
        kernels["leaves_early"].launch(1, 32, 0, np.zeros(32, np.int32), order=order)


def test_divergence(kernels, order):
    with pytest.raises(EmulationError, match=r"at (ldmatrix\.x4|movmatrix), and lane \d+ of its warp at (ldm|movm)"):
        kernels["divergent_instructions"].launch(1, 32, 512, np.zeros(32, np.uint32), order=order)


@pytest.mark.parametrize(
    ("first", "step", "message"),
    [
        (1, 1, r"thread 31 .* reads 4 bytes at byte 128 of in, which has 128"),
        (-1, 1, r"thread 0 .* reads 4 bytes at byte -4 of in, which has 128"),
        (0, 1 << 40, r"reads 4 bytes at byte \d+ of"),
    ],
)
def test_access_outside(kernels, order, first, step, message):
    with pytest.raises(EmulationError, match=message):
        kernels["touches"].launch(1, 32, 0, np.zeros(32, np.int32), np.zeros(32, np.int32), first, step, order=order)


def test_access_of_a_strided_view(kernels, order):
    """What lies between a view's first and last element may be used, and nothing else."""
    whole, out = np.arange(100, dtype=np.int32), np.zeros(32, np.int32)
    kernels["touches"].launch(1, 32, 0, whole[5:100:3], np.zeros(94, np.int32), 0, 3, order=order)
    kernels["touches"].launch(1, 32, 0, whole[31::-1], out[::-1], 0, -1, order=order)
    np.testing.assert_array_equal(out, whole[:32])
    with pytest.raises(EmulationError, match="reads 4 bytes at byte 376 of in, which has 376"):
        kernels["touches"].launch(1, 32, 0, whole[5:99:3], np.zeros(100, np.int32), 1, 3, order=order)


def test_the_nearest_array_is_named(kernels, order):
    """What follows a long array is nearer to its end than to where it starts."""
    whole = np.zeros(200, np.int32)
    with pytest.raises(EmulationError, match="reads 4 bytes at byte 376 of in, which has 376"):
        kernels["touches"].launch(1, 32, 0, whole[:94], whole[100:195], 63, 1, order=order)


def test_write_to_a_read_only_array(kernels, order):
    out = np.zeros(32, np.int32)
    out.flags.writeable = False
    with pytest.raises(EmulationError, match="writes 4 bytes at byte 0 of out, which is read-only"):
        kernels["touches"].launch(1, 1, 0, np.zeros(32, np.int32), out, 0, 1, order=order)


def test_access_outside_of_shared_memory(kernels, order):
    with pytest.raises(
        EmulationError, match=r"thread 63 .* writes 4 bytes at byte 256 of shared memory, which has 256"
    ):
        kernels["leaves_shared"].launch(1, 64, 256, np.zeros(1, np.float32), order=order)


@pytest.mark.parametrize("offset", [1, 2])
def test_misaligned_access(kernels, order, offset):
    words, out = np.zeros(132, np.uint32), np.zeros(256, np.uint32)
    with pytest.raises(EmulationError, match=r"misaligned: it reads 16 bytes at 0x"):
        kernels["loads"].launch(1, 32, 0, words, out, offset, order=order)


def test_misaligned_vector(emulated, order):
    """By a pointer of C++."""
    kernel = emulated(
        'extern "C" __global__ void copy(float* from, float* to) { *(float4*)to = *(float4*)(from + threadIdx.x); }'
    )["copy"]
    kernel.launch(1, 1, 0, np.zeros(8, np.float32), np.zeros(8, np.float32), order=order)
    with pytest.raises(EmulationError, match=r"thread [13] .*misaligned: 0x\w+ at line 1 is not a multiple of 16"):
        kernel.launch(1, 4, 0, np.zeros(8, np.float32), np.zeros(8, np.float32), order=order)


def test_unknown_instruction(emulated, order):
    text = 'extern "C" __global__ void k(float* x) { asm volatile("tanh.approx.f32 %0, %1;" : "=f"(*x) : "f"(*x)); }'
    with pytest.raises(UnknownTextError, match="tanh_approx_f32"):
        emulated(text)


def test_arguments(kernels, order):
    kernel, x = kernels["touches"], np.zeros(32, np.int32)
    with pytest.raises(TypeError, match="in is an array of int32, not float32"):
        kernel.launch(1, 32, 0, x.astype(np.float32), x, 0, 1, order=order)
    with pytest.raises(TypeError, match="touches takes 4 arguments, not 3"):
        kernel.launch(1, 32, 0, x, x, 0, order=order)
    with pytest.raises(ValueError, match="block: 64 threads, where the kernel is bound to 32"):
        kernel.launch(1, 64, 0, x, x, 0, 1, order=order)
    with pytest.raises(ValueError, match="shared_bytes: 232449"):
        kernel.launch(1, 32, 232449, x, x, 0, 1, order=order)
