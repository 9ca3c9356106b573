"""Argument checks of the ops, shared by the reference and every backend.

They look at `.shape` and `.dtype` only, so any framework's arrays pass through. The message says which
argument, what it was and what was expected.
"""


def check_scan(x, delta, A, B, C, D, z, delta_bias, initial_state, mask, segment_ids) -> None:
    """Check the arguments of `selective_scan`; see `mamba_core.backend` for their shapes.

    Raises:
        TypeError: an argument is not an array, or not of real floating-point numbers, or `mask` is not boolean.
        ValueError: a shape does not fit, or the batch is empty.
    """
    batch, length, channels = _shape("x", x, ("b", "l", "e"))
    _, states = _shape("A", A, ("e", "n"))
    if batch == 0:
        raise ValueError("x has batch 0; expected at least one row")
    if channels == 0 or states == 0:
        raise ValueError(f"x has {channels} channels and A {states} states; expected at least one of each")
    sequence = {"delta": delta, "z": z}
    for name, value in sequence.items():
        _expect(name, value, (batch, length, channels), "(b, l, e)")
    _expect("A", A, (channels, states), "(e, n)")
    for name, value in {"B": B, "C": C}.items():
        _expect(name, value, (batch, length, states), "(b, l, n)")
    for name, value in {"D": D, "delta_bias": delta_bias}.items():
        _expect(name, value, (channels,), "(e,)")
    _expect("initial_state", initial_state, (batch, channels, states), "(b, e, n)")
    _check_positions(batch, length, mask, segment_ids)
    _expect_floats({"x": x, "A": A, "B": B, "C": C, **sequence})


def check_step(x, delta, A, B, C, D, z, delta_bias, state) -> None:
    """Check the arguments of `selective_step`: those of one position, without the length axis."""
    batch, channels = _shape("x", x, ("b", "e"))
    _, states = _shape("A", A, ("e", "n"))
    if batch == 0:
        raise ValueError("x has batch 0; expected at least one row")
    for name, value in {"delta": delta, "z": z}.items():
        _expect(name, value, (batch, channels), "(b, e)")
    _expect("A", A, (channels, states), "(e, n)")
    for name, value in {"B": B, "C": C}.items():
        _expect(name, value, (batch, states), "(b, n)")
    for name, value in {"D": D, "delta_bias": delta_bias}.items():
        _expect(name, value, (channels,), "(e,)")
    if state is None:
        raise ValueError("selective_step needs state=(b, e, n); start from zeros")
    _expect("state", state, (batch, channels, states), "(b, e, n)")
    _expect_floats({"x": x, "delta": delta, "A": A, "B": B, "C": C, "z": z})


def check_conv(x, weight, bias, activation, initial_state, mask, segment_ids) -> None:
    """Check the arguments of `causal_conv`."""
    batch, length, channels = _shape("x", x, ("b", "l", "e"))
    if batch == 0:
        raise ValueError("x has batch 0; expected at least one row")
    _check_filter(channels, weight, bias, activation)
    _expect("initial_state", initial_state, (batch, weight.shape[1] - 1, channels), "(b, k-1, e)")
    _check_positions(batch, length, mask, segment_ids)
    _expect_floats({"x": x, "weight": weight})


def check_conv_step(x, weight, bias, activation, state) -> None:
    """Check the arguments of `causal_conv_step`."""
    batch, channels = _shape("x", x, ("b", "e"))
    if batch == 0:
        raise ValueError("x has batch 0; expected at least one row")
    _check_filter(channels, weight, bias, activation)
    if state is None:
        raise ValueError("causal_conv_step needs state=(b, k-1, e); start from zeros")
    _expect("state", state, (batch, weight.shape[1] - 1, channels), "(b, k-1, e)")


def _check_filter(channels, weight, bias, activation) -> None:
    _, width = _shape("weight", weight, ("e", "k"))
    if width < 1:
        raise ValueError("weight has width 0; expected at least one tap")
    _expect("weight", weight, (channels, width), "(e, k)")
    _expect("bias", bias, (channels,), "(e,)")
    if activation not in (None, "silu"):
        raise ValueError(f"activation is {activation!r}; expected None or 'silu'")


def _check_positions(batch, length, mask, segment_ids) -> None:
    _expect("mask", mask, (batch, length), "(b, l)")
    _expect("segment_ids", segment_ids, (batch, length), "(b, l)")
    if mask is not None and "bool" not in str(mask.dtype):
        raise TypeError(f"mask is {mask.dtype}; expected bool, True where a position counts (try mask != 0)")
    if segment_ids is not None and "int" not in str(segment_ids.dtype):
        raise TypeError(f"segment_ids is {segment_ids.dtype}; expected integers")


def _expect_floats(arrays: dict) -> None:
    for name, value in arrays.items():
        if value is not None and "float" not in str(value.dtype):
            raise TypeError(f"{name} is {value.dtype}; expected real floating-point numbers")


def _shape(name, value, letters) -> tuple[int, ...]:
    if value is None or not hasattr(value, "shape"):
        raise TypeError(f"{name} is {type(value).__name__}; expected an array ({', '.join(letters)})")
    if len(value.shape) != len(letters):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected ({', '.join(letters)})")
    return tuple(value.shape)


def _expect(name, value, shape, letters) -> None:
    if value is None:
        return
    if not hasattr(value, "shape"):
        raise TypeError(f"{name} is {type(value).__name__}; expected an array {letters} = {shape}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {letters} = {shape}")


def check_inputs(config, inputs, mask, segment_ids) -> None:
    """Check the arguments of a model's call: inputs are input_ids, or inputs_embeds for task "layers".

    Raises:
        TypeError: input_ids or segment_ids are not integers, inputs_embeds no floats, or `mask` is not boolean.
        ValueError: a shape does not fit, or the batch is empty.
    """
    if config.task == "layers":
        batch, length, _ = _shape("inputs_embeds", inputs, ("b", "l", "d"))
        _expect("inputs_embeds", inputs, (batch, length, config.d_model), "(b, l, d)")
        _expect_floats({"inputs_embeds": inputs})
    else:
        batch, length = _shape("input_ids", inputs, ("b", "l"))
        if "int" not in str(inputs.dtype):
            raise TypeError(f"input_ids is {inputs.dtype}; expected integers")
    if batch == 0:
        raise ValueError("the input has batch 0; expected at least one row")
    _check_positions(batch, length, mask, segment_ids)


def check_task(config, use: str) -> None:
    """Check that a model is a language model, for a use that needs its logits.

    Raises:
        ValueError: it has no head.
    """
    if config.task != "lm":
        raise ValueError(f"the model is of task {config.task!r}, without a head; {use} needs one of task 'lm'")


def check_targets(tokens) -> None:
    """Check that tokens (b, l + 1) have something to predict.

    Raises:
        ValueError: fewer than two positions, or another number of axes.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}; expected (b, l + 1) with two positions at least: "
            "the loss is of each token given those before it"
        )


def check_state(config, batch: int, state) -> None:
    """Check the state that a model's call goes on from.

    Raises:
        TypeError: it is not a `State` of as many layers as the config has.
        ValueError: it is of another batch.
    """
    layers, segment = getattr(state, "layers", None), getattr(state, "segment", None)
    if segment is None or not isinstance(layers, tuple) or len(layers) != config.n_layer:
        raise TypeError(f"state is {type(state).__name__}; expected a State of {config.n_layer} layers")
    # No set of shapes: torch.export's symbolic sizes have no hash.
    if any(shape != (batch,) for shape in (segment.shape, *(value.shape[:1] for layer in layers for value in layer))):
        raise ValueError(f"state is of another batch than input_ids, {batch}; its segment has shape {segment.shape}")


def choose_device(device: str | None, available: list[str]) -> str:
    """The device of that name, or for None the first of `Backend.devices`.

    Raises:
        ValueError: there is no such device here.
    """
    if device is None:
        return available[0]
    if device not in available:
        raise ValueError(f"device is {str(device)!r}; here there is {', '.join(available)}")
    return device


def choose_kernel(kernel: str, available: dict[str, str | None]) -> str:
    """The kernel of that name, or for "auto" the first that runs, of `Backend.kernels`.

    Raises:
        ValueError: no such kernel, or it cannot run here.
    """
    running = [name for name, reason in available.items() if reason is None]
    if kernel == "auto":
        return running[0]
    if kernel not in available:
        raise ValueError(f"no kernel {kernel!r}; expected 'auto' or one of {', '.join(available)}")
    if kernel not in running:
        raise ValueError(f"kernel {kernel!r} cannot run here: {available[kernel]}; these can: {', '.join(running)}")
    return kernel
