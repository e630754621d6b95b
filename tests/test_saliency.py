import torch

from lightning_hinm.saliency import magnitude, taylor


def test_magnitude_is_the_absolute_value_in_at_least_float32():
    weight = torch.tensor([[-2.0, 0.5]], dtype=torch.bfloat16, requires_grad=True)
    assert magnitude(weight).dtype == torch.float32
    assert magnitude(weight).tolist() == [[2.0, 0.5]]
    assert not magnitude(weight).requires_grad
    assert magnitude(weight.double()).dtype == torch.float64


def test_taylor_is_the_first_order_change_of_the_loss():
    weight = torch.tensor([3.0, -1.0], requires_grad=True)
    (weight * torch.tensor([2.0, 5.0])).sum().backward()
    # a linear loss changes by exactly |w * g| when a weight becomes zero
    assert taylor(weight, weight.grad).tolist() == [6.0, 5.0]
