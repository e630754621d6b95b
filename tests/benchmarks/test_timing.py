"""How candidates are timed."""

import torch
from torch import Tensor

from benchmarks.timing import alternate, take_turns


def test_candidates_are_timed_in_turn() -> None:
    calls: list[str] = []

    def note(name: str) -> Tensor:
        calls.append(name)
        return torch.zeros(())

    first, second = alternate(lambda: note("a"), lambda: note("b"), seconds=0.0, warm_up=1)
    assert calls == ["a", "b"] + ["a", "b"] * 5
    assert first > 0 < second
    assert [len(times) for times in take_turns(lambda: None, lambda: None, seconds=0.0, least=7)] == [7, 7]
