"""JSON as text whose values, keys and entries are known by their places, so that any of them can be replaced."""

import functools
import json
from json.decoder import scanstring
from random import Random
from typing import NamedTuple

# Texts that stand where a value was: other types, sizes beside the right one, and what JSON's readers differ on.
VALUES = (
    *("null", "true", "false", "0", "1", "-1", "2", "3", "7", "8", "16", "0.0", "-0.0", "0.5", "8.0", "1e3", "1e-320"),
    *("1e400", "-1e400", "NaN", "Infinity", "-Infinity", "2147483647", "2147483648", "4294967296"),
    *(
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551616",
        "1" + "0" * 40,
        "9" * 5000,
        "-" + "9" * 400,
    ),
    *(
        '""',
        '"a"',
        '"8"',
        '"auto"',
        '"silu"',
        '"../../x"',
        '"/etc/passwd"',
        '"\\u0000"',
        '"\\ud800"',
        '"\\udc00\\ud800"',
    ),
    *('"\\u2028\\u001b[2J\\n"', '"\u202eabc"', '"' + "x" * 3000 + '"', '"' + "\U000e0001" * 900 + '"', '"%s{}{0}"'),
    *("[]", "{}", "[0]", "[[]]", '{"a": 1}', "[null]", "[1, 2, 3]", "[" * 60 + "]" * 60, '{"": {"": {"": {}}}}'),
    *("[" * 5000 + "]" * 5000, '{"a":' * 3000 + "1" + "}" * 3000, "[" + "0," * 200 + "0]", "01", "1.", ".5", "0x10"),
    *("'a'", "undefined", "True", "None", "/**/ 1", "", "1 1", '"a" "b"', '"\t"', '"\\x41"', '"\\'),
    *('"F32"', '"F16"', '"BF16"', '"F64"', '"I64"', '"U8"', '"BOOL"', '"F8_E4M3"', '"float32"', '"mamba"', '"mlx"'),
)
KEYS = (
    *("", "a", "dtype", "shape", "data_offsets", "__metadata__", "format", "__class__", "__init__", "extra", "task"),
    *("task_options", "mamba_core", "model_type", "architectures", "architecture", "hidden_size", "d_model", "n_layer"),
    *("num_hidden_layers", "vocab_size", "state_size", "d_state", "conv_kernel", "d_conv", "time_step_rank", "dt_rank"),
    *("expand", "expand_factor", "intermediate_size", "tie_embeddings", "tie_word_embeddings", "ssm_cfg", "rms_norm"),
    *(
        "norm_eps",
        "layer_norm_epsilon",
        "residual_in_fp32",
        "quantization",
        "quantization_config",
        "group_size",
        "bits",
    ),
    *("mode", "eos_token_id", "bos_token_id", "pad_token_id", "eos_token", "added_tokens_decoder", "weight_map"),
    *("chat_template", "model", "vocab", "merges", "settings", "history", "data", "config", "loss", "step", "\ud800"),
    *("a\nb\x1b[2J\u2028", "k" * 3000, "../x", "lm_head.weight", "backbone.norm_f.weight", "torch_dtype", "attn_cfg"),
)


class Node(NamedTuple):
    """A value at [begin, end) of the text; its key at [key, key_end), -1 where it is an element of an array."""

    begin: int
    end: int
    key: int
    key_end: int
    depth: int


def edited(r: Random, text: str, other: str) -> tuple[str, str]:
    """The kind of edit, and a text. other: another document, whose values may take the place of these."""
    kind = r.choice(KINDS)
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        text = EDITS[kind](r, text, nodes(text), other)
        if len(text) > 60_000:
            break
    return f"json.{kind}", text


@functools.lru_cache(256)
def nodes(text: str) -> tuple[Node, ...]:
    """Every value, the outermost first; () for a text that is no JSON any more."""
    found: list[Node] = []
    try:
        _scan(text, _space(text, 0), -1, -1, 0, found)
    except (ValueError, IndexError, RecursionError):
        return ()
    return tuple(sorted(found))


# --- places ----------------------------------------------------------------------------------------


def _space(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at


def _scan(text: str, at: int, key: int, key_end: int, depth: int, found: list[Node]) -> int:
    begin = at
    if text[at] in "{[":
        closing = {"{": "}", "[": "]"}[text[at]]
        at = _space(text, at + 1)
        while text[at] != closing:
            inner = inner_end = -1
            if closing == "}":
                inner, inner_end = at, scanstring(text, at + 1)[1]
                at = _space(text, _space(text, inner_end) + 1)
            at = _space(text, _scan(text, at, inner, inner_end, depth + 1, found))
            at = _space(text, at + 1) if text[at] == "," else at
        at += 1
    elif text[at] == '"':
        at = scanstring(text, at + 1)[1]
    else:
        while at < len(text) and text[at] not in ",]} \t\r\n":
            at += 1
        if at == begin:
            raise ValueError("no value")
    found.append(Node(begin, at, key, key_end, depth))
    return at


# --- edits -----------------------------------------------------------------------------------------


def _put(text: str, begin: int, end: int, new: str) -> str:
    return text[:begin] + new + text[end:]


def _value(r: Random, text: str, places, other: str) -> str:
    node = r.choice(places) if places else Node(0, len(text), -1, -1, 0)
    return _put(text, node.begin, node.end, r.choice(VALUES))


def _number(r: Random, text: str, places, other: str) -> str:
    """A number beside the one that stands there."""
    numbers = [node for node in places if text[node.begin] in "-0123456789"]
    if not numbers:
        return _value(r, text, places, other)
    node = r.choice(numbers)
    old = text[node.begin : node.end]
    near = (f"{old}0", f"-{old}", f"{old}.0", f"{old}e0", f"{old}e30", f'"{old}"', f"[{old}]", f"0{old}")
    if old.isdigit() and len(old) < 19:
        value = int(old)
        near += tuple(map(str, (value - 1, value + 1, value + 2, value + 8, 2 * value, value // 2)))
    return _put(text, node.begin, node.end, r.choice(near))


def _key(r: Random, text: str, places, other: str) -> str:
    keyed = [node for node in places if node.key >= 0]
    if not keyed:
        return _value(r, text, places, other)
    node = r.choice(keyed)
    taken = r.choice(keyed)
    new = text[taken.key : taken.key_end] if r.random() < 0.3 else json.dumps(r.choice(KEYS), ensure_ascii=True)
    return _put(text, node.key, node.key_end, new)


def _delete(r: Random, text: str, places, other: str) -> str:
    inner = [node for node in places if node.depth]
    if not inner:
        return ""
    node = r.choice(inner)
    begin = node.begin if node.key < 0 else node.key
    end = node.end
    while end < len(text) and text[end] in ", \n":
        end += 1
    comma = text[:begin].rstrip().endswith(",") and text[end : end + 1] in ("}", "]")
    return _put(text, text[:begin].rindex(",") if comma else begin, end, "")


def _insert(r: Random, text: str, places, other: str) -> str:
    """An entry, new or a second one of the same key."""
    inner = [node for node in places if node.depth]
    if not inner:
        return "{" + text
    node = r.choice(inner)
    if node.key < 0:
        return _put(text, node.begin, node.begin, r.choice(VALUES) + ",")
    key = text[node.key : node.key_end] if r.random() < 0.3 else json.dumps(r.choice(KEYS), ensure_ascii=True)
    value = text[node.begin : node.end] if r.random() < 0.3 else r.choice(VALUES)
    return _put(text, node.key, node.key, f"{key}: {value}, ")


def _swap(r: Random, text: str, places, other: str) -> str:
    if len(places) < 3:
        return text + text
    first, second = sorted(r.sample(places[1:], 2))
    if first.end > second.begin:
        return _put(text, first.begin, first.end, text[second.begin : second.end])
    one, two = text[first.begin : first.end], text[second.begin : second.end]
    return _put(_put(text, second.begin, second.end, one), first.begin, first.end, two)


def _wrap(r: Random, text: str, places, other: str) -> str:
    node = r.choice(places) if places else Node(0, len(text), -1, -1, 0)
    old = text[node.begin : node.end]
    depth = r.choice((1, 1, 2, 30, 900, 1100))
    left, right = r.choice((("[", "]"), ('{"a":', "}"), ('{"content":', "}")))
    return _put(text, node.begin, node.end, left * depth + old + right * depth)


def _graft(r: Random, text: str, places, other: str) -> str:
    """A value of the other document."""
    theirs = nodes(other)
    if not (places and theirs):
        return other
    node, new = r.choice(places), r.choice(theirs)
    return _put(text, node.begin, node.end, other[new.begin : new.end])


def _many(r: Random, text: str, places, other: str) -> str:
    """Hundreds of entries, each of which may be a fault of its own."""
    inner = [node for node in places if node.depth and node.key >= 0]
    if not inner:
        return text
    node = r.choice(inner)
    value = text[node.begin : node.end][:100] if r.random() < 0.5 else r.choice(VALUES[:20])
    added = "".join(f'"{"k" * r.choice((1, 30))}{number}": {value}, ' for number in range(r.choice((20, 300))))
    return _put(text, node.key, node.key, added)


EDITS = {
    "value": _value,
    "number": _number,
    "key": _key,
    "delete": _delete,
    "insert": _insert,
    "swap": _swap,
    "wrap": _wrap,
    "graft": _graft,
    "many": _many,
}
KINDS = (*("value",) * 8, *("number",) * 4, *("key",) * 3, *("delete",) * 2, *("insert",) * 3, *("swap",) * 2)
KINDS += ("wrap", "graft", "graft", "many")
