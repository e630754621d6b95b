"""HiNM sparsity for PyTorch and Lightning: prune, permute, pack and run hierarchical N:M sparse layers."""

from lightning_hinm.gyro import gyro_permute
from lightning_hinm.layout import HiNMLayout
from lightning_hinm.mask import hinm_mask, retained
from lightning_hinm.pattern import HiNMPattern
from lightning_hinm.prune import prune

__all__ = ["HiNMLayout", "HiNMPattern", "gyro_permute", "hinm_mask", "prune", "retained"]
