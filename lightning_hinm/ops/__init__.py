"""``torch.ops.hinm.linear`` and ``torch.ops.hinm.conv2d``: one schema, a fake, a kernel and a derivative each."""

from typing import Any

import torch
from torch import Tensor

from lightning_hinm import kernels
from lightning_hinm.kernels import host
from lightning_hinm.ops import cpu, gpu, product
from lightning_hinm.ops.operands import (
    EXPANDED,
    TENSORS,
    Conv2dOperands,
    LinearOperands,
    Operands,
    cast,
    expand_all,
    expanded_bytes,
    form_of,
    holds_positions,
    new_images,
    warn_once,
)

__all__ = [
    "EXPANDED",
    "expand_all",
    "expanded_bytes",
    "form_of",
    "hinm_conv2d",
    "hinm_linear",
    "holds_positions",
    "warn_once",
]

_LIBRARY = torch.library.Library("hinm", "DEF")
_TENSORS = (
    "Tensor values, Tensor metadata, Tensor vector_index, Tensor output_order, Tensor? bias, Tensor? expansion, "
    "Tensor? expansion_metadata, Tensor? columns, Tensor? restore"
)
_PATTERN = 'int vector_size, float vector_sparsity, int n, int m, int? window, str activation="none"'
# Both take an input of any strides and return a tensor of its own. That of linear is contiguous as it is or with its
# last dimension first (``feature_major``); that of conv2d is channels last if the input is, which Inductor may choose.
_LIBRARY.define(f"linear(Tensor x, {_TENSORS}, int in_features, {_PATTERN}, bool feature_major=False) -> Tensor")
_LIBRARY.define(
    f"conv2d(Tensor x, {_TENSORS}, int in_channels, int kernel_height, int kernel_width, int stride_height, "
    "int stride_width, int padding_height, int padding_width, int dilation_height, int dilation_width, int groups, "
    f"{_PATTERN}) -> Tensor",
    tags=torch.Tag.flexible_layout,
)


def _path(x: Tensor, operands: Operands) -> Any:
    """The module that runs a weight as it was decoded, on the device where it is by now."""
    if operands.expansion_metadata is not None and kernels.refusal(x.device) is None:
        return gpu
    if operands.expansion is None or not holds_positions(operands.expansion):
        return product
    reason = cpu.refusal(x)
    if reason is not None and not host.is_off():
        warn_once(
            f"hinm: packed layers are decoded anew at each call, because {reason}. Convert the model where it runs."
        )
    return cpu if reason is None else product


def _linear(x: Tensor, *operands: Any) -> Tensor:
    linear = LinearOperands(*operands)
    linear.check(x)
    return _path(x, linear).linear(x, linear)


def _linear_fake(x: Tensor, *operands: Any) -> Tensor:
    linear = LinearOperands(*operands)
    linear.check(x)
    rows = linear.output_order.shape[0]
    if linear.feature_major:
        return x.new_empty(rows, *x.shape[:-1]).movedim(0, -1)
    return x.new_empty(*x.shape[:-1], rows)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = product.linear_grad(grad, LinearOperands(*_saved(ctx))) if ctx.needs_input_grad[0] else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0) if ctx.needs_input_grad[_BIAS] else None
    return _gradients(ctx, grad_x, grad_bias)


def _conv2d(x: Tensor, *operands: Any) -> Tensor:
    conv2d = Conv2dOperands(*operands)
    size = conv2d.check(x)
    path, as_linear = _path(x, conv2d), conv2d.as_linear(x)
    return path.conv2d(x, conv2d, size) if as_linear is None else path.linear(*as_linear).permute(0, 3, 1, 2)


def _conv2d_fake(x: Tensor, *operands: Any) -> Tensor:
    conv2d = Conv2dOperands(*operands)
    return new_images(x, conv2d.output_order.shape[0], *conv2d.check(x))


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    operands = Conv2dOperands(*_saved(ctx))
    grad_x = product.conv2d_grad(grad, operands, ctx.x_shape) if ctx.needs_input_grad[0] else None
    grad_bias = grad.flatten(-2).sum(dim=-1).reshape(-1, grad.shape[-3]).sum(dim=0)
    return _gradients(ctx, grad_x, grad_bias if ctx.needs_input_grad[_BIAS] else None)


_BIAS = 1 + LinearOperands._fields.index("bias")  # among the op's arguments


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *operands = inputs
    activation = next((operand for operand in operands[TENSORS:] if isinstance(operand, str)), "none")
    if activation != "none":
        raise NotImplementedError(
            f"hinm: activation={activation!r} is fused for inference only, but x or bias requires "
            "gradients. Apply the activation after the op, or call it under torch.inference_mode()."
        )
    operands[_BIAS - 1] = None  # its own gradient does not ask for it, so it may change before that is taken
    ctx.save_for_backward(*operands[:TENSORS])
    ctx.numbers, ctx.x_shape = operands[TENSORS:], x.shape


def _saved(ctx: Any) -> tuple[Any, ...]:
    return *ctx.saved_tensors, *ctx.numbers


def _gradients(ctx: Any, grad_x: Tensor | None, grad_bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """One for each argument; a packed weight takes none."""
    after = TENSORS - _BIAS + len(ctx.numbers)
    return grad_x, *[None] * (_BIAS - 1), grad_bias, *[None] * after


def _autocast(op: Any, device: str) -> Any:
    """Under autocast ``x``, weight and bias take its dtype, as those of ``F.linear`` and ``F.conv2d`` do."""

    def cast_and_call(x: Tensor, *operands: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return op(x if x.dtype == torch.float64 else x.to(dtype), *cast(operands, dtype))

    return cast_and_call


for _name, _kernel, _fake, _backward in (
    ("linear", _linear, _linear_fake, _linear_backward),
    ("conv2d", _conv2d, _conv2d_fake, _conv2d_backward),
):
    for _device in ("cpu", "cuda"):
        _LIBRARY.impl(_name, _kernel, _device.upper())
        _autocast_kernel = _autocast(getattr(torch.ops.hinm, _name).default, _device)
        _LIBRARY.impl(_name, _autocast_kernel, f"Autocast{_device.upper()}")
    torch.library.register_fake(f"hinm::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"hinm::{_name}", _backward, setup_context=_setup_context, lib=_LIBRARY)

# The overloads themselves: a call through ``torch.ops.hinm.linear`` resolves them anew.
hinm_linear = torch.ops.hinm.linear.default
hinm_conv2d = torch.ops.hinm.conv2d.default
