"""An update of the weights as one CUDA graph.

A step of the default run has about 1,000 kernels, most of which run for 5 to 50 microseconds. A
host needs longer to start one than a fast GPU needs to run it. A CUDA graph is a recording of all
of them, with their addresses, that is started as a whole.
"""

from collections import Counter

import torch

from common.io import one_line

WARM = 3  # calls that run as they are: they compile, and take the memory that lasts


class Replayed:
    """update(*inputs), which calls optimizer.step(), as a CUDA graph for each combination of shapes.

    Inputs are tensors of the GPU, numbers, or None; inside, numbers are tensors, too. A graph reads
    and writes at fixed addresses. So each call copies its inputs there, and its results are
    overwritten by the next call: clone what is kept. Nothing in `update` may wait for the GPU. What
    can't be recorded runs as it is from then on, with the inputs as they are, and a note says so.
    """

    def __init__(self, update, optimizer, device):
        self.update, self.optimizer, self.device = update, optimizer, device
        self.calls, self.graphs, self.can_record = Counter(), {}, True
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()  # the graphs run in turns, in the same memory
        for group in optimizer.param_groups:
            group["capturable"] = True  # it then counts its steps on the GPU

    def __call__(self, *inputs):
        # None and numbers have no shape; True stands for the one, and False for the others.
        shapes = tuple(getattr(x, "shape", x is None) for x in inputs)
        self.calls[shapes] += 1
        if self.can_record and self.calls[shapes] > WARM and shapes not in self.graphs:
            self.try_to_record(shapes, inputs)
        if shapes not in self.graphs:
            return self.run(inputs) if self.can_record else self.update(*inputs)
        graph, places, results = self.graphs[shapes]
        for place, x in zip(places, inputs, strict=True):
            if torch.is_tensor(x):
                place.copy_(x)
            elif x is not None:
                place.fill_(x)
        graph.replay()
        return results

    def copied(self, inputs):
        """Copies of the inputs; of a number, a tensor that holds it."""
        for x in inputs:
            if torch.is_tensor(x):
                yield x.clone()
            else:
                yield None if x is None else torch.full((), x, device=self.device)

    def run(self, inputs):
        """A call as it is, on the stream of the recordings, so that memory belongs to that stream."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            results = self.update(*self.copied(inputs))
        here.wait_stream(self.stream)
        return results

    def try_to_record(self, shapes, inputs):
        """A graph, the tensors that it reads, and its results. Nothing runs yet."""
        graph, places = torch.cuda.CUDAGraph(), list(self.copied(inputs))
        here = torch.cuda.current_stream(self.device)
        # thread_local, because the thread that loads the next images goes on meanwhile.
        mode = dict(pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.graph(graph, **mode):
                results = self.update(*places)
            self.graphs[shapes] = graph, places, results
        except RuntimeError as problem:
            # A failed recording leaves its stream as the current one, and says only that it failed: why
            # is in what failed first.
            torch.cuda.set_stream(here)
            cause = one_line(problem.__context__ or problem)
            print(f"note     no CUDA graph of the update: {cause}")
            self.can_record = False
            self.optimizer.zero_grad()  # what was recorded so far holds no numbers
