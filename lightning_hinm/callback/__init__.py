"""Pruning during a Lightning training: when to search, when to enforce, what to save."""

from lightning_hinm.callback.pruning import Choice, HiNMPruning

__all__ = ["Choice", "HiNMPruning"]
