"""Broken MLX backends: small realistic faults, under the property of the conformance suite that must reject them."""

# ruff: noqa: E501 (a row is a mutant)

from pathlib import Path

from tests.meta import broken
from tests.meta.broken import Mutant

SCAN, CONV, NORM, S6 = "ops/selective_scan.py", "ops/causal_conv.py", "ops/rms_norm.py", "mixers/s6.py"
SSD = "kernels/chunked_ssd.py"

CAUGHT_BY = {
    "test_every_kernel_equals_the_recurrence": {
        "no SiLU on the gate": Mutant(SCAN, "else linear * nn.silu(z)", "else linear * z"),
        "D missing": Mutant(SCAN, "linear if D is None else linear + D * x", "linear"),
        "dt bias added twice": Mutant(SCAN, "delta + _float32(delta_bias)", "delta + 2 * _float32(delta_bias)"),
        "softplus missing": Mutant(SCAN, "mx.logaddexp(delta, 0.0) if delta_softplus else delta", "delta"),
        "an exponential a little off": Mutant("kernels/exponential.py", "0.49999993", "0.4999"),
        "initial state ignored": Mutant(SCAN, "h, firsts, linear = h0, [], []", "h, firsts, linear = 0 * h0, [], []"),
        "state does not cross chunks": Mutant(SCAN, "else restart[:, chunk]) + added[:, chunk]", "else restart[:, chunk])"),
        "a chunk decays by its first step only": Mutant(SCAN, "_decay(block.step.sum(axis=0), A)", "_decay(block.step[0], A)"),
        "gradient does not cross chunks": Mutant(SCAN, "_carry(plan, block, A, g, starts,", "_carry(plan, block, A, g, 0 * starts,"),
        "final state's gradient ignored": Mutant(SCAN, "    dlinear, g, _ = cotangents\n", "    dlinear, g = cotangents[0], 0 * cotangents[1]\n"),
        "dA of the last position only": Mutant(SCAN, "dA = dA + (dlog_decay", "dA = 0 * dA + (dlog_decay"),
        "dstep misses the path through B": Mutant(SCAN, "(dlog_decay * A).sum(axis=-1) + gB * x", "(dlog_decay * A).sum(axis=-1)"),
        "parts of the gradient in the order they were computed": Mutant(SCAN, "_merge(plan, part[::-1])", "_merge(plan, part)"),
    },
    "test_every_kernel_equals_the_recurrence_where_it_restarts": {
        "groups tiled": Mutant("ops/ssd_step.py", "mx.repeat(value, x.shape[1] // value.shape[1], axis=1)", "mx.tile(value, (1, x.shape[1] // value.shape[1], 1))"),
        "segments mixed within a chunk": Mutant(SSD, "earlier = earlier & (run[..., :, None] == run[..., None, :])", "pass"),
        "an earlier segment left in the state": Mutant(SSD, "to_end = mx.where(run != run[..., -1:], -mx.inf, to_end)", "pass"),
        "the state passed to the next segment": Mutant(SSD, "from_start = mx.where(run > 0, -mx.inf, from_start)", "pass"),
    },
    "test_short_steps_after_a_long_one_keep_their_digits": {
        "decays of rounded sums": Mutant(SSD, "mx.round(log_decay * GRID) / GRID", "log_decay"),
    },
    "test_every_node_equals_the_reference": {
        "B and C swapped": Mutant(S6, 'call.observe("B", B), call.observe("C", C)', 'call.observe("B", C), call.observe("C", B)'),
        "conv taps reversed": Mutant(CONV, "* weight[:, j]", "* weight[:, -1 - j]"),
        "conv without its SiLU": Mutant(CONV, "return _activate(total, activation)", "return total"),
        "norm eps ignored": Mutant(NORM, "factor, eps)", "factor, 1e-5)"),
        "head of the embedding when untied": Mutant("heads/lm.py", "if head is not None:", "if False:"),
        "nodes under another layer's name": Mutant("stack.py", 'f"layers.{done}."', 'f"layers.{len(blocks) - 1 - done}."'),
    },
    "test_steps": {
        "conv state off by one": Mutant(CONV, "return y.astype(x.dtype), inputs[:, 1:]", "return y.astype(x.dtype), inputs[:, :-1]"),
        "D missing in the step": Mutant(SCAN, "_output(_contract(h, C), x, D, z).astype(dtype), h", "_output(_contract(h, C), x, None, z).astype(dtype), h"),
    },
    "test_each_row_alone": {
        "decay runs on padding": Mutant(SCAN, "step, A = where_counting(mask, _step_size(delta, delta_bias, delta_softplus)),", "step, A = _step_size(delta, delta_bias, delta_softplus),"),
        "conv over padding": Mutant(CONV, "x = _permute(mx.where(mask[..., None], x, mx.array(0, x.dtype)), call.order)", "x = mx.where(mask[..., None], x, mx.array(0, x.dtype))"),
        "conv state from the end of a padded row": Mutant(CONV, "inputs.shape[1] if mask is None else", "inputs.shape[1] if True else"),
        "logits of masked positions": Mutant("model.py", "        if mask is not None and values.size:\n", "        if False:\n"),
    },
    "test_masked_positions_do_not_leak_what_is_not_finite": {
        "masked inputs not cleared": Mutant(SCAN, "x, delta, B, C, z = (where_counting(mask, value) for", "x, delta, B, C, z = (value for"),
    },
    "test_the_whole": {
        "restart ignored by the scan": Mutant(SCAN, "decay * (value if restart is None else", "decay * (value if True else"),
        "restart ignored by the conv": Mutant(CONV, "        if runs is None:\n            taps", "        if True:\n            taps"),
        "restart ignored by the conv state": Mutant(CONV, "if runs is None or carried == 0:", "if True:"),
        "restart at masked positions": Mutant("positions.py", "return restart if mask is None else restart & mask", "return restart"),
        "last position of another segment": Mutant("positions.py", "mx.where(mask, position, -1)", "position"),
    },
    "test_half_precision_rounds_once": {
        "norm in half precision": Mutant(NORM, "mx.fast.rms_norm(x.astype(mx.float32), factor", "mx.fast.rms_norm(x.astype(dtype), factor"),
        "step rounded after its bias": Mutant(SCAN, "else delta + _float32(delta_bias)", "else (delta + _float32(delta_bias)).astype(mx.bfloat16)"),
    },
    "test_parameters_are_the_table": {
        "A stored in half precision": Mutant("weights.py", "dtype=parameter.dtype(dtype)", "dtype=dtype"),
        "conv weight's axes as MLX has them": Mutant("weights.py", "swap_axes(value) if name in convolutions", "value if name in convolutions"),
    },
    "test_initial_state": {
        "state in half precision": Mutant("state.py", 'kind == "compute"', 'kind != "int32"'),
    },
    "test_split_with_the_carried_state": {
        "segment not carried": Mutant("state.py", "keep = ~counts | (first == state.segment)", "keep = ~counts | (first == first)"),
        "state's segment forgotten": Mutant("state.py", "mx.where(counts, last, state.segment)", "mx.where(counts, last * 0, state.segment)"),
    },
    "test_masks_and_segments_together_equal_the_reference": {
        "segment of the last position, counting or not": Mutant("state.py", "flipped = None if mask is None else mask[:, ::-1]", "flipped = None"),
    },
    "test_a_prefill_gives_the_last_logits_and_the_state": {
        "gate of the first position": Mutant(S6, "project_rows(mixer, hidden[:, -1:]", "project_rows(mixer, hidden[:, :1]"),
        "residual stream of the first position": Mutant("blocks.py", "residual[:, -hidden.shape[1] :]", "residual[:, : hidden.shape[1]]"),
        "scan's output at the first position": Mutant(S6, "y[:, -z.shape[1] :]", "y[:, : z.shape[1]]"),
        "bias missing in MiniMamba's scan": Mutant("mixers/minimamba.py", "else 2 * bias", "else bias"),
        "MiniMamba's gate with a SiLU": Mutant("mixers/minimamba.py", "s6.at_positions_of(z, y) * z", "s6.at_positions_of(z, y) * nn.silu(z)"),
    },
    "test_padded_vocabulary_is_never_produced": {
        "padded vocabulary produced": Mutant("decoding.py", "[:, : model.config.vocab_size]", ""),
    },
    "test_a_row_does_not_depend_on_its_neighbours": {
        "padding read as tokens": Mutant("decoding.py", "None if mask.all() else", "None if True else"),
    },
    "test_sampling_inverts_the_distribution": {
        "top_k off by one": Mutant("decoding.py", "rank < sampling.top_k,", "rank <= sampling.top_k,"),
        "one uniform for all rows": Mutant("decoding.py", "uniform[:, None]", "uniform[:1, None]"),
    },
    "test_penalties_follow_what_is_generated": {
        "generated tokens not counted": Mutant("decoding.py", "counts=counts", "counts=context.counts"),
    },
    "test_turns_go_on_from_the_state": {
        "prefill forgets the state": Mutant("decoding.py", "if fresh else states", "if True else states"),
    },
    "test_twenty_steps_equal_the_reference": {
        "decay of every parameter": Mutant("training.py", "table[name].decay if name in table else value.ndim >= 2", "True"),
        "no clipping": Mutant("training.py", "self.settings.clip_norm)", "1e9)"),
        "targets not shifted": Mutant("heads/lm.py", "_cross_entropy(model, logits, tokens[:, 1:])", "_cross_entropy(model, logits, tokens[:, :-1])"),
    },
}  # fmt: skip


MUTANTS = broken.by_name(CAUGHT_BY)


def use(name: str, folder: Path) -> None:
    broken.use("mlx", name, MUTANTS[name], folder)
