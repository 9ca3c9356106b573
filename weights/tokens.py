"""The special tokens that files beside a config.json name.

As transformers has it, generation_config.json counts for generation, whatever config.json says. Where neither says,
the tokenizer's files do: tokenizer_config.json or special_tokens_map.json names the token, and the other files have its
id.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mamba_core.weights.companions import read_companion
from mamba_core.weights.formats import parse_json, read_json

GENERATION = "generation_config.json"
FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NAMING = ("tokenizer_config.json", "special_tokens_map.json")


def read_generation(folder: Path) -> dict[str, Any]:
    """The ids that generation_config.json gives, those that are null left out.

    Raises:
        CheckpointError: the file is broken.
    """
    fields = _read(folder, GENERATION)
    return {name: fields[name] for name in FIELDS if fields.get(name) is not None}


def read_tokenizer(folder: Path, wanted: list[str]) -> dict[str, int]:
    """The ids of the wanted fields, as far as the tokenizer's files tell them.

    Raises:
        CheckpointError: one of the files is broken.
    """
    tokens: dict[str, str] = {}
    for file in _NAMING if wanted else ():
        fields = _read(folder, file)
        for name in wanted:
            if (token := _text(fields.get(name.removesuffix("_id")))) is not None:
                tokens.setdefault(name, token)
    found: dict[str, int] = {}
    for ids in _ids(folder) if tokens else ():
        found |= {name: ids[token] for name, token in tokens.items() if name not in found and token in ids}
        if len(found) == len(tokens):
            break
    return found


def write_generation(source: Path | None, target: Path, config: Any, told: bool) -> None:
    """Copy generation_config.json: byte for byte, but for ids that the config has otherwise.

    An id that it does not give is added where the source's config.json gives another one than the config.

    Args:
        source: the folder that it is in, if any.
        told: whether the target's config.json gives the ids; else the file is made to do so.
    """
    kept = None if source is None else read_companion(source / GENERATION)
    if source is None or kept is None:
        fields, before = {}, {}
        if told:
            return
    else:
        fields, before = parse_json(kept), _read(source, "config.json") if told else {}
    changed = {}
    for name, value in _ids_of(config).items():
        given = before.get(name) if fields.get(name) is None else fields[name]
        if value != given:
            changed[name] = value
    if changed:
        (target / GENERATION).write_text(json.dumps(fields | changed, indent=2) + "\n", encoding="utf-8")
    elif kept is not None and fields:
        (target / GENERATION).write_bytes(kept)


def _ids_of(config: Any) -> dict[str, Any]:
    """The ids of a config, as JSON has them."""
    ids = {name: getattr(config, name) for name in FIELDS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in ids.items()}


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        return read_json(folder / name)
    except FileNotFoundError:
        return {}


def _text(token: Any) -> str | None:
    """A token's text, which may stand in an object with its settings."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def _ids(folder: Path) -> Iterator[dict[str, int]]:
    """Token -> id, as one file after the other has them; the large ones come last."""
    added = _read(folder, _NAMING[0]).get("added_tokens_decoder")
    if isinstance(added, Mapping):
        numbered = [(_text(token), index) for index, token in added.items() if len(index) < 10 and index.isdecimal()]
        yield {token: int(index) for token, index in numbered if token is not None}
    yield _whole(_read(folder, "added_tokens.json"))
    tokenizer = _read(folder, "tokenizer.json")
    if isinstance(added := tokenizer.get("added_tokens"), list):
        entries = [entry for entry in added if isinstance(entry, Mapping)]
        yield _whole({str(entry.get("content")): entry.get("id") for entry in entries})
    model = tokenizer.get("model")
    if isinstance(model, Mapping) and isinstance(vocabulary := model.get("vocab"), Mapping):
        yield _whole(vocabulary)
    yield _whole(_read(folder, "vocab.json"))


def _whole(ids: Mapping[str, Any]) -> dict[str, int]:
    return {token: index for token, index in ids.items() if type(index) is int}
