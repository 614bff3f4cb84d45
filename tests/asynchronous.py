"""A watch on what would make the host wait for a device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Asynchronous(TorchDispatchMode):
    """Refuses what would wait for a device: numbers read back, and shapes that depend on values."""

    refused = ("_local_scalar_dense", "bincount", "nonzero", "masked_select", "unique", "item", "is_nonzero", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert name not in self.refused, f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            flags = [i.dtype for i in args[1] if i is not None]
            assert torch.bool not in flags and torch.uint8 not in flags, "a boolean index has a size that waits"
        return function(*args, **kwargs or {})
