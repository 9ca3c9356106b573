"""Steps of decoding and of training as CUDA graphs: the host launches a whole step at once."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mamba_core.backend import Carry, Choice
from mamba_core.backends.torch.private import tree_map

# The most tokens that are computed without the host. The first rounds compute fewer, for short texts.
AT_ONCE = 16
WARM_UPS = 2
Batch = Tensor | dict[str, Tensor]


class CapturedDecoding:
    """`advance(carry, uniform) -> carry`, captured with its own arrays, which each replay advances by one token.

    Arrays that advance returns as it received them stay where they are; the others are copied into those.
    """

    def __init__(self, advance: Callable[[Carry, Tensor | None], Carry], like: Carry, draws: bool):
        # Kernels read and write states as they lie in memory, and what a prompt has left may lie otherwise.
        self._carry = _mapped(partial(torch.zeros_like, memory_format=torch.contiguous_format), like)
        tokens = like.choice.tokens
        self._uniforms = torch.zeros(AT_ONCE, *tokens.shape, device=tokens.device) if draws else None
        self._index = torch.zeros(1, dtype=torch.long, device=tokens.device)
        self._choices = _mapped(lambda value: value.new_zeros(AT_ONCE, *value.shape), like.choice)
        self._graph = torch.cuda.CUDAGraph()
        with _on_side_stream(torch.cuda.Stream(tokens.device)):
            for _ in range(WARM_UPS):
                self._step(advance)
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._step(advance)

    @property
    def carry(self) -> Carry:
        """After the last step: the arrays that the next `run` overwrites."""
        return self._carry

    def run(self, carry: Carry, draw, first: int, most: int | None) -> Iterator[Choice]:
        """The choices after that of the carry, of NumPy arrays; at most so many.

        first: the number of the first step, as `draw` counts them.
        """
        _copy(carry, self._carry)
        done, count, running = 0, 1, None
        while True:
            count = min(2 * count, AT_ONCE, AT_ONCE if most is None else most - done)
            # The device goes on while the host reads the tokens before.
            started = self._start(first + done, count, draw) if count > 0 else None
            if running is not None:
                yield from _each(*running)
            if (running := started) is None:
                return
            done += count

    def _start(self, first: int, count: int, draw):
        if self._uniforms is not None:
            self._uniforms[:count].copy_(torch.from_numpy(draw(first, count)))
        self._index.zero_()
        for _ in range(count):
            self._graph.replay()
        on_host = _mapped(lambda value: _to_host(value[:count]), self._choices)
        arrived = torch.cuda.Event()
        arrived.record()
        return count, on_host, arrived

    def _step(self, advance):
        uniform = None if self._uniforms is None else self._uniforms.index_select(0, self._index)[0]
        after = advance(self._carry, uniform)
        _copy(after, self._carry)
        _mapped(lambda kept, value: kept.index_copy_(0, self._index, value[None]), self._choices, after.choice)
        self._index.add_(1)


class CapturedCache:
    """The last captured decoding of each model that is not in use. Only one, because its arrays may be large."""

    def __init__(self):
        self._kept = WeakKeyDictionary()

    def take(self, model, key, make: Callable[[], CapturedDecoding]) -> CapturedDecoding:
        if model in self._kept and self._kept[model][0] == key:
            return self._kept.pop(model)[1]
        # The old one, which does not fit, is freed before another is made.
        self._kept.pop(model, None)
        return make()

    def give_back(self, model, key, decoding: CapturedDecoding) -> None:
        self._kept[model] = key, decoding


class CapturedStep:
    """A function of a batch that changes other tensors, such as a training step, captured after its first calls.

    A batch is a tensor or a dict of tensors. The first calls with its shapes and settings are plain; then the function
    is captured, and each call is a replay. The tensors that it reads must stay where they are in memory. If they move,
    call `forget`.
    """

    def __init__(self, function: Callable[[Batch], Tensor]):
        self._function, self._side = function, None
        self.forget()

    def forget(self) -> None:
        self._key, self._calls, self._graph = None, 0, None

    def __call__(self, batch: Batch, settings: Hashable) -> Tensor:
        named = {"": batch} if isinstance(batch, Tensor) else batch
        device = next(iter(named.values())).device
        if self._key != (key := (*((name, value.shape, value.dtype) for name, value in named.items()), settings)):
            self.forget()
            self._key = key
        if self._graph is None and self._calls < WARM_UPS:
            self._calls += 1
            # Always the same stream, because memory that one stream has used is not reused by another.
            self._side = self._side or torch.cuda.Stream(device)
            with _on_side_stream(self._side):
                return self._function(batch)
        if self._graph is None:
            self._capture(batch, device)
        _copy(batch, self._batch)
        self._graph.replay()
        return self._result.clone()

    def _capture(self, batch: Batch, device: torch.device) -> None:
        # The graph has its own memory, so what the plain calls left in the cache would exist twice.
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        self._batch, self._graph = _mapped(torch.clone, batch), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = self._function(self._batch)


@contextmanager
def _on_side_stream(side: torch.cuda.Stream):
    """Runs what a capture needs to have run before, on that stream instead of the current one.

    This compiles what is compiled at first use, and leaves nothing bound to the current stream.
    """
    current = torch.cuda.current_stream(side.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


def _each(count, choices, arrived) -> Iterator[Choice]:
    arrived.synchronize()
    for index in range(count):
        yield _mapped(lambda value, index=index: value[index].numpy(), choices)


def _copy(source, target) -> None:
    _mapped(lambda value, kept: value is kept or kept.copy_(value), source, target)


def _mapped(function, *trees):
    """tree_map that leaves None alone: torch's trees treat None as a leaf."""
    return tree_map(lambda *values: None if values[0] is None else function(*values), *trees)


def _to_host(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
