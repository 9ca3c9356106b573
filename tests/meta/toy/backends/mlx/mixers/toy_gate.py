"""A feed-forward: down(silu(up(x)))."""

import mlx.nn as nn


class Gate(nn.Module):
    def __init__(self, config, layer, options):
        super().__init__()
        self.up = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.down = nn.Linear(3 * config.d_model, config.d_model, bias=False)

    def __call__(self, hidden, call):
        active = call.observe("active", nn.silu(call.observe("up", self.up(hidden))))
        return call.observe("down", self.down(active))


Mixer = Gate
