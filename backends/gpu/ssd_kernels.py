"""The recurrence of Mamba-2 in Triton, for the matrix units of an NVIDIA GPU, and its gradient.

A sequence is cut into chunks of `Q` positions, and the chunks into segments. `steps` computes the step sizes and the
sums of the logarithms of the decays in each chunk. `adds` and `states` carry a state through a segment: forward, what
x and B add to it; backward, its gradient, to which dy and C add. `forward` carries the state through a segment and
computes y. `gates` computes the gradient of the gate. `of_queries` and `of_keys` compute the gradients of x, B, C and D
in a chunk for some heads of a group, from the states around it, and `of_steps` those of the step sizes from what they
leave. `totals` sums over chunks.

A chunk computes as `kernels/chunked_ssd.py` of each framework does: y_i is the sum over j <= i of
(C_i B_j) exp(a_{j+1} + ... + a_i) step_j x_j, and of exp(a_1 + ... + a_i) h C_i, with a = step A. A position that
begins anew has the least a, of which exp is zero.

EXACT, for float32: the sums of a stand in two parts, of which the first is exact on a grid, so that differences are
exact too. Otherwise the first part is the whole sum, and the second the same less the logarithm of the step size, both
to the base 2.

EVEN: the length is a number of whole chunks, and there is no mask.

Names of axes: i and j positions of a chunk, p and n. States are (n, p) here. P and N are padded to powers of 2.
Of a sequence, `_batch` and `_row` are the strides of its first two axes; the others are dense.
"""

from mamba_core.backends.gpu.ssd_forward import forward, steps
from mamba_core.backends.gpu.ssd_gradient import gates, of_keys, of_queries, of_steps, totals
from mamba_core.backends.gpu.ssd_parts import Q
from mamba_core.backends.gpu.ssd_states import adds, states

__all__ = ["Q", "adds", "forward", "gates", "of_keys", "of_queries", "of_steps", "states", "steps", "totals"]
