"""Broken JAX backends: each stands under the property of the conformance suite that must reject it."""

# ruff: noqa: E501 (a row is a mutant)

from pathlib import Path

from tests.meta import broken
from tests.meta.broken import Mutant

SCAN, CONV, S6 = "ops/selective_scan.py", "ops/causal_conv.py", "mixers/s6.py"

CAUGHT_BY = {
    "test_every_kernel_equals_the_recurrence": {
        "chunked: gradient across restarts": Mutant(SCAN, "passed = _restarted(restart, decay * g)", "passed = decay * g"),
        "chunked: gradient of the decay from the state after": Mutant(SCAN, "return passed, (g, passed * before)", "return passed, (g, g * before)"),
        "associative: restart forgotten where parts join": Mutant(SCAN, "None if restart is None else restart | first[2]", "restart"),
        "associative: initial state ignored": Mutant(SCAN, "increment.at[start].add(decay[start] * h)", "increment.at[start].add(0 * h)"),
        "associative: gradient one position early": Mutant(SCAN, "direct + jnp.concatenate([passed[1:], dh[None]])", "direct + passed"),
        "dstep misses the path through B": Mutant(SCAN, "jnp.ones_like(B)) + gB * x", "jnp.ones_like(B))"),
        "dA without the step": Mutant(SCAN, "dlog_decay * step[:, :, None]", "dlog_decay"),
        "state zeroed between chunks": Mutant(SCAN, "        return h, _output(linear, x, D, z).astype(dtype)", "        return 0 * h, _output(linear, x, D, z).astype(dtype)"),
        "conv: gradient's taps reversed": Mutant(CONV, "through_tap = weight[:, tap]", "through_tap = weight[:, carried - tap]"),
        "conv: initial state's gradient one position off": Mutant(CONV, "dstate += _moved(through_tap, tap, carried)", "dstate += _moved(through_tap, tap - 1, carried)"),
        "conv: a tap before the restart": Mutant(CONV, "    if run is None:\n        return values\n", "    return values\n"),
        "conv: state of the run before": Mutant(CONV, "state = jnp.where(in_last_run[..., None], state, 0)", "state = state"),
    },
    "test_masked_positions_do_not_leak_what_is_not_finite": {
        "what is masked not cleared": Mutant(SCAN, "x, delta, B, C, z = (where_counting(mask, value) for", "x, delta, B, C, z = (value for"),
    },
    "test_every_node_equals_the_reference": {
        "B and C swapped": Mutant(S6, 'call.observe("B", B), call.observe("C", C)', 'call.observe("B", C), call.observe("C", B)'),
        "conv taps reversed": Mutant("weights.py", "    return np.moveaxis(value, (0, 1), (-1, -2))", "    return np.moveaxis(value, (0, 1), (-1, -2))[::-1]"),
        "norm eps ignored": Mutant("ops/rms_norm.py", "keepdims=True) + eps", "keepdims=True) + 1e-5"),
        "head of the embedding when untied": Mutant("heads/lm.py", "_head(config, options))\n", "None)\n"),
        "MiniMamba's bias once": Mutant("mixers/minimamba.py", "else 2 * bias", "else bias"),
    },
    "test_masks_and_segments_together_equal_the_reference": {
        "segment of the last position, counting or not": Mutant("state.py", "flipped = None if call.mask is None else call.mask[:, ::-1]", "flipped = None"),
        "restart at masked positions": Mutant("positions.py", "return valid & (previous >= 0)", "return (previous >= 0)"),
    },
    "test_steps": {
        "conv state off by one": Mutant(CONV, "jnp.concatenate([state, x], axis=1)[:, 1:]", "jnp.concatenate([state, x], axis=1)[:, :-1]"),
        "D missing in the step": Mutant(SCAN, "return _output(linear, x, D, z).astype(dtype), h\n\n\ndef kernels", "return _output(linear, x, None, z).astype(dtype), h\n\n\ndef kernels"),
    },
    "test_parameters_are_the_table": {
        "A stored in half precision": Mutant("weights.py", "dtype=parameter.dtype(dtype)", "dtype=dtype"),
    },
    "test_initial_state": {
        "state in half precision": Mutant("state.py", 'kind == "compute"', 'kind != "int32"'),
    },
    "test_a_prefill_gives_the_last_logits_and_the_state": {
        "the last position's gate without SiLU": Mutant("mixers/mamba.py", "y[:, -1:] * jax.nn.silu(z)", "y[:, -1:] * z"),
    },
    "test_padded_vocabulary_is_never_produced": {
        "padded vocabulary produced": Mutant("decoding.py", "[:, : model.config.vocab_size]", ""),
    },
    "test_turns_go_on_from_the_state": {
        "prefill forgets the state": Mutant("decoding.py", "if state is None else states", "if True else states"),
    },
    "test_sampled_tokens_are_those_of_the_definition": {
        "the first block's random numbers for ever": Mutant("decoding.py", "draw(made, BLOCK)", "draw(0, BLOCK)"),
    },
    "test_twenty_steps_equal_the_reference": {
        "targets not shifted": Mutant("heads/lm.py", "tokens[:, :-1], tokens[:, 1:]\n", "tokens[:, :-1], tokens[:, :-1]\n"),
    },
}  # fmt: skip


MUTANTS = broken.by_name(CAUGHT_BY)


def use(name: str, folder: Path) -> None:
    broken.use("jax", name, MUTANTS[name], folder)
