"""An update of the weights as one CUDA graph.

A step of the default run has about 1,100 kernels of 11 microseconds each. A host needs longer to
start one than a fast GPU needs to run it. A CUDA graph is a recording of all of them, with their
addresses, that is started as a whole.
"""

from collections import Counter

import torch

WARM = 3  # calls that run as they are: they compile, and take the memory that lasts


def replayed(update, optimizer, device):
    """The function `update`, which calls optimizer.step(), as a CUDA graph that is replayed."""
    for group in optimizer.param_groups:
        group["capturable"] = True  # it then counts its steps on the GPU
    return Replayed(update, device)


class Replayed:
    """function(*inputs), replayed as a CUDA graph, one for each combination of shapes.

    Inputs are tensors of the GPU, numbers, or None; inside, numbers are tensors, too. A graph reads
    and writes at fixed addresses. So each call copies its inputs there, and results are overwritten
    by the next call: clone what is kept. What else the function changes, such as weights, has to
    stay where it is. Nothing in it may wait for the GPU, or depend on a value that the CPU knows.
    """

    def __init__(self, function, device):
        self.function, self.device = function, device
        self.calls, self.graphs = Counter(), {}
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()  # the graphs run in turns, in the same memory

    def __call__(self, *inputs):
        shapes = tuple(getattr(x, "shape", x is None) for x in inputs)
        self.calls[shapes] += 1
        if self.calls[shapes] <= WARM:
            return self.run(inputs)
        if shapes not in self.graphs:
            self.graphs[shapes] = self.record(inputs)
        graph, places, results = self.graphs[shapes]
        for place, x in zip(places, inputs, strict=True):
            if place is not None:
                place.copy_(x) if torch.is_tensor(x) else place.fill_(x)
        graph.replay()
        return results

    def places_of(self, inputs):
        """Copies of the inputs; of a number, a tensor that holds it."""
        for x in inputs:
            number = isinstance(x, (int, float))
            yield torch.full((), x, device=self.device) if number else x if x is None else x.clone()

    def run(self, inputs):
        """A call as it is, on the stream of the recording, so that memory belongs to that stream."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            results = self.function(*self.places_of(inputs))
        here.wait_stream(self.stream)
        return results

    def record(self, inputs):
        """-> the graph, the tensors that it reads, and its results. Nothing runs yet."""
        graph, places = torch.cuda.CUDAGraph(), list(self.places_of(inputs))
        # thread_local, because the thread that loads the next images goes on meanwhile.
        mode = dict(pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        with torch.cuda.graph(graph, **mode):
            results = self.function(*places)
        return graph, places, results
