"""The mean of all inputs so far; their history grows."""

import torch
from torch import nn

from mamba_core.spec.state import layer_type


class History(nn.Module):
    def __init__(self, config, layer, options):
        super().__init__()
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, hidden, state, call):
        history, filled = state
        batch, length, width = hidden.shape
        valid = torch.ones(batch, length, dtype=torch.bool, device=hidden.device) if call.mask is None else call.mask
        count = filled[:, None] + valid.int().cumsum(1)
        x = torch.where(valid[..., None], hidden.float(), 0.0)
        # What does not count is written behind the capacity, and dropped.
        places = torch.where(valid, count - 1, history.shape[1]).long()
        room = torch.cat([history, history.new_zeros(batch, 1, width)], 1)
        history = room.scatter(1, places[..., None].expand(-1, -1, width), x.to(history.dtype))[:, :-1]
        earlier = torch.arange(state.history.shape[1], device=hidden.device) < filled[:, None]
        before = torch.where(earlier[..., None], state.history.float(), 0.0).sum(1, keepdim=True)
        y = (before + x.cumsum(1)) / count.clamp(min=1)[..., None]
        y = torch.where(valid[..., None], y, 0.0).to(hidden.dtype)
        after = layer_type(("history", "filled"))(history, (filled + valid.sum(1)).int())
        return call.observe("out_proj", self.out_proj(call.observe("mean", y))), after


Mixer = History
