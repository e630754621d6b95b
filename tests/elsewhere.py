"""A device that is not there: tensors whose numbers lie on the CPU, but count as lying elsewhere.

``elsewhere`` puts a tensor there; ``Elsewhere`` is the context in which it can be used. As on a GPU, an operation on
tensors of two devices fails, unless the one on the CPU is a single number or an index, and numbers have to be brought
over to be looked at: what was is in ``left``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
DEVICE = torch.device("meta")  # one that every build of torch has, and that computes nothing by itself
MIXES = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class _Wrapped(Tensor):
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "_Wrapped":
        wrapped: _Wrapped = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=DEVICE
        )
        wrapped.inner = inner
        return wrapped

    def __repr__(self) -> str:  # type: ignore[override]
        return f"elsewhere({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func}: a tensor elsewhere is used outside of the context Elsewhere()")


def elsewhere(tensor: Tensor) -> Tensor:
    """A copy that lies elsewhere."""
    return _Wrapped(tensor.clone())


class Elsewhere(TorchDispatchMode):
    """Computes what is elsewhere, and writes down what leaves: the shapes of tensors, ``()`` for a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled():  # where an operation arrives that is made of others, and views are none
            with self, torch.inference_mode(False):
                result = func.decompose(*args, **kwargs or {})
            if result is not NotImplemented:
                return result
        with torch.inference_mode(False):
            return self._compute(func, args, dict(kwargs or {}))

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        away = [tensor for tensor in tensors if isinstance(tensor, _Wrapped)]
        wanted = kwargs.get("device")
        if not away and wanted != DEVICE:
            return func(*args, **kwargs)
        moves = func is aten._to_copy.default and wanted is not None
        here = [tensor for tensor in tensors if not isinstance(tensor, _Wrapped) and tensor.dim()]
        if away and here and func not in MIXES and func is not aten.copy_.default:
            raise RuntimeError(f"{func}: tensors of two devices: {tensors}")
        wrapped = {id(tensor.inner): tensor for tensor in away}
        inner_args, inner_kwargs = tree_map(
            lambda leaf: leaf.inner if isinstance(leaf, _Wrapped) else leaf, (args, kwargs)
        )
        if wanted is not None:
            inner_kwargs["device"] = torch.device("cpu")
        result = func(*inner_args, **inner_kwargs)
        comes_back = moves and wanted != DEVICE
        comes_back |= func is aten.copy_.default and not isinstance(args[0], _Wrapped)
        if func is aten._local_scalar_dense.default or (comes_back and away):
            self.left.append(tuple(away[0].shape))
        if comes_back:
            return result

        def wrap(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return wrapped[id(leaf)] if id(leaf) in wrapped else _Wrapped(leaf)

        return tree_map(wrap, result)
