"""The memory of a GPU for tests marked gpu: of a real one with --gpu, and otherwise of the fake driver's."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import tvm_ffi
from cuda_driver import stream


class FakeMemory:
    """A FakeDriver's, as pa_compiler.verification.on_gpu.Memory."""

    def __init__(self, gpu) -> None:
        self._gpu = gpu

    def put(self, array, pad=0):
        """A copy with pad elements between its rows."""
        whole = np.zeros((*array.shape[:-1], array.shape[-1] + pad), array.dtype)
        view = whole[..., : array.shape[-1]]
        view[...] = array
        return self._gpu.tensor(view)

    def get(self, tensor):
        """What is there."""
        return tensor.array.copy()

    def set(self, tensor, array):
        """Other contents."""
        tensor.array[...] = array

    def synchronize(self):
        """Run what is on the streams; a kernel's fault is an error."""
        self._gpu.run()
        self._gpu.log()

    @contextlib.contextmanager
    def captured(self):
        """Calls go into the graph."""
        with stream(5):
            self._gpu.capture(5, True)
            yield
            self._gpu.capture(5, False)

    def replay(self):
        """Run the graph."""
        self._gpu.replay()


def real_memory():
    """That of the first GPU, by torch.

    Raises:
        pytest.UsageError: there is none.
    """
    import torch

    from pa_compiler.verification.on_gpu import TorchMemory

    if not torch.cuda.is_available():
        raise pytest.UsageError("--gpu: expected a GPU that torch can use, and there is none")

    class RealMemory(TorchMemory):
        def put(self, array, pad=0):
            return super().put(array, pad)

        def set(self, tensor, array):
            tensor.copy_(self.put(array))

        @contextlib.contextmanager
        def captured(self):
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                capturing = torch.cuda.current_stream().cuda_stream
                with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda:0"), capturing):
                    yield

        def replay(self):
            self.graph.replay()

    return RealMemory("cuda:0")


def arch():
    """The architecture of the first GPU, as "sm_90"."""
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    return f"sm_{major}{minor}"
