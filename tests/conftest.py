import gc
import os

# Before torch is imported: with one worker per core, a second thread in each only waits.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator

import hypothesis
import pytest
import torch
import torch._dynamo.guards

import lightning_hinm.backend
from lightning_hinm.ops import warn_once

os.environ["LIGHTNING_HINM_LAYOUTS"] = "off"  # a search that is tested is a search that runs

# Dynamo times the guards of each graph, with caches that it has emptied. And it writes down all that it traces where a
# logger listens, as pytest does to any that does not propagate. Either takes longer than to trace a small graph.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
torch._logging._internal.trace_log.handlers.clear()
torch._logging._internal.trace_log.propagate = True

# Where the package runs from its source and nothing is installed, no entry point names the backend.
if "hinm" not in torch._dynamo.list_backends():
    torch._dynamo.register_backend(lightning_hinm.backend.hinm_backend, name="hinm")

# No test asserts a time, not even that of an example: the first one may import, and machines are shared.
hypothesis.settings.register_profile("lightning-hinm", deadline=None)
hypothesis.settings.load_profile("lightning-hinm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="module")
def little_garbage() -> None:
    """No collection looks again at what came before: beside all that torch's compiler keeps, it would take seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, and nothing warned of."""
    torch.manual_seed(0)
    torch.compiler.reset()
    warn_once.cache_clear()
    yield
    torch.compiler.reset()
