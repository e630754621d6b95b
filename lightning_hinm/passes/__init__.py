"""Graph rewrites on what Dynamo hands to a backend: each pass keeps what the graph computes, or does nothing."""

from lightning_hinm.passes.absorb import OrderFate, absorb_orders_pass, find_streams, orders_of
from lightning_hinm.passes.fold import find_norm_calls, fold_norm, fold_norms_pass
from lightning_hinm.passes.fuse import fuse_activations_pass
from lightning_hinm.passes.islands import contexts_of, feature_major_islands_pass
from lightning_hinm.passes.sparsify import (
    LayerCall,
    find_calls,
    find_fused_calls,
    find_layer_calls,
    lift_tensors_pass,
    seen_shape,
    sparsify_layers_pass,
    unfuse_encoder_layers_pass,
)

__all__ = [
    "LayerCall",
    "OrderFate",
    "absorb_orders_pass",
    "contexts_of",
    "feature_major_islands_pass",
    "find_calls",
    "find_fused_calls",
    "find_layer_calls",
    "find_norm_calls",
    "find_streams",
    "fold_norm",
    "fold_norms_pass",
    "fuse_activations_pass",
    "lift_tensors_pass",
    "orders_of",
    "seen_shape",
    "sparsify_layers_pass",
    "unfuse_encoder_layers_pass",
]
