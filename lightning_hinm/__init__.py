"""HiNM sparsity for PyTorch and Lightning: prune, permute, pack and run hierarchical N:M sparse layers."""

from typing import TYPE_CHECKING, Any

from lightning_hinm.backend import repack
from lightning_hinm.explain import explain
from lightning_hinm.format import HiNMWeight, load_layouts, pack, unpack
from lightning_hinm.gyro import gyro_permute
from lightning_hinm.layout import HiNMLayout
from lightning_hinm.mask import hinm_mask, retained
from lightning_hinm.modules import to_hinm
from lightning_hinm.pattern import HiNMPattern
from lightning_hinm.prune import prune
from lightning_hinm.schedule import GradualSchedule
from lightning_hinm.store import load_hinm, save_hinm
from lightning_hinm.streams import shared_orders

if TYPE_CHECKING:
    from lightning_hinm.callback import HiNMPruning

__all__ = [
    "GradualSchedule",
    "HiNMLayout",
    "HiNMPattern",
    "HiNMPruning",
    "HiNMWeight",
    "explain",
    "gyro_permute",
    "hinm_mask",
    "load_hinm",
    "load_layouts",
    "pack",
    "prune",
    "repack",
    "retained",
    "save_hinm",
    "shared_orders",
    "to_hinm",
    "unpack",
]


def __getattr__(name: str) -> Any:
    # PEP 562: inference imports no Lightning.
    if name == "HiNMPruning":
        from lightning_hinm.callback import HiNMPruning

        return HiNMPruning
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
