"""Broken backends: small realistic faults, each a change of a few characters in a copy of the PyTorch backend.

They stand under the property of the conformance suite that must reject them.

`use(name, folder)` makes that copy and puts it where `mamba_core.backends.torch` is looked for.
"""

# ruff: noqa: E501 (a row is a mutant)

from pathlib import Path

from tests.meta import broken
from tests.meta.broken import Mutant

SSD = "kernels/chunked_ssd.py"

CAUGHT_BY = {
    "test_every_kernel_equals_the_recurrence": {
        "no SiLU on the gate": Mutant("ops/selective_scan.py", "else linear * F.silu(z)", "else linear * z"),
        "gate's gradient without its derivative": Mutant("ops/selective_scan.py", "linear * _silu_derivative(z[", "linear * F.silu(z["),
        "dt bias added twice": Mutant("ops/selective_scan.py", "else delta + delta_bias", "else delta + 2 * delta_bias"),
        "softplus missing": Mutant("ops/selective_scan.py", "threshold=40.0) if delta_softplus else raw", "threshold=40.0) if 0 else raw"),
        "softplus cut off early": Mutant("ops/selective_scan.py", "F.softplus(raw, threshold=40.0)", "F.softplus(raw, threshold=2.0)"),
        "exp of the wrong sign": Mutant("ops/selective_scan.py", "torch.mul(step[:, :, None], A, out", "torch.mul(step[:, :, None], -A, out"),
        "B not multiplied by the step": Mutant("ops/selective_scan.py", "torch.mul((step * x)[:, :, None], B", "torch.mul(x[:, :, None], B"),
        "state zeroed between chunks": Mutant("ops/selective_scan.py", "boundaries[:, index + 1] = states[:, -1]",
                                          "boundaries[:, index + 1] = states[:, -1] * (index % 2)"),
        "initial state ignored": Mutant("ops/selective_scan.py", "boundaries[:, 0] = h0.mT", "boundaries[:, 0] = 0.0"),
        "initial state's gradient missing": Mutant("ops/selective_scan.py", "*optional, arriving.mT.contiguous()", "*optional, 0 * arriving.mT.contiguous()"),
        "final state's gradient ignored": Mutant("ops/selective_scan.py", "if dh_last is None else dh_last.mT.clone()", "if 1 else dh_last"),
        "dA misses the carried term": Mutant("ops/selective_scan.py", "    decay_t[0].mul_(before)\n", "    decay_t[0].zero_()\n"),
        "gradient does not cross chunks": Mutant("ops/selective_scan.py", "[:, -1] += arriving", "[:, -1] += 0 * arriving"),
        "dstep misses the path through B": Mutant("ops/selective_scan.py", ".sum(2) + gB * x_part", ".sum(2)"),
        "D missing": Mutant("ops/selective_scan.py", "linear if D is None else torch.addcmul(linear, D, x)", "linear"),
    },
    "test_every_kernel_equals_the_recurrence_where_it_restarts": {
        "groups tiled": Mutant("ops/ssd.py", "value.repeat_interleave(x.shape[1] // value.shape[1], dim=1)", "value.repeat(1, x.shape[1] // value.shape[1], 1)"),
        "segments mixed within a chunk": Mutant(SSD, "earlier = earlier & (run[..., :, None] == run[..., None, :])", "pass"),
        "an earlier segment left in the state": Mutant(SSD, "to_end.masked_fill(run != run[..., -1:], -torch.inf)", "to_end"),
        "the state passed to the next segment": Mutant(SSD, "from_start.masked_fill(run > 0, -torch.inf)", "from_start"),
    },
    "test_short_steps_after_a_long_one_keep_their_digits": {
        "decays of rounded sums": Mutant(SSD, "torch.round(log_decay * GRID[dtype]) / GRID[dtype]", "log_decay"),
    },
    "test_steps_beyond_the_limit_are_the_limit_and_have_no_gradient": {
        "no limit": Mutant("ops/ssd.py", "else step.clamp(*dt_limit)", "else step"),
        "gradient of a limited step": Mutant("ops/ssd.py", "else step.clamp(*dt_limit)", "else step + (step.clamp(*dt_limit) - step).detach()"),
    },
    "test_softplus_is_exact_at_both_ends": {
        "naive softplus": Mutant("ops/selective_scan.py", "F.softplus(raw, threshold=40.0)", "torch.log(1 + torch.exp(raw))"),
    },
    "test_every_node_equals_the_reference": {
        "B and C swapped": Mutant("mixers/s6.py", 'call.observe("B", B), call.observe("C", C)', 'call.observe("B", C), call.observe("C", B)'),
        "conv taps reversed": Mutant("ops/causal_conv.py", "weight[:, tap])", "weight[:, width - 1 - tap])"),
        "conv without its SiLU": Mutant("ops/causal_conv.py", "F.silu(value) if activation", "value if activation"),
        "norm eps ignored": Mutant("ops/rms_norm.py", "keepdim=True) + eps", "keepdim=True) + 1e-5"),
        "norm over the sum": Mutant("ops/rms_norm.py", "x.square().mean(", "x.square().sum("),
        "head of the embedding when untied": Mutant("heads/lm.py", "        if self.lm_head is not None:\n", "        if False:\n"),
        "ids shifted": Mutant("model.py", "self.embeddings(input_ids)", "self.embeddings((input_ids + 1) % 11)"),
    },
    "test_steps": {
        "D missing in the step": Mutant("ops/selective_scan.py", "return _output(linear, x, D, z).to(dtype), h", "return _output(linear, x, None, z).to(dtype), h"),
        "step ignores the dt bias": Mutant("ops/selective_scan.py", "_step_size(delta, delta_bias, delta_softplus), A.clamp(",
                                       "_step_size(delta, None, delta_softplus), A.clamp("),
        "conv state off by one": Mutant("ops/causal_conv.py", "return y[:, 0].to(dtype), inputs[:, 1:].to(dtype)", "return y[:, 0].to(dtype), inputs[:, :-1].to(dtype)"),
        "conv bias missing in the step": Mutant("ops/causal_conv.py", "_filter(inputs, weight, bias, None)", "_filter(inputs, weight, None, None)"),
    },
    "test_each_row_alone": {
        "decay runs on padding": Mutant("ops/selective_scan.py", "step, A = where_counting(mask, _step_size(delta, delta_bias, delta_softplus)),",
                                    "step, A = _step_size(delta, delta_bias, delta_softplus),"),
        "mask applied after the conv only": Mutant("ops/causal_conv.py", "        x = _take(where_counting(mask, x), call.order)\n", "        x = where_counting(mask, x)\n"),
        "conv state from the end of a padded row": Mutant("ops/causal_conv.py", "if mask is None else mask.sum(1)", "if True else mask.sum(1)"),
        "logits of masked positions": Mutant("model.py", "        if mask is not None:\n", "        if False:\n"),
    },
    "test_masked_positions_do_not_leak_what_is_not_finite": {
        "what is masked not cleared": Mutant("ops/selective_scan.py", "x, delta, B, C, z = (where_counting(mask, value) for", "x, delta, B, C, z = (value for"),
    },
    "test_the_whole": {
        "final state in half precision": Mutant("ops/selective_scan.py", "return (y, h) if return", "return (y, h.to(x.dtype)) if return"),
        "restart ignored by the scan": Mutant("ops/selective_scan.py", "        if rows is not None:\n            h = h.masked_fill(rows, 0.0)\n", ""),
        "restart ignored in backward only": Mutant("ops/selective_scan.py", "        if restarting[t] is not None:\n            decay_t[t].masked_fill_(restarting[t], 0.0)\n", ""),
        "restart ignored by the conv": Mutant("ops/causal_conv.py", "if runs is not None and tap < width - 1:", "if False:"),
        "restart ignored by the conv state": Mutant("ops/causal_conv.py", "if runs is None or carried == 0:", "if True:"),
        "restart one position late": Mutant("positions.py", "differs[:, 1:] = segment_ids[:, 1:]", "differs[:, :-1] = segment_ids[:, 1:]"),
        "restart at masked positions": Mutant("positions.py", "gather(1, inverse) & mask", "gather(1, inverse)"),
    },
    "test_half_precision_rounds_once": {
        "norm in half precision": Mutant("ops/rms_norm.py", "    x = at_least_float32(x)\n", "    x = x.to(weight.dtype)\n"),
        "half-precision accumulation": Mutant("arrays.py", "else torch.float32\n", "else x.dtype\n"),
    },
    "test_parameters_are_the_table": {
        "A stored in half precision": Mutant("weights.py", "dtype=parameter.dtype(dtype)", "dtype=dtype"),
    },
    "test_initial_state": {
        "state in half precision": Mutant("state.py", 'kind == "compute"', 'kind != "int32"'),
    },
    "test_split_with_the_carried_state": {
        "segment not carried": Mutant("state.py", "keep = ~counts | (first == state.segment)", "keep = ~counts | (first == first)"),
        "state's segment forgotten": Mutant("state.py", "torch.where(counts, last, state.segment)", "torch.where(counts, last * 0, state.segment)"),
    },
    "test_masks_and_segments_together_equal_the_reference": {
        "segment of the last position, counting or not": Mutant("state.py", "flipped = None if mask is None else mask.flip(1)", "flipped = None"),
    },
    "test_padded_vocabulary_is_never_produced": {
        "padded vocabulary produced": Mutant("decoding.py", "[:, : model.config.vocab_size]", ""),
    },
    "test_a_row_does_not_depend_on_its_neighbours": {
        "padding read as tokens": Mutant("decoding.py", "None if mask.all() else", "None if True else"),
    },
    "test_sampling_inverts_the_distribution": {
        "top_k off by one": Mutant("decoding.py", "rank < sampling.top_k,", "rank <= sampling.top_k,"),
        "top_p drops the token that reaches it": Mutant("decoding.py", "(before < sampling.top_p", "(before + ranked < sampling.top_p"),
        "min_p of the wrong token": Mutant("decoding.py", "ranked[:, :1], ranked", "ranked[:, 1:2], ranked"),
        "temperature ignored": Mutant("decoding.py", "keepdim=True)) / sampling.temperature)", "keepdim=True)))"),
        "one uniform for all rows": Mutant("decoding.py", "uniform[:, None]", "uniform[:1, None]"),
    },
    "test_penalties_and_bias": {
        "bias ignored": Mutant("decoding.py", "logits = logits + context.bias", "pass"),
        "repetition forgets the prompt": Mutant("decoding.py", "context.prompt | generated", "generated"),
        "repetition forgets what is generated": Mutant("decoding.py", "context.prompt | generated", "context.prompt"),
        "presence as often as it is there": Mutant("decoding.py", "presence_penalty * generated", "presence_penalty * context.counts"),
        "frequency once": Mutant("decoding.py", "frequency_penalty * context.counts", "frequency_penalty * generated"),
    },
    "test_penalties_follow_what_is_generated": {
        "generated tokens not counted": Mutant("decoding.py", "counts=counts", "counts=context.counts"),
    },
    "test_processors_run_in_the_step_with_its_context": {
        "last token not carried": Mutant("decoding.py", "last=tokens", "last=context.last"),
        "step not counted": Mutant("decoding.py", "step=context.step + 1", "step=context.step"),
    },
    "test_what_has_no_token": {
        "NaN is a number": Mutant("decoding.py", "logprobs.gather(1, tokens[:, None])[:, 0], torch.nan)", "logprobs.gather(1, tokens[:, None])[:, 0], 0.0)"),
        "masked is NaN": Mutant("decoding.py", "torch.where(largest == -torch.inf, -torch.inf", "torch.where(largest == -torch.inf, torch.nan"),
    },
    "test_sampled_tokens_are_those_of_the_definition": {
        "the first block's random numbers for ever": Mutant("decoding.py", "draw(start, BLOCK)", "draw(0, BLOCK)"),
    },
    "test_several_continuations_of_each_prompt": {
        "forked in another order": Mutant("decoding.py", "torch.as_tensor(rows,", "torch.as_tensor(rows[::-1].copy(),"),
    },
    "test_turns_go_on_from_the_state": {
        "prefill forgets the state": Mutant("decoding.py", "if fresh else states", "if True else states"),
    },
    "test_ties_in_a_large_vocabulary": {
        "likeliest in any order": Mutant("decoding.py", "logprobs.sort(dim=-1, descending=True, stable=True)", "(value.flip(-1) for value in logprobs.sort(dim=-1))"),
    },
    "test_twenty_steps_equal_the_reference": {
        "decay of every parameter": Mutant("training.py", "if decays[name] == decay]", "if decay]"),
        "no clipping": Mutant("training.py", "self.settings.clip_norm)", "1e9)"),
        "rate of the next step": Mutant("training.py", "self.settings.rate(self.count)", "self.settings.rate(self.count + 1)"),
        "targets not shifted": Mutant("heads/lm.py", "tokens[:, :-1], tokens[:, 1:].long()", "tokens[:, :-1], tokens[:, :-1].long()"),
    },
    "test_the_optimizer_moves_between_backends": {
        "step count not restored": Mutant("training.py", 'self.count = int(state["step"])', "self.count = 0"),
    },
}  # fmt: skip


MUTANTS = broken.by_name(CAUGHT_BY)


def use(name: str, folder: Path) -> None:
    broken.use("torch", name, MUTANTS[name], folder)
