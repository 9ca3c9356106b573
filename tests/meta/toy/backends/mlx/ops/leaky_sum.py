import mlx.core as mx

from mamba_core.backends.mlx.positions import call_of
from mamba_core.kernels import choose
from mamba_core.spec import ops

check_sum = ops.public()["leaky_sum"].forward.__globals__["check_sum"]


def leaky_sum(x, decay, *, initial_state=None, return_final_state=False, mask=None, segment_ids=None, kernel="auto"):
    check_sum(x, decay, initial_state, mask, segment_ids)
    choose(kernel, KERNELS, "leaky_sum")
    y, state = sum_over(call_of(mask, segment_ids, length=x.shape[1]), x, decay, initial_state)
    return (y, state) if return_final_state else y


def sum_over(call, x, decay, state):
    dtype, x, decay = x.dtype, x.astype(mx.float32), decay.astype(mx.float32)
    if state is None:
        state = mx.zeros((x.shape[0], x.shape[2], 2, 3))
    keep = mx.sigmoid(decay)[:, None, None] ** mx.array([[1.0], [2.0]])
    outputs = []
    for t in range(x.shape[1]):
        before = state
        if call.restart is not None:
            before = mx.where(call.restart[:, t, None, None, None], 0.0, before)
        after = keep * before + x[:, t, :, None, None] * mx.array([1.0, 2.0, 3.0])
        state = after if call.mask is None else mx.where(call.mask[:, t, None, None, None], after, state)
        y = state.sum(axis=(2, 3))
        outputs.append(y if call.mask is None else mx.where(call.mask[:, t, None], y, 0.0))
    return (mx.stack(outputs, axis=1) if outputs else x).astype(dtype), state


def leaky_sum_step(x, decay, *, state):
    y, state = leaky_sum(x[:, None], decay, initial_state=state, return_final_state=True)
    return y[:, 0], state


KERNELS = {"plain": None}


def kernels(device=None, *_):
    return dict.fromkeys(KERNELS)
