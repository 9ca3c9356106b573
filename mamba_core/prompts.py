"""What generation begins with: text, token ids, conversations and embeddings of any accepted form."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mamba_core import chat, registry
from mamba_core.tokenizer import Tokenizer, ids_of


def of_prompts(model, prompts, tokenizer: Tokenizer | None, goes_on: bool, limit: int) -> list[list[int]]:
    """Prompts of any accepted form as a list of token lists, empty ones only where nothing follows them."""
    config, rows = model.config, _rows(model, prompts)
    if len(rows) == 0:
        raise ValueError("prompts is empty; expected at least one")
    if any(isinstance(row, str) for row in rows) and tokenizer is None:
        raise ValueError("the prompts are text and the model has no tokenizer; pass tokenizer= or token ids")
    encode: Any = tokenizer and (tokenizer.encode_more if goes_on else tokenizer.encode)
    encoded = [encode(row) if isinstance(row, str) else row for row in rows]
    for row, tokens in enumerate(encoded):
        if not tokens and goes_on and limit:
            raise ValueError(f"prompt {row} is empty; going on from a state takes at least one token")
        if not tokens and not goes_on and config.bos_token_id is None:
            raise ValueError(f"prompt {row} is empty and the config has no bos_token_id; give at least one token")
        if not tokens and not goes_on:
            tokens.append(config.bos_token_id)
    return _checked(encoded, config)


def of_messages(model, messages: Any, tokenizer: Tokenizer | None, goes_on: bool) -> list[list[int]]:
    """The tokens of conversations, up to where the answers begin."""
    if goes_on:
        raise ValueError("messages are read from their beginning; give no state, or the next text as the prompt")
    if tokenizer is None:
        raise ValueError("messages are text and the model has no tokenizer; pass tokenizer= or token ids")
    texts = chat.rendered(model, messages, getattr(tokenizer, "tokenizer", None))
    encoded = [tokenizer.encode_rendered(text) for text in texts]
    if not all(encoded):
        raise ValueError("the chat template makes no text of the messages")
    return _checked(encoded, model.config)


def _checked(rows: list[list[int]], config) -> list[list[int]]:
    for row, tokens in enumerate(rows):
        if outside := [token for token in tokens if not 0 <= token < config.vocab_size]:
            raise ValueError(f"prompt {row} holds token {outside[0]}; vocab_size is {config.vocab_size}")
    return rows


def _rows(model, prompts: Any) -> list:
    """A text or a list of token ids for each prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        rows = _rows(model, prompts["input_ids"])
        masks = _masks(model, prompts.get("attention_mask"), len(rows))
        return [ids_of({"input_ids": row, "attention_mask": mask}) for row, mask in zip(rows, masks, strict=True)]
    if _is_array(prompts):
        ids = _integers(model, prompts)
        if ids.ndim not in (1, 2):
            raise TypeError(f"prompts is an array of shape {ids.shape}; expected one or two axes of token ids")
        return np.atleast_2d(ids).tolist()
    if not isinstance(prompts, Sequence):
        if isinstance(prompts, Mapping) or hasattr(prompts, "ids"):
            return [ids_of(prompts)]
        raise TypeError(f"prompts is {type(prompts).__name__}; expected text, token ids, or a list of either")
    if len(prompts) and _is_id(prompts[0]):
        return [ids_of(prompts)]
    return [item if isinstance(item, str) else _row(model, item) for item in prompts]


def _masks(model, mask: Any, rows: int) -> list:
    """The mask of each row, or None."""
    if mask is None:
        return [None] * rows
    mask = _on_host(model, mask) if _is_array(mask) else mask
    masks = [mask] if len(mask) and _is_id(mask[0]) else list(mask)
    if len(masks) != rows:
        raise ValueError(f"attention_mask has {len(masks)} rows; expected {rows} as input_ids")
    return masks


def _row(model, item: Any) -> list[int]:
    """The token ids of one prompt of several."""
    if not _is_array(item):
        return ids_of(item)
    ids = _integers(model, item)
    if ids.ndim != 1:
        raise TypeError(f"a prompt of a list has shape {ids.shape}; expected one axis of token ids")
    return ids.tolist()


def _is_id(item: Any) -> bool:
    """Whether it is one token, and no prompt."""
    if _is_array(item):
        return item.shape == ()
    return not isinstance(item, (Sequence, Mapping)) and not hasattr(item, "ids")


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _integers(model, array: Any) -> np.ndarray:
    ids = _on_host(model, array)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"prompts has an array of {ids.dtype}; expected integers, which are token ids")
    return ids


def embeddings(model, array: Any) -> np.ndarray:
    """(b, l, d) float32."""
    if not _is_array(array):
        raise TypeError(f"inputs_embeds is {type(array).__name__}; expected an array")
    values, width = _on_host(model, array), model.config.d_model
    if "float" not in values.dtype.name:
        raise TypeError(f"inputs_embeds is {values.dtype}; expected floats")
    if values.ndim not in (2, 3):
        raise TypeError(f"inputs_embeds has shape {values.shape}; expected (l, d) or (b, l, d)")
    values = values[None] if values.ndim == 2 else values
    if values.shape[2] != width or 0 in values.shape:
        raise ValueError(f"inputs_embeds has shape {values.shape}; expected (b, l, {width}) with b and l at least 1")
    return values.astype(np.float32)


def _on_host(model, array: Any) -> np.ndarray:
    """An array of any framework, on any device, as NumPy."""
    if isinstance(array, np.ndarray):
        return array
    if isinstance(array, type(model.init_state(1).segment)):
        return registry.get(model.backend).to_numpy(array)
    if callable(getattr(array, "detach", None)):
        array = array.detach().cpu()
    try:
        return np.asarray(array)
    except (TypeError, ValueError, RuntimeError) as fault:
        kind = f"{type(array).__module__}.{type(array).__qualname__} of {array.dtype}"
        raise TypeError(
            f"{kind} cannot be read as NumPy ({fault}); pass an array of {model.backend} or NumPy"
        ) from None
