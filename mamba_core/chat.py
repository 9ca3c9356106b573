"""Conversations as text: the chat template that comes with a checkpoint, rendered as transformers renders it."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mamba_core.tokenizer import source_of
from mamba_core.weights.formats import boundary, read_input, read_json

DEFAULT = "default"
# The special tokens that a template may name, as in tokenizer_config.json.
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def rendered(model: Any, messages: Any, tokenizer: Any = None) -> list[str]:
    """Each conversation as text, up to where the answer begins.

    Args:
        messages: a conversation, which is a list of mappings such as {"role": "user", "content": "Hello"}; or a list of
            conversations.
        tokenizer: whose template is taken, if it has one; else that of the model's checkpoint.

    Raises:
        TypeError: messages is something else.
        ValueError: there is no template, or it refuses the messages.
        ImportError: jinja2 is not installed.
    """
    talks = _conversations(messages)
    if getattr(tokenizer, "chat_template", None) and callable(getattr(tokenizer, "apply_chat_template", None)):
        settings = {"tokenize": False, "add_generation_prompt": True}
        return [tokenizer.apply_chat_template(talk, **settings) for talk in talks]
    folder = source_of(model)
    with boundary(folder):
        template = None if folder is None else _template(folder)
        tokens = {} if folder is None else _special_tokens(folder)
    if template is None:
        where = "the model came from no checkpoint with one" if folder is None else f"{folder} has none"
        raise ValueError(f"messages need a chat template; {where}. Give the text or its tokens as the prompt instead")
    return [render(template, talk, tokens) for talk in talks]


def render(template: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str]) -> str:
    """A conversation by a template, up to where the answer begins.

    Args:
        template: in Jinja's language. It runs in a sandbox.
        tokens: such as {"bos_token": "<s>"}.

    Raises:
        ValueError: the template is broken, or refuses the messages.
        ImportError: jinja2 is not installed.
    """
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError:
        raise ImportError("a chat template needs jinja2; pip install 'mamba_core[hub]'") from None

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}, which marks what an assistant says for those who train on it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **tokens
        )
    except Exception as fault:  # what a template does may raise anything
        raise ValueError(f"the chat template cannot render these messages: {fault}") from fault


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _conversations(messages: Any) -> list[list[dict]]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages is {type(messages).__name__}; expected a list of mappings with role and content")
    if len(messages) == 0:
        raise ValueError("messages is empty; expected at least one")
    talks = [messages] if isinstance(messages[0], Mapping) else messages
    return [_conversation(talk) for talk in talks]


def _conversation(talk: Any) -> list[dict]:
    """Without the entries that are None, which a template might print."""
    if isinstance(talk, (str, Mapping)) or not isinstance(talk, Sequence):
        raise TypeError(f"messages holds {type(talk).__name__}; expected mappings with role and content")
    if len(talk) == 0:
        raise ValueError("messages holds an empty conversation; expected at least one message")
    for message in talk:
        if not isinstance(message, Mapping) or "role" not in message:
            raise TypeError(f"messages holds {message!r}; expected a mapping with role and content")
    return [{str(name): _plain(value) for name, value in message.items() if value is not None} for message in talk]


def _plain(value: Any) -> Any:
    """Nothing but JSON's types, whose methods a template may call without harm."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    raise TypeError(f"a message holds {type(value).__name__}; expected text, numbers, lists and mappings")


def _template(folder: Path) -> str | None:
    """The default template of a checkpoint.

    Raises:
        ValueError: a file is broken, or there are several templates and no default.
    """
    if (path := folder / "chat_template.jinja").exists():
        return read_input(path).decode("utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = _fields(folder / name).get("chat_template")
        if isinstance(found, list):
            if not all(isinstance(entry, Mapping) and {"name", "template"} <= entry.keys() for entry in found):
                raise ValueError(f"{folder / name}: a chat template has no name or no text; expected a list of both")
            found = {str(entry["name"]): entry["template"] for entry in found}
        if isinstance(found, Mapping):
            if DEFAULT not in found:
                raise ValueError(f"{folder / name}: has chat templates {', '.join(found)}, and none named {DEFAULT!r}")
            found = found[DEFAULT]
        if found is not None:
            return found
    return None


def _special_tokens(folder: Path) -> dict[str, str]:
    fields = _fields(folder / "special_tokens_map.json") | _fields(folder / "tokenizer_config.json")
    # An entry is a token, or a mapping that has it and says how it is matched.
    named = {name: fields.get(name) for name in TOKENS}
    found = {name: value.get("content") if isinstance(value, Mapping) else value for name, value in named.items()}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _fields(path: Path) -> dict:
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
