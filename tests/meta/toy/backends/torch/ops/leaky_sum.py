import torch

from mamba_core.backends.torch.positions import call_of
from mamba_core.kernels import choose
from mamba_core.spec import ops

check_sum = ops.public()["leaky_sum"].forward.__globals__["check_sum"]


def leaky_sum(x, decay, *, initial_state=None, return_final_state=False, mask=None, segment_ids=None, kernel="auto"):
    check_sum(x, decay, initial_state, mask, segment_ids)
    choose(kernel, KERNELS, "leaky_sum")
    call = call_of(mask, segment_ids, length=x.shape[1])
    y, state = sum_over(call, x, decay, initial_state)
    return (y, state) if return_final_state else y


def sum_over(call, x, decay, state):
    dtype, x, decay = x.dtype, x.float(), decay.float()
    if state is None:
        state = x.new_zeros(x.shape[0], x.shape[2], 2, 3)
    powers = torch.tensor([[1.0], [2.0]], device=x.device)
    factors = torch.tensor([1.0, 2.0, 3.0], device=x.device)
    keep, outputs = torch.sigmoid(decay)[:, None, None] ** powers, []
    for t in range(x.shape[1]):
        before = state
        if call.restart is not None:
            before = torch.where(call.restart[:, t, None, None, None], 0.0, before)
        after = keep * before + x[:, t, :, None, None] * factors
        counts = None if call.mask is None else call.mask[:, t, None, None, None]
        state = after if counts is None else torch.where(counts, after, state)
        y = state.sum((2, 3))
        outputs.append(y if counts is None else torch.where(call.mask[:, t, None], y, 0.0))
    return (torch.stack(outputs, 1) if outputs else x).to(dtype), state


def leaky_sum_step(x, decay, *, state):
    y, state = leaky_sum(x[:, None], decay, initial_state=state, return_final_state=True)
    return y[:, 0], state


KERNELS = {"plain": None}


def kernels(device=None, *_):
    return dict.fromkeys(KERNELS)
