"""A plain search by exact values, to measure the package's against: 60 annealed rounds of rows, then vectors.

Rows go to tiles by one exact transport problem over all of them, with noise that cools to nothing; then the vectors of
each tile are exchanged, pair by pair and with pruned columns, until no exchange gains. It uses the package's exact
values, but neither its stand-in for the annealing nor its assignments of many vectors at once.
"""

import time

import torch
from torch import Tensor

from lightning_hinm import HiNMLayout, HiNMPattern
from lightning_hinm.gyro.problem import Clock, Problem, assign, joined_values, row_values
from lightning_hinm.mask import choose_vectors

ROUNDS = 60


def prototype(saliency: Tensor, pattern: HiNMPattern, seed: int = 0) -> tuple[HiNMLayout, float]:
    """The layout, and the seconds that it took; rows and columns must fill whole tiles and groups."""
    start = time.perf_counter()
    rows, v = saliency.shape[0], pattern.vector_size
    scaled = saliency / saliency.max()
    problem = Problem(scaled, pattern, torch.Generator().manual_seed(seed), Clock(None), None, None)
    order = torch.from_numpy(problem.shuffled(rows))
    owner = torch.arange(rows // v).repeat_interleave(v)
    for i in range(ROUNDS):
        index = choose_vectors(scaled, pattern, order)
        values = row_values(problem, torch.arange(rows), index)
        heat = 1 - (i + 1) / ROUNDS
        noisy = values + heat * values.std() * torch.from_numpy(problem.noise(*values.shape))
        order = torch.from_numpy(assign([noisy[:, owner].numpy()])[0]).argsort()
    index = choose_vectors(scaled, pattern, order)
    for tile, slots in enumerate(index):
        points = scaled[order[tile * v : (tile + 1) * v]].t()  # [I, V]
        first_slot = 0
        for first, last in pattern.runs(saliency.shape[1]):
            held = slice(first_slot, first_slot + pattern.kept_of_run(last - first))
            slots[held] = exchange_pairs(points[first:last].contiguous(), slots[held] - first, pattern) + first
            first_slot = held.stop
    return HiNMLayout(pattern, order, index), time.perf_counter() - start


def exchange_pairs(points: Tensor, slots: Tensor, pattern: HiNMPattern) -> Tensor:
    """``points`` ``[W, V]``, ``slots`` int64 ``[K]``: the slots after all exchanges that gain."""
    m = pattern.m
    others = torch.tensor([[j for j in range(m) if j != i] for i in range(m)])  # [m, m - 1]
    group = torch.arange(len(slots)) // m
    slots = slots.clone()
    while True:
        rest = slots.unflatten(0, (-1, m))[:, others].flatten(0, 1)  # [K, m - 1]
        members = points[rest].unsqueeze(0).unbind(2)
        values = joined_values(members, points.unsqueeze(0), points.sum(dim=1).unsqueeze(0), pattern.n)[0] / 2  # [K, W]
        values -= values.gather(1, slots.unsqueeze(1))
        swap = values[:, slots]
        swap = (swap + swap.t()).masked_fill(group.unsqueeze(1) == group, float("-inf"))
        take = values.index_fill(1, slots, float("-inf"))
        gain, partner = torch.cat((swap, take), dim=1).max(dim=1)  # of each slot
        closed: set[int] = set()
        before = slots.tolist()
        for slot in gain.argsort(descending=True).tolist():
            if gain[slot] <= 1e-6:
                break
            other = int(partner[slot])
            touched = {int(group[slot]), int(group[other]) if other < len(before) else -1 - other}
            if closed & touched:
                continue
            closed |= touched
            if other < len(before):
                slots[slot], slots[other] = before[other], before[slot]
            else:
                slots[slot] = other - len(before)
        if not closed:
            return slots
