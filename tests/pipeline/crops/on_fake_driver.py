"""Loads the crop kernel with the real cuda.bindings on a stand-in for the driver, and checks its crops; see test_fused.py."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch

from pipeline.crops import cubin
from pipeline.crops.fused import self_check

if __name__ == "__main__":
    event = SimpleNamespace(record=lambda _: None, query=lambda: True, synchronize=lambda: None)
    torch.cuda.device = lambda _: nullcontext()
    torch.cuda.current_stream = lambda *_: SimpleNamespace(cuda_stream=0x1234)
    torch.cuda.Event = lambda: event
    for limit in (1_000, 100_000, 232_448):  # crops of no, one and both sizes fit
        gpu = SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=limit)
        torch.cuda.get_device_properties = lambda _, gpu=gpu: gpu
        self_check((224, 96), cubin.CropKernel(torch.device("cpu")))
    print("equal")
