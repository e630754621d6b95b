"""The paper's loop, arXiv 2407.20496, section 4: sample, cluster, assign."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from lightning_hinm.gyro.problem import RETRIES, Problem, assign, assign_vectors
from lightning_hinm.mask import choose_vectors

# Rows sampled from every tile, one entry a phase: coarse moves first, fine ones last, like a learning rate (the paper).
SAMPLES = (8, 1, 4, 1, 2, 1, 1)


def gyro_paper(problems: Sequence[Problem], order: Tensor, indices: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Gyro-permutation: output channels for vector pruning first, then the kept vectors of each tile for N:M.

    Matrices that share the order, which the paper does not know, count by the sum of what they are worth.
    """
    if problems[0].output_order is None:
        order = _gyro_rows(problems, order)
        indices = [choose_vectors(problem.saliency, problem.pattern, order) for problem in problems]
    pairs = zip(problems, indices, strict=True)
    return order, [assign_vectors(problem, order, index, pruned=False) for problem, index in pairs]


def _gyro_rows(problems: Sequence[Problem], order: Tensor) -> Tensor:
    """Sample rows from every full tile, cluster them into equal groups, assign the groups to the tiles; keep gains."""
    problem, v = problems[0], problems[0].pattern.vector_size  # the first has the randomness and the clock of all
    full = order.numel() // v
    if full < 2:
        return order
    tail = order[full * v :]  # an incomplete tile has no room to exchange equal clusters with
    tiles = order[: full * v].unflatten(0, (full, v))  # [T, V] row numbers
    best = reduce(torch.add, (_vector_values(one, one.saliency[tiles].sum(dim=1)) for one in problems)).sum()
    for samples in (count for count in SAMPLES if count < v):
        failures = 0
        while failures < RETRIES and not problem.clock.expired():
            picks = torch.from_numpy(problem.noise(full, v).argsort(axis=1)).to(tiles.device)
            taken, left = tiles.gather(1, picks[:, :samples]), tiles.gather(1, picks[:, samples:])
            points = torch.cat([one.saliency[taken.flatten()] for one in problems], dim=1)
            clusters = taken.flatten()[_balanced_clusters(problem, points, full)]
            values = reduce(torch.add, (_cluster_values(one, left, clusters) for one in problems))
            choice = torch.from_numpy(assign([values.cpu().numpy()])[0]).to(tiles.device)
            moved = torch.cat((left, clusters[choice]), dim=1)
            value = values.gather(1, choice.unsqueeze(1)).sum()
            if value > best * (1 + 1e-6):
                tiles, best, failures = moved, value, 0
            else:
                failures += 1
            problem.tell(torch.cat((tiles.flatten(), tail)))
    return torch.cat((tiles.flatten(), tail))


def _vector_values(problem: Problem, sums: Tensor) -> Tensor:
    """Saliency of the vectors that tiles with these column sums keep, all that is not pruned: ``[T, I]`` -> ``[T]``."""
    total = torch.zeros(sums.shape[0], device=sums.device)
    for first, last in problem.pattern.runs(sums.shape[1]):
        kept = min(problem.pattern.kept_of_run(last - first), last - first)
        total = total + sums[:, first:last].topk(kept, dim=1).values.sum(dim=1)
    return total


def _cluster_values(problem: Problem, left: Tensor, clusters: Tensor) -> Tensor:
    """What each tile, with these rows left in it, is worth with each of the clusters: ``[tile, cluster]``."""
    base = problem.saliency[left].sum(dim=1)  # [T, I]
    joined = problem.saliency[clusters].sum(dim=1)  # [T, I]
    return torch.stack([_vector_values(problem, part + joined) for part in base])


def _balanced_clusters(problem: Problem, points: Tensor, count: int, steps: int = 5) -> Tensor:
    """Balanced k-means: ``count`` clusters of equal size, int64 ``[count, points / count]``, by assignment."""
    size = points.shape[0] // count
    members = torch.from_numpy(problem.shuffled(len(points))).to(points.device).unflatten(0, (count, size))
    if size == 1:
        return members
    for _ in range(steps):
        centres = points[members].mean(dim=1)
        near = -torch.cdist(points, centres).cpu().numpy()
        nearest = torch.from_numpy(assign([near.repeat(size, axis=1)])[0] // size)
        regrouped = nearest.argsort(stable=True).unflatten(0, (count, size)).to(points.device)
        if torch.equal(regrouped, members):
            break
        members = regrouped
    return members
