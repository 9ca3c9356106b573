"""Text and tokens by the tokenizers of other packages, and conversations by chat templates."""

import copy
import json
import pickle
import random
import sys

import pytest

import mamba_core as mc
from mamba_core import chat
from mamba_core.data import read_tokens
from mamba_core.prompts import of_messages
from mamba_core.registry import installed
from mamba_core.tokenizer import ByteTokenizer, SubwordTokenizer, as_tokenizer, ids_of

tokenizers = pytest.importorskip("tokenizers")
decoders, models, normalizers, pre = (
    tokenizers.decoders, tokenizers.models, tokenizers.normalizers, tokenizers.pre_tokenizers,
)  # fmt: skip

TEXT = ["def main(x): return x", "Hello world, it's a test. don't!", "größe 漢字 😀😀 e\u0301", "two  spaces\n\nlines"]
# What texts are made of: what takes several tokens, spaces, and what is shortened when spaces are cleaned up.
PIECES = ("the", "wor", "hello", "漢", "😀", "ö", "\n", "  ", " '", " ' ", "s", " n't", " .", "!", "x", " ")
SHORTENED = ("'", "n", "t", "s", ".", "!", "ö", "the")


def begins(tokenizer):
    """With <s> at the beginning of a text."""
    token = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", token)]
    )
    return tokenizer


def byte_level():
    """Bytes merged to words, as GPT-2's."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return begins(made)


def byte_fallback():
    """A space before each text, which a decode strips, and bytes for characters that have no token, as Llama's."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz.,!?'"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("▁", "w"), ("o", "r"), ("▁w", "or")]
    names += [left + right for left, right in merges]
    vocabulary = {name: token for token, name in enumerate(names)}
    made = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return begins(made)


def unigram():
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre.Metaspace(), decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=70, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return begins(made)


def cleaning():
    """One of transformers' that cleans up spaces."""
    transformers = pytest.importorskip("transformers")
    names = ("[UNK]", *"abdehlnorstuwxö.,!?'", *(f"##{letter}" for letter in "abdehlnorstuwxö"), "the", "hello", "##or")
    vocabulary = {name: token for token, name in enumerate(names)}
    made = tokenizers.Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=True)


def sentencepiece():
    """Of the package of that name, which has no tokenizer.json."""
    import io

    package = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    package.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 4), model_writer=written, vocab_size=330, byte_fallback=True, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    return package.SentencePieceProcessor(model_proto=written.getvalue())


class Bytes:
    """Like tiktoken's: no more than encode and decode, a special token that text may not have, and no unknown ids."""

    def encode(self, text, *, allowed_special=()):
        first, *rest = text.split("<s>")
        if rest and allowed_special != "all":
            raise ValueError("a special token")
        return [*first.encode(), *(token for part in rest for token in (256, *part.encode()))]

    def decode(self, tokens):
        if max(tokens) > 256:
            raise KeyError(max(tokens))
        return b"".join(b"<s>" if token == 256 else bytes([token]) for token in tokens).decode(errors="replace")


KINDS = (byte_level, byte_fallback, unigram, cleaning, sentencepiece, Bytes, ByteTokenizer)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def tokenizer(request):
    return as_tokenizer(request.param())


# --- text after text -----------------------------------------------------------------------------------------------


def continued(tokenizer, prompt, new) -> list[str]:
    decode = tokenizer.decoder(prompt)
    return [decode(token) for token in (*new, None)]


def test_text_goes_on_as_in_a_decode_of_the_whole(tokenizer):
    rng, defined = random.Random(0), 0
    known = [token for piece in PIECES for token in tokenizer.encode_more(piece)]
    shortened = [token for piece in SHORTENED for token in tokenizer.encode_more(piece)]
    for _ in range(400):
        ids = tokenizer.encode("".join(rng.choices(PIECES, k=14))) + tokenizer.encode_more(rng.choice(PIECES))
        if rng.random() < 0.5:
            ids = rng.choices(rng.choice((known, shortened)), k=12)
        cut = rng.randint(0, len(ids))
        before, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
        if whole.startswith(before) and "\N{REPLACEMENT CHARACTER}" not in whole:
            pieces = continued(tokenizer, ids[:cut], ids[cut:])
            assert before + "".join(pieces) == whole, (ids[:cut], ids[cut:])
            assert len(ids) == cut or len(pieces) > 1
            defined += 1
    assert defined > 100


def test_a_space_after_the_prompt_is_kept(tokenizer):
    if tokenizer.decode(tokenizer.encode("the wor")) != "the wor":
        pytest.skip("its text is not the one that it was given")
    whole, prompt = tokenizer.encode("the wor"), tokenizer.encode("the")
    assert whole[: len(prompt)] == prompt
    assert "".join(continued(tokenizer, prompt, whole[len(prompt) :])) == " wor"


def test_a_character_that_the_prompt_begins_is_the_text_s(tokenizer):
    ids = tokenizer.encode("x😀")
    cut = next((i for i in range(2, len(ids)) if "\N{REPLACEMENT CHARACTER}" in tokenizer.decode(ids[:i])), None)
    if cut is None:
        pytest.skip("it is one token, or none")
    assert "".join(continued(tokenizer, ids[:cut], ids[cut:])) == "😀"


def test_a_long_prompt_s_end_is_decoded_from_where_a_character_begins(tokenizer):
    for prompt in ("漢" * 4, "漢漢漢x", "x" + "漢" * 5, "😀漢" * 3):
        ids = tokenizer.encode(prompt)
        if tokenizer.decode(ids) == prompt:
            more = tokenizer.encode(prompt + "漢")[len(ids) :]
            assert "".join(continued(tokenizer, ids, more)) == "漢"


def test_text_that_goes_on_has_no_space_before_it(tokenizer, request):
    if request.node.callspec.params["tokenizer"] is cleaning:
        pytest.skip("it has words, with a space between any two")
    if tokenizer.decode(tokenizer.encode("the wor")) != "the wor":
        pytest.skip("its text is not the one that it was given")
    for more in ("wor", " wor", "\nwor"):
        if tokenizer.decode(tokenizer.encode("the" + more)) == "the" + more:
            assert tokenizer.decode([*tokenizer.encode("the"), *tokenizer.encode_more(more)]) == "the" + more


def test_bytes_that_are_no_text_do_not_wait_for_ever():
    for kind, bad in ((byte_level, "\u00c3"), (byte_fallback, "<0xFF>")):
        made = kind()
        tokenizer = as_tokenizer(made)
        new = [made.token_to_id(bad)] * 100
        pieces = continued(tokenizer, tokenizer.encode("the"), [*new, *tokenizer.encode_more("the")])
        assert "".join(pieces) == "\N{REPLACEMENT CHARACTER}" * 100 + "the"
        assert sum(map(bool, pieces)) > 20


@pytest.mark.parametrize("kind", [byte_level, byte_fallback, cleaning])
def test_decoding_takes_as_long_after_many_tokens(kind):
    made = as_tokenizer(kind())
    lengths, real = [], made.decode
    made.decode = lambda ids: lengths.append(len(ids)) or real(ids)
    ids = made.encode_more("the wor 😀 '") * 50
    "".join(continued(made, made.encode(TEXT[1] * 100), [*ids, *[0] * 100, *ids]))
    assert max(lengths[5:]) < 60


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "of-transformers"])
def test_special_tokens_are_no_text(kind, wrapped):
    made = kind()
    end = made.token_to_id("</s>")
    if wrapped:
        transformers = pytest.importorskip("transformers")
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    tokenizer = as_tokenizer(made)
    prompt, more = [*tokenizer.encode("the"), end], tokenizer.encode_more(" wor")
    assert "".join(continued(tokenizer, prompt, [end, *more, end])) == " wor"


def test_tokens_that_a_tokenizer_does_not_have(tokenizer):
    pieces = continued(tokenizer, tokenizer.encode("the"), [99999, *tokenizer.encode_more("wor"), 99999])
    assert "".join(pieces).strip() == "wor"


# --- what is a tokenizer -------------------------------------------------------------------------------------------


def test_what_an_encode_gives():
    made = byte_level()
    made.enable_padding(pad_id=1, length=9)
    encoded = made.encode("the")
    assert len(encoded.ids) == 9
    wanted = [token for token, kept in zip(encoded.ids, encoded.attention_mask, strict=True) if kept]
    assert ids_of(encoded) == wanted == as_tokenizer(made).encode("the")
    assert ids_of({"input_ids": [1, 2, 3], "attention_mask": [0, 1, True]}) == [2, 3]
    for wrong in ("text", 3, {"ids": [1]}, [1.5], [True]):
        with pytest.raises(TypeError, match=r"a prompt is|a token is"):
            ids_of(wrong)
    with pytest.raises(ValueError, match="attention_mask has 1 entries"):
        ids_of({"input_ids": [1, 2], "attention_mask": [1]})


def test_what_is_no_tokenizer():
    for wrong in (3, "gpt2", object()):
        with pytest.raises(
            TypeError, match=r"tokenizer is .*; expected an object with encode\(text\) and decode\(ids\)"
        ):
            as_tokenizer(wrong)


def test_training_data_by_any_tokenizer(tmp_path):
    (tmp_path / "text").write_text("the wor")
    made = byte_level()
    assert read_tokens(tmp_path / "text", made).tolist() == made.encode("the wor").ids


def test_a_file_s_truncation_and_padding_are_of_somebody_s_training(tmp_path):
    made = byte_level()
    made.enable_truncation(3)
    made.enable_padding(length=20)
    made.save(str(tmp_path / "tokenizer.json"))
    read = SubwordTokenizer(tmp_path / "tokenizer.json")
    assert read.decode(read.encode("def main(x): return x")) == "def main(x): return x"
    assert len(read.encode("x")) == 2


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["copy", "pickle"]
)
def test_tokenizers_are_copied(copied):
    for kind in (byte_level, byte_fallback, ByteTokenizer):
        tokenizer = as_tokenizer(kind())
        found, ids = copied(tokenizer), tokenizer.encode("the 😀")
        assert found.encode("the 😀") == ids
        assert found.decode(ids) == tokenizer.decode(ids)


# --- through a model -----------------------------------------------------------------------------------------------


def build(vocabulary: int, **settings):
    config = mc.MambaConfig(
        d_model=8, n_layer=1, vocab_size=vocabulary, d_state=2, initializer_range=0.5, tie_embeddings=False, **settings
    )
    return mc.build(config, backend=installed()[0])


@pytest.mark.parametrize("kind", [byte_level, byte_fallback, unigram, cleaning], ids=lambda kind: kind.__name__)
def test_a_prompt_and_its_continuation_are_one_text(kind):
    """In generate and stream, of a text and of ids; what bytes alone give is another matter."""
    given = kind()
    tokenizer = as_tokenizer(given)
    vocabulary = given.get_vocab()
    model = build(len(vocabulary))
    settings = {"tokenizer": given, "temperature": 5.0, "max_new_tokens": 24}
    settings["logit_bias"] = {token: -float("inf") for name, token in vocabulary.items() if name.startswith("<")}
    for seed, prompt in enumerate(["the wor", "it", "hello the", "x \n"]):
        result = mc.generate(model, prompt, seed=seed, **settings)
        ids = tokenizer.encode(prompt)
        whole, before = tokenizer.decode(ids + result.tokens[0]), tokenizer.decode(ids)
        assert not whole.startswith(before) or before + result.text[0] == whole
        assert mc.generate(model, ids, seed=seed, **settings).text == result.text
        taken = mc.stream(model, ids, seed=seed, **settings)
        assert "".join(taken) == result.text[0] == taken.result().text[0]
        if len(ids) < 2:
            continue
        state = mc.generate(model, ids[:-1], max_new_tokens=0, return_state=True).state
        more = mc.generate(model, ids[-1:], state=state, seed=seed, **settings)
        assert more.tokens == result.tokens
        assert more.text[0] == "".join(continued(tokenizer, ids[-1:], more.tokens[0]))


def test_a_tokenizer_of_transformers_and_its_batch():
    transformers = pytest.importorskip("transformers")
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_fallback(), bos_token="<s>", pad_token="</s>")
    model = build(len(made))
    wanted = mc.generate(model, ["the wor", "it"], tokenizer=made, max_new_tokens=5)
    for settings in ({}, {"return_tensors": "np"}, {"padding_side": "right", "return_tensors": "np"}):
        batch = made(["the wor", "it"], padding=True, **settings)
        assert mc.generate(model, batch, tokenizer=made, max_new_tokens=5).tokens == wanted.tokens, settings
        assert mc.generate(model, dict(batch), max_new_tokens=5).tokens == wanted.tokens
    single = made("it")
    assert mc.generate(model, single, tokenizer=made, max_new_tokens=5).tokens == wanted.tokens[1:]
    encodings = made.backend_tokenizer.encode_batch(["the wor", "it"])
    assert mc.generate(model, encodings, max_new_tokens=5).tokens == wanted.tokens
    with pytest.raises(ValueError, match="attention_mask has 1 rows; expected 2"):
        mc.generate(model, {"input_ids": [[1], [2]], "attention_mask": [[1]]})


# --- chat templates ------------------------------------------------------------------------------------------------

CHATML = """{% for message in messages %}
    {%- if loop.first and message.role != 'system' %}<|im_start|>system
Be helpful.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% generation %}{{ message['content'] | trim }}{% endgeneration %}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SYSTEM = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""  # noqa: E501
FUNCTIONS = """{{- bos_token }}{% set ns = namespace(count=0) %}
{% for message in messages %}
    {% if message.role == 'skip' %}{% continue %}{% endif %}
{% set ns.count = ns.count + 1 %}
{{ message | tojson }} {{ {'é': '<a & b>'} | tojson(indent=2) }}
{% if ns.count == 2 %}{% break %}{% endif %}
{% endfor %}
{{ ns.count }} {{ strftime_now('%Y') | length }} {{ tools is none }} {{ unknown_token }}"""
TALKS = [
    [{"role": "user", "content": " Hello "}],
    [{"role": "system", "content": "Be <brief> & kind."}, {"role": "user", "content": "Hé 😀"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b ", "tool_calls": None},
     {"role": "user", "content": "c"}],
    [{"role": "skip", "content": "x"}, {"role": "user", "content": "a", "more": [1, {"b": 2.5}, None]}],
]  # fmt: skip


def checkpoint(folder, template, made=None):
    """A model that was loaded from a folder with a tokenizer and a chat template."""
    made = byte_fallback() if made is None else made
    mc.save(build(made.get_vocab_size()), folder)
    made.save(str(folder / "tokenizer.json"))
    fields = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "pad_token": None}
    if template is not None:
        fields["chat_template"] = template
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return mc.load(folder, backend=installed()[0])


@pytest.mark.parametrize("template", [CHATML, SYSTEM, FUNCTIONS], ids=["chatml", "system", "functions"])
def test_templates_are_rendered_as_transformers_renders_them(template, tmp_path):
    transformers, jinja2 = map(pytest.importorskip, ("transformers", "jinja2"))
    model = checkpoint(tmp_path / "model", template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for talk in TALKS:
        settings = {"add_generation_prompt": True, "return_dict": False}
        try:
            wanted = theirs.apply_chat_template(talk, tokenize=False, **settings)
        except jinja2.TemplateError:
            with pytest.raises(ValueError, match="cannot render these messages: roles must alternate"):
                mc.generate(model, messages=talk)
            continue
        assert chat.rendered(model, talk) == [wanted]
        assert chat.rendered(model, talk, theirs) == [wanted]
        ids = theirs.apply_chat_template(talk, **settings)
        found = mc.generate(model, messages=talk, max_new_tokens=4)
        assert found.tokens == mc.generate(model, ids, max_new_tokens=4).tokens
        assert mc.generate(model, messages=talk, tokenizer=theirs, max_new_tokens=4).tokens == found.tokens


def test_a_template_that_writes_the_beginning_is_read_with_one(tmp_path):
    model = checkpoint(tmp_path / "model", SYSTEM)
    (read,) = of_messages(model, TALKS[0], SubwordTokenizer(tmp_path / "model" / "tokenizer.json"), False)
    assert read[0] == 1
    assert read.count(1) == 1


def test_several_conversations(tmp_path):
    model = checkpoint(tmp_path / "model", CHATML)
    result = mc.generate(model, messages=TALKS, max_new_tokens=3, n=2)
    assert len(result.tokens) == 2 * len(TALKS)
    for row, talk in enumerate(TALKS):
        taken = mc.stream(model, messages=talk, max_new_tokens=3)
        assert "".join(taken) == result.text[2 * row]
    with pytest.raises(ValueError, match="stream continues one prompt; 4 were given"):
        mc.stream(model, messages=TALKS)


def test_where_a_template_may_stand(tmp_path):
    model, talk = checkpoint(tmp_path / "model", None), TALKS[0]
    with pytest.raises(ValueError, match=r"messages need a chat template; .*model has none"):
        mc.generate(model, messages=talk)
    with pytest.raises(ValueError, match="the model came from no checkpoint with one"):
        mc.generate(build(256), messages=talk)
    folder = tmp_path / "model"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert chat.rendered(model, talk) == ["json"]
    config = json.loads((folder / "tokenizer_config.json").read_text())

    def named(*names):
        templates = [{"name": name, "template": f"named {name}"} for name in names]
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": templates}))

    named("tool_use", "default")
    assert chat.rendered(model, talk) == ["named default"]
    named("tool_use", "rag")
    with pytest.raises(ValueError, match="has chat templates tool_use, rag, and none named 'default'"):
        chat.rendered(model, talk)
    for broken in ([{"name": "default"}], ["default"], [1]):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": broken}))
        with pytest.raises(ValueError, match=r"tokenizer_config\.json: a chat template has no name or no text"):
            chat.rendered(model, talk)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }} é", encoding="utf-8")
    assert chat.rendered(model, talk) == [" Hello  é"]
    (folder / "special_tokens_map.json").write_text(json.dumps({"unk_token": {"content": "?"}, "eos_token": "!"}))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}")
    assert chat.rendered(model, talk) == ["<s></s>?"]


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ("hello", "messages is str; expected a list of mappings"),
        ({"role": "user"}, "messages is dict; expected a list"),
        (["hello"], "messages holds str"),
        ([{"content": "x"}], r"messages holds \{'content': 'x'\}; expected a mapping with role"),
        ([{"role": "user", "content": {1}}], "a message holds set"),
        ([], "messages is empty"),
        ([[]], "an empty conversation"),
    ],
    ids=str,
)
def test_what_is_no_conversation(messages, fault, tmp_path):
    model = checkpoint(tmp_path / "model", CHATML)
    with pytest.raises((TypeError, ValueError), match=fault):
        mc.generate(model, messages=messages)


def test_templates_run_in_a_sandbox_and_may_be_broken():
    talk = [{"role": "user", "content": "x"}]
    for template in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% if %}",
        "{{ messages[0].content + 1 }}",
    ):
        with pytest.raises(ValueError, match="the chat template cannot render these messages"):
            chat.render(template, talk, {})
    template = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    assert chat.render(template, talk, {}) == "21"


def test_what_messages_do_not_go_with(tmp_path):
    model, talk = checkpoint(tmp_path / "model", CHATML), TALKS[0]
    state = mc.generate(model, "the", max_new_tokens=0, return_state=True).state
    with pytest.raises(ValueError, match="messages are read from their beginning"):
        mc.generate(model, messages=talk, state=state)
    with pytest.raises(TypeError, match="expected one of prompts, messages, inputs_embeds; 2 given"):
        mc.generate(model, "the", messages=talk)
    with pytest.raises(TypeError, match="expected one of prompts, messages, inputs_embeds; none given"):
        mc.generate(model)
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="messages are text and the model has no tokenizer"):
        mc.generate(model, messages=talk)
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ '' }}"}))
    with pytest.raises(ValueError, match="makes no text"):
        mc.generate(model, messages=talk, tokenizer=Bytes())


def test_special_tokens_that_a_tokenizer_takes_for_text(tmp_path):
    model = checkpoint(tmp_path / "model", SYSTEM)
    with pytest.raises(ValueError, match="takes '<s>', which the chat template writes, for plain text"):
        mc.generate(model, messages=TALKS[0], tokenizer=sentencepiece())
    assert as_tokenizer(Bytes()).encode_rendered("<s>a") == [256, 97]


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    model = checkpoint(tmp_path / "model", CHATML)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"needs jinja2; pip install 'mamba_core\[hub\]'"):
        mc.generate(model, messages=TALKS[0])


# --- the checkpoint's folder ---------------------------------------------------------------------------------------


def test_a_folder_that_was_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "model", CHATML)
    model = mc.load("model", backend=installed()[0])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    wanted = mc.generate(model, "the", max_new_tokens=3)
    mc.save(model, tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").is_file()
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="the folder of the model's tokenizer is gone; set"):
        mc.generate(model, "the")
    assert mc.generate(model, "the", max_new_tokens=3, tokenizer=byte_fallback()).text == wanted.text
    with pytest.warns(UserWarning, match="gone; the model is saved without the tokenizer"):
        mc.save(model, tmp_path / "without")
    model.source = str(tmp_path / "moved")
    mc.save(model, tmp_path / "with")
    assert (tmp_path / "with" / "tokenizer.json").is_file()
    assert mc.generate(model, "the", max_new_tokens=3).text == wanted.text


def test_a_folder_with_nothing_but_the_model_may_go(tmp_path):
    mc.save(build(256), tmp_path / "model")
    model = mc.load(tmp_path / "model", backend=installed()[0])
    (tmp_path / "model").rename(tmp_path / "moved")
    assert mc.generate(model, "the", max_new_tokens=3).text is not None
    mc.save(model, tmp_path / "copy")
