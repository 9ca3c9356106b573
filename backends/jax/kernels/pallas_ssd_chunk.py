"""A chunk of Mamba-2's recurrence in a program of a TPU (Dao and Gu 2024, section 6): what `pallas_ssd` launches.

A program has some heads of one group. Their channels lie side by side along lanes, of x (q, lanes) as of the state
(n, lanes): what the state gives y, and what a chunk adds to it, is one product for a tile of LANES lanes, whichever
heads are in it. A value a position and head stands in rows (heads, q) or columns (q, heads).
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

# Positions of a chunk, and lanes of a tile: the sides of a matrix unit.
CHUNK = LANES = 128
# exp of less is zero in float32: the least logarithm of a decay, and the grid on which sums of a chunk's are exact.
LEAST_LOG, GRID = -128.0, 2.0**10


def forward(*refs, width: int, restarts: bool, keeps: bool):
    """y and the state after a chunk. width: the lanes of a head."""
    x, step, log_decay, B, C, *refs = refs
    run, refs = (refs[0], refs[1:]) if restarts else (None, refs)
    h0, y, last, *refs = refs
    kept, (state,) = (refs[0], refs[1:]) if keeps else (None, refs)

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = h0[...]

    if keeps:
        kept[...] = state[...]
    product = _product_of(x)
    decays = _Decays(log_decay, run)
    b, c, steps = B[...], C[...], step[...].T
    products = product(c, b, 1, 1)
    b = decays.of_last_run(b)
    for tile in _tiles(x, width):
        start, end, size = (tile.spread(columns) for columns in (decays.start, decays.end, steps))
        u, h = size * x[:, tile.lanes].astype(jnp.float32), state[:, tile.lanes]
        value = _passed(start, product(c, h, 1, 0))
        mixed, lost = _apart(decays, u)
        for number, head in tile.heads:
            value += product(decays.kept(products * decays.between(head)), tile.own(number, mixed), 1, 0)
        y[:, tile.lanes] = (value if lost is None else jnp.where(lost, jnp.nan, value)).astype(y.dtype)
        state[:, tile.lanes] = _passed(start[CHUNK - 1 :], h) + product(b, _passed(end, u), 0, 0)
    last[...] = state[...]


def backward(*refs, width: int, restarts: bool):
    """The gradients of a chunk, from the state before it and the gradient of the one after it."""
    x, step, log_decay, B, C, *refs = refs
    run, refs = (refs[0], refs[1:]) if restarts else (None, refs)
    dy, boundary, dlast, dx, dstep, dlog, dB, dC, dh0, passed = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        passed[...] = dlast[...]

    product = _product_of(x)
    decays = _Decays(log_decay, run)
    b, c, steps = B[...], C[...], step[...].T
    products, dproducts = product(c, b, 1, 1), jnp.zeros((CHUNK, CHUNK), jnp.float32)
    db = dc = jnp.zeros(b.shape, jnp.float32)
    by_head = _ByHead(step.shape[0])
    for tile in _tiles(x, width):
        start, end, size = (tile.spread(columns) for columns in (decays.start, decays.end, steps))
        through = start[CHUNK - 1 :]
        inputs, dvalue = (ref[:, tile.lanes].astype(jnp.float32) for ref in (x, dy))
        h, dh, u = boundary[:, tile.lanes], passed[:, tile.lanes], size * inputs
        started = _passed(start, dvalue)
        # What the gradient of the state after the chunk gives each u.
        arriving = _passed(end, product(b, dh, 1, 0))
        db += product(_passed(end, u), dh, 1, 1)
        dc += product(started, h, 1, 1)
        du = arriving
        for number, head in tile.heads:
            between = decays.between(head)
            dweights = decays.kept(product(dvalue, tile.own(number, u), 1, 1) * between)
            dproducts += dweights
            by_head.spanned(head, _product(dweights * products, decays.before, 1, 0))
            du += product(decays.kept(products * between), tile.own(number, dvalue), 0, 0)
        dx[:, tile.lanes] = (du * size).astype(dx.dtype)
        by_head.add("step", tile, du * inputs)
        by_head.add("start", tile, started * product(c, h, 1, 0))
        by_head.add("end", tile, arriving * u)
        by_head.add("through", tile, _passed(through, h * dh).sum(0, keepdims=True))
        passed[:, tile.lanes] = _passed(through, dh) + product(c, started, 0, 0)
    dstep[...], dlog[...] = by_head.rows("step"), by_head.dlog_decay(decays)
    dB[...], dC[...] = db + product(dproducts, c, 0, 0), dc + product(dproducts, b, 1, 0)
    dh0[...] = passed[...]


class _Decays:
    """What passes from each position to each later one, from the state before the chunk to each position, and from each
    position to the chunk's end.

    Sums are exact on a grid, and what is off the grid is summed by itself: a difference of two rounded sums would be
    wrong by the rounding of the larger, which one long step makes large.
    """

    def __init__(self, log_decay, run):
        row, column = _positions(0), _positions(1)
        self.earlier = column <= row
        # Ones where a row stands before its column, and until it.
        self.before, self.until = ((row < column).astype(jnp.float32), (row <= column).astype(jnp.float32))
        values = jnp.maximum(log_decay[...], LEAST_LOG)
        coarse = jnp.round(values * GRID) / GRID
        self._rows = [_product(part, self.until, 1, 0) for part in (coarse, values - coarse)]
        self._columns = columns = [part.T for part in self._rows]
        self.start = jnp.exp(sum(columns))
        self.end = jnp.exp(sum(part[CHUNK - 1 :] - part for part in columns))
        self._last = None
        if run is not None:
            runs = jnp.broadcast_to(run[...], (8, CHUNK))
            run_of_each = runs.T[:, :1]
            self.earlier &= run_of_each == runs[:1]
            self._last = run_of_each == run_of_each[CHUNK - 1 :]
            self.start = jnp.where(run_of_each > 0, 0.0, self.start)
            self.end = jnp.where(self._last, self.end, 0.0)

    def between(self, head: int):
        """(i, j), where `kept` keeps what is of an earlier j and of i's run; elsewhere it may overflow."""
        pairs = zip(self._columns, self._rows, strict=True)
        return jnp.exp(sum(column[:, head : head + 1] - row[head : head + 1] for column, row in pairs))

    def kept(self, value):
        return jnp.where(self.earlier, value, 0.0)

    def of_last_run(self, value):
        """Zeros at positions of other runs, be there Inf or NaN."""
        return value if self._last is None else jnp.where(self._last, value, jnp.zeros((), value.dtype))

    @property
    def has_runs(self) -> bool:
        return self._last is not None


class _Tile:
    """LANES lanes, and the heads in them."""

    def __init__(self, index: int, width: int):
        self._width, self._count = width, LANES // width
        self.lanes = slice(index * LANES, (index + 1) * LANES)
        self.heads = [(number, index * self._count + number) for number in range(self._count)]

    def spread(self, columns):
        """(q, heads) along the lanes of each head: (q, LANES)."""
        (_, head), *others = self.heads
        shape = (columns.shape[0], LANES)
        value = jnp.broadcast_to(columns[:, head : head + 1], shape)
        for number, head in others:
            value = jnp.where(_lane(shape) < number * self._width, value, columns[:, head : head + 1])
        return value

    def own(self, number: int, value):
        """The value of one head, and zero in the lanes of the others."""
        if self._count == 1:
            return value
        first, lane = number * self._width, _lane(value.shape)
        return jnp.where((lane >= first) & (lane < first + self._width), value, 0.0)


class _ByHead:
    """Sums over the lanes of each head, with heads along lanes."""

    def __init__(self, rows: int):
        self._rows, self._sums = rows, {}
        self._spanning = jnp.zeros((rows, CHUNK), jnp.float32)

    def add(self, name: str, tile: _Tile, value):
        shape = (value.shape[0], LANES)
        sums = self._sums.get(name, jnp.zeros(shape, jnp.float32))
        for number, head in tile.heads:
            sums = jnp.where(_lane(shape) == head, tile.own(number, value).sum(1, keepdims=True), sums)
        self._sums[name] = sums

    def spanned(self, head: int, value):
        """value: of (i, k) the sum over j < k, of which k <= i counts."""
        row = jnp.where(_positions(0) >= _positions(1), value, 0.0).sum(0, keepdims=True)
        places = lax.broadcasted_iota(jnp.int32, self._spanning.shape, 0)
        self._spanning = jnp.where(places == head, row, self._spanning)

    def rows(self, name: str):
        return self._sums[name].T[: self._rows]

    def dlog_decay(self, decays: _Decays):
        """The gradient of the logarithms: each is in the decays that span its position.

        Sums of what spans it, and no differences of larger sums: after a long step next to nothing is left of them.
        """
        last = lax.broadcasted_iota(jnp.int32, (CHUNK, LANES), 0) == CHUNK - 1
        self._sums["start"] += jnp.where(last, self._sums["through"], 0.0)
        # The sums over what stands from each position on, and over what stands before it.
        start, end = _product(self.rows("start"), decays.until, 1, 1), _product(self.rows("end"), decays.before, 1, 0)
        return self._spanning + start + end


def _apart(decays: _Decays, u):
    """(u to multiply with, where y is lost because an earlier u of its run is not finite).

    A weight of zero would not keep Inf and NaN from the positions of other runs.
    """
    if not decays.has_runs:
        return u, None
    finite = u - u == 0.0
    earlier, spoilt = (value.astype(jnp.bfloat16) for value in (decays.kept(1.0), jnp.where(finite, 0.0, 1.0)))
    lost = lax.dot(earlier, spoilt, preferred_element_type=jnp.float32) > 0.0
    return jnp.where(finite, u, 0.0), lost


def _passed(decay, value):
    """The value by its decay. Where that is zero, Inf and NaN are left too."""
    return jnp.where(decay == 0.0, 0.0, decay * value)


def _product_of(x):
    """The product for a call: bfloat16 is multiplied as it is, and float32 in all of its digits."""
    return _narrow_product if x.dtype == jnp.bfloat16 else _product


def _product(a, b, of_a: int, of_b: int, precision=lax.Precision.HIGHEST):
    """A sum over axis `of_a` of a and axis `of_b` of b, in float32."""
    dimensions = (((of_a,), (of_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _narrow_product(a, b, of_a: int, of_b: int):
    return _product(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), of_a, of_b, precision=None)


def _tiles(x, width: int) -> list[_Tile]:
    return [_Tile(index, width) for index in range(x.shape[1] // LANES)]


def _positions(axis: int):
    return lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis)


def _lane(shape):
    return lax.broadcasted_iota(jnp.int32, shape, 1)
