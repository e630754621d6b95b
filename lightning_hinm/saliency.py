"""How much each weight matters: non-negative, of the weight's shape. Statistics are arguments; whoever has the data
gathers them."""

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|w|, in at least float32; same shape as ``weight``."""
    return weight.detach().abs().to(torch.promote_types(weight.dtype, torch.float32))


def taylor(weight: Tensor, grad: Tensor) -> Tensor:
    """|w * g| of one step, in at least float32: the first-order change of the loss when a weight becomes zero
    (Molchanov et al., arXiv 1906.10771, equation 8, without the square). Summed over steps by the caller."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.detach().to(wide) * grad.detach().to(wide)).abs()
