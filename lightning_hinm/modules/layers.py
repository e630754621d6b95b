"""Layers that hold a packed weight and call one op.

Shapes: O rows, I columns, T tiles of V rows, P kept columns of a tile.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hinm.format import HiNMWeight, check_packed, unpack
from lightning_hinm.ops import EXPANDED, expand_all, form_of, hinm_conv2d, hinm_linear, holds_positions
from lightning_hinm.pattern import from_matrix, layer_kind

PACKED_TENSORS = ("values", "metadata", "vector_index", "output_order")


class Packing:
    """One state of a layer's packed tensors: which they are, and by which layout they lie.

    A layer has another one as soon as it holds other tensors, or the same by another layout. Whatever is compiled for
    the tensors of a layer is guarded by it; values that change in place are seen without.
    """


class HiNMLayer(nn.Module):
    """A packed weight as four buffers, and its bias.

    ``expansion``, ``expansion_metadata``, ``columns`` and ``restore`` are the same, decoded for the op on the layer's
    device (``ops.expand_all``). They are made with the layer, again whenever a ``state_dict`` is loaded or ``.to()``
    takes the layer to another device or dtype, and are never saved. Made at the first call instead, they would be a
    side effect that ``torch.compile`` and ``torch.export`` have to trace.

    Args:
        packed: the packed weight.
        bias: ``[O]``, or None.
        kind: of the layer that it replaces, as ``pattern.layer_kind`` tells.
        groups: channel groups of a convolution.

    Raises:
        ValueError: if ``packed`` breaks any rule of the packing.
    """

    values: Tensor
    metadata: Tensor
    vector_index: Tensor
    output_order: Tensor
    expansion: Tensor
    expansion_metadata: Tensor | None
    columns: Tensor
    restore: Tensor
    retained: float | None = None  # as in a layout; of what a state_dict brings it is not known

    def __init__(self, packed: HiNMWeight, bias: nn.Parameter | None, *, kind: str, groups: int = 1) -> None:
        super().__init__()
        self.kind, self.groups = kind, groups
        self.shape, self.pattern, self.retained = tuple(packed.shape), packed.pattern, packed.retained
        if not packed.values.is_meta:
            check_packed(packed, type(self).__name__, groups=groups)
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor)
        for name, expanded in expand_all(packed, groups=groups).items():
            self.register_buffer(name, expanded, persistent=False)
        self.register_parameter("bias", bias)
        self.packing = Packing()

    @property
    def packed(self) -> HiNMWeight:
        """The packed weight; its tensors are the layer's own buffers."""
        tensors = {name: self._buffers[name] for name in PACKED_TENSORS}
        return HiNMWeight(**tensors, shape=self.shape, pattern=self.pattern, retained=self.retained)  # type: ignore

    @property
    def expanded(self) -> dict[str, Tensor]:
        """What was decoded for the op; the layer's own buffers."""
        return {name: tensor for name in EXPANDED if (tensor := self._buffers[name]) is not None}

    @property
    def _form(self) -> str:
        """Of what is decoded, as ``ops.form_of`` names it."""
        if self.expansion_metadata is not None:
            return "fragments"
        return "positions" if holds_positions(self.expansion) else "tiles"

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """The op's tensors after ``x``."""
        names = (*PACKED_TENSORS, "bias", *EXPANDED)
        return tuple(getattr(self, name) for name in names)

    @property
    def weight(self) -> Tensor:
        """The dense masked weight, unpacked at each access: right for whoever reads it, but slow, and not trainable."""
        matrix = unpack(self.packed).flatten(1)
        shape = (self.shape[1], self.shape[0]) if self.kind == "hf_conv1d" else self.shape
        return from_matrix(matrix, self.kind, shape)

    @torch.no_grad()
    def repack(self, packed: HiNMWeight) -> None:
        """Takes another weight of the same shape and pattern, in place, so that compiled graphs see it.

        By another layout, the backend ``"hinm"`` compiles anew.

        Raises:
            ValueError: if ``packed`` is of another shape or pattern, or breaks any rule of the packing; then nothing
                has changed.
        """
        name = type(self).__name__
        if (tuple(packed.shape), packed.pattern) != (self.shape, self.pattern):
            raise ValueError(
                f"{name}: the packed weight is {list(packed.shape)} of {packed.pattern}, but the layer's is "
                f"{list(self.shape)} of {self.pattern}. Make a new layer of it."
            )
        if not packed.values.is_meta:
            check_packed(packed, name, groups=self.groups)
        self.take(packed)

    @torch.no_grad()
    def take(self, packed: HiNMWeight) -> None:
        """``repack`` without its checks: for what ``pack`` has just made of a weight of the same layer."""
        self.retained = packed.retained
        for name, tensor in packed.tensors.items():
            self._buffers[name].copy_(tensor)  # type: ignore[union-attr]
        self._decode()

    def _decode(self, *, replaced: bool = False) -> None:
        """Decodes the packed weight anew: in place while layout and tensors stay, so that compiled graphs see it."""
        # In the form that graphs hold: the product for CPUs may have been switched on or off since.
        form = None if replaced or self.values.is_meta else self._form
        before, after = self._buffers, expand_all(self.packed, groups=self.groups, form=form)
        if replaced or self.values.is_meta or self.expansion.is_inference() or not _same_layout(before, after):
            before.update(after)
            self.packing = Packing()
            return
        for name, tensor in after.items():
            if tensor is not None:
                before[name].copy_(tensor)  # type: ignore[union-attr]

    def _apply(self, fn: Any, recurse: bool = True) -> "HiNMLayer":
        # What was decoded suits one device and dtype: it is made anew, not moved. From meta there is nothing to decode.
        packed, before = self.packed.tensors, self.values
        expanded = {name: self._buffers.pop(name) for name in EXPANDED}
        try:
            super()._apply(fn, recurse)
            after = self.values
            if before.is_meta:
                expanded = {name: tensor if tensor is None else fn(tensor) for name, tensor in expanded.items()}
            elif (before.device, before.dtype) != (after.device, after.dtype):
                with torch.inference_mode(False), torch.no_grad():
                    expanded = expand_all(self.packed, groups=self.groups)
        finally:
            self._buffers.update(expanded)
            if _replaced(packed, self.packed.tensors):
                self.packing = Packing()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Unpickled where something else runs than where it was pickled.
        if not self.values.is_meta and self._form != form_of(self.packed):
            with torch.inference_mode(False), torch.no_grad():
                self._buffers.update(expand_all(self.packed, groups=self.groups))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        *_, error_msgs = args
        incoming = {name: state_dict.get(prefix + name, self._buffers[name]) for name in PACKED_TENSORS}
        if not any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in incoming.values()):
            try:  # before anything is copied: a damaged index would be a read out of bounds
                check_packed(
                    HiNMWeight(**incoming, shape=self.shape, pattern=self.pattern), prefix[:-1], groups=self.groups
                )
            except ValueError as error:
                error_msgs.append(str(error))
                return
        if any(prefix + name in state_dict for name in PACKED_TENSORS):
            self.retained = None
        before = self.packed.tensors
        super()._load_from_state_dict(state_dict, prefix, *args)
        with torch.inference_mode(False), torch.no_grad():
            self._decode(replaced=_replaced(before, self.packed.tensors))

    def _pattern_repr(self) -> str:
        pattern = self.pattern
        window = "" if pattern.runs(math.prod(self.shape[1:]))[1:] == [] else f", window={pattern.window}"
        return f"vector_size={pattern.vector_size}, sparsity={pattern.sparsity:g}, {pattern.n}:{pattern.m}{window}"


class HiNMLinear(HiNMLayer):
    """A packed ``nn.Linear``, or Hugging Face ``Conv1D``, which computes the same. ``[..., I]`` -> ``[..., O]``."""

    def __init__(self, packed: HiNMWeight, bias: nn.Parameter | None, *, kind: str = "linear") -> None:
        super().__init__(packed, bias, kind=kind)
        self.out_features, self.in_features = self.shape
        if kind == "hf_conv1d":  # the names that its users read
            self.nf, self.nx = self.shape

    @classmethod
    def from_packed(cls, dense: nn.Module, packed: HiNMWeight) -> "HiNMLinear":
        """The layer that takes the place of ``dense``, with its bias and ``packed`` as its weight.

        Raises:
            ValueError: if ``packed`` is not a weight of that layer's shape.
        """
        kind = _kind_of(cls, dense, ("linear", "hf_conv1d"))
        return cls(_of_shape(dense, kind, packed), dense.bias, kind=kind)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:  # as nn.Linear names it, for whoever calls it by keyword
        return hinm_linear(input, *self.operands, self.in_features, *self.pattern.fields)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self._pattern_repr()}"


class HiNMConv2d(HiNMLayer):
    """A packed ``nn.Conv2d`` or ``nn.Conv1d``: the latter is a convolution over images of height 1."""

    def __init__(
        self,
        packed: HiNMWeight,
        bias: nn.Parameter | None,
        *,
        kind: str = "conv2d",
        stride: tuple[int, ...],
        padding: tuple[int, ...] | str,
        dilation: tuple[int, ...],
        groups: int,
        padding_mode: str,
    ) -> None:
        super().__init__(packed, bias, kind=kind, groups=groups)
        self.out_channels, self.in_channels = self.shape[0], self.shape[1] * groups
        self.kernel_size, self.stride, self.dilation = self.shape[2:], tuple(stride), tuple(dilation)
        self.padding = padding if isinstance(padding, str) else tuple(padding)
        self.padding_mode = padding_mode
        self._pads = self._resolve_padding()

    @classmethod
    def from_packed(cls, dense: nn.Module, packed: HiNMWeight) -> "HiNMConv2d":
        """The layer that takes the place of ``dense``, with its bias and ``packed`` as its weight.

        Raises:
            ValueError: if ``packed`` is not a weight of that layer's shape.
        """
        kind = _kind_of(cls, dense, ("conv1d", "conv2d"))
        return cls(
            _of_shape(dense, kind, packed),
            dense.bias,  # type: ignore[arg-type]
            kind=kind,
            **{name: getattr(dense, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")},
        )

    def _resolve_padding(self) -> tuple[tuple[int, int], ...]:
        """(before, after) of each spatial dimension."""
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return tuple((total // 2, total - total // 2) for total in totals)
        sizes = (0,) * len(self.kernel_size) if self.padding == "valid" else self.padding
        return tuple((size, size) for size in sizes)  # type: ignore[misc]

    def forward(self, input: Tensor) -> Tensor:
        x, pads = input, self._pads
        if self.padding_mode != "zeros" or any(before != after for before, after in pads):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, [size for pad in reversed(pads) for size in pad], mode=mode)
            pads = ((0, 0),) * len(pads)
        flat = self.kind == "conv1d"
        numbers = self.geometry(tuple(before for before, _ in pads))
        # Contiguous: else the image is channels last, and so is what comes out, unlike that of F.conv1d.
        out = hinm_conv2d(x.contiguous().unsqueeze(-2) if flat else x, *self.operands, *numbers)
        return out.squeeze(-2) if flat else out

    def geometry(self, padding: tuple[int, ...]) -> tuple[int | float | None, ...]:
        """The op's numbers, with ``padding`` zeros on both sides of each dimension."""
        one = (1,) * (2 - len(padding))
        zero = (0,) * (2 - len(padding))
        spatial = (*one, *self.kernel_size, *one, *self.stride, *zero, *padding, *one, *self.dilation)
        return (self.in_channels, *spatial, self.groups, *self.pattern.fields)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"padding_mode={self.padding_mode}, {self._pattern_repr()}"
        )


def _same_layout(before: Mapping[str, Tensor | None], after: Mapping[str, Tensor | None]) -> bool:
    """Whether the same is decoded, and nothing has changed that a graph may have worked into the numbers of others."""
    sizes = [[None if (t := of[name]) is None else (t.dtype, t.shape) for name in EXPANDED] for of in (before, after)]
    if sizes[0] != sizes[1]:
        return False
    return all(torch.equal(before[name], after[name]) for name in ("columns", "restore"))  # type: ignore[arg-type]


def _replaced(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    return any(after[name] is not tensor for name, tensor in before.items())


def _kind_of(cls: type, dense: nn.Module, kinds: tuple[str, ...]) -> str:
    kind = layer_kind(dense)
    if kind not in kinds:
        got = type(dense).__name__
        raise ValueError(f"{cls.__name__}.from_packed: got a {got}, but it takes only {' and '.join(kinds)} layers.")
    return kind


def _of_shape(dense: nn.Module, kind: str, packed: HiNMWeight) -> HiNMWeight:
    shape: tuple[int, ...] = tuple(dense.weight.shape)  # type: ignore[arg-type]
    shape = shape[::-1] if kind == "hf_conv1d" else shape
    if tuple(packed.shape) != shape:
        raise ValueError(
            f"{type(dense).__name__}: its weight is {list(shape)} as [out, in, ...], but the packed weight is "
            f"{list(packed.shape)}. It belongs to another layer."
        )
    return packed
