"""common/graphs.py with a CUDA that is not there: a replay calls the function on what was recorded."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from common import graphs


@pytest.fixture
def replayed(monkeypatch):
    """`scaled` as a Replayed on a CPU; `fails`: whether CUDA can't record."""
    calls = []

    def scaled(factor, x, y=None):
        calls.append(factor)
        return x * factor, None if y is None else y * factor

    class Recording:
        def replay(self):
            for recording, places, results in made.graphs.values():
                if recording is self:
                    for result, x in zip(results, scaled(*places), strict=True):
                        result is None or result.copy_(x)

    @contextlib.contextmanager
    def graph(recording, **_):
        if made.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "set_stream": lambda stream: None,
        "graph_pool_handle": lambda: None,
        "CUDAGraph": Recording,
        "graph": graph,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    made = graphs.Replayed(scaled, optimizer, torch.device("cpu"))
    made.fails, made.factors = False, calls
    return made


def check(replayed, steps):
    """Every second call has a third input; each has numbers of its own."""
    for i in range(steps):
        y = [torch.tensor([2.0 * i])] if i % 2 else []
        one, other = replayed(0.5 * i, torch.full((3,), float(i)), *y)
        assert torch.equal(one, torch.full((3,), 0.5 * i * i))
        assert (other is None) if not y else torch.equal(other, torch.tensor([float(i * i)]))


def test_each_combination_of_shapes_is_recorded_once_and_reads_every_input(replayed):
    check(replayed, 14)
    assert len(replayed.graphs) == 2
    # Each was called as it is three times, once to be recorded, and at every replay.
    assert len(replayed.factors) == 14 + 2
    assert all(torch.is_tensor(factor) for factor in replayed.factors)


def test_what_can_not_be_recorded_runs_as_it_is_and_says_so_once(replayed, capsys):
    replayed.fails = True
    check(replayed, 14)
    said = capsys.readouterr().out
    assert said.count("no CUDA graph") == said.count("operation not permitted") == 1
    assert not replayed.graphs and len(replayed.factors) == 14
    # A tensor for the learning rate would make some optimizers wait for the GPU in each step.
    assert not torch.is_tensor(replayed.factors[-1])


def test_its_optimizer_counts_on_the_gpu(replayed):
    assert all(group["capturable"] for group in replayed.optimizer.param_groups)
