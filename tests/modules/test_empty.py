"""Tests of building modules without weights."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_lfr.checkpoint.config import build_parts
from nemo_lfr.modules.empty import on_meta_device
from tests.models import codec_config


class Recorded(TorchDispatchMode):
    """Record the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_modules_on_the_meta_device_are_not_initialized():
    state = torch.get_rng_state()
    for weight_norm in (True, False):
        with on_meta_device(), Recorded() as recorded:
            parts = build_parts(codec_config(), weight_norm=weight_norm)
        assert all(value.is_meta for module in parts.named().values() for value in module.parameters())
        assert "empty" in recorded.names and not {"uniform_", "uniform"} & recorded.names
    assert torch.equal(torch.get_rng_state(), state)
