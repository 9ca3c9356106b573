"""Generation: prompts of any form to rows, the decode loop, when a row ends, and how tokens become text.

How a token is chosen is `mamba_core.sampling`'s, the arithmetic each backend's `decoding.py`.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from mamba_core import prompts as inputs
from mamba_core import registry, tasks
from mamba_core.backend import Choice, Output, State
from mamba_core.sampling import Sampling, Uniforms, first_context, integer
from mamba_core.spec.checks import check_state, check_steps
from mamba_core.tokenizer import as_tokenizer, tokenizer_of
from mamba_core.wrappers import check_mixers_step, unwrap

# Positions of a prompt that are computed at once: enough to be fast, and few enough to need little memory.
PREFILL_CHUNK = 1024
GREEDY = Sampling()


@dataclass
class Result:
    """What was generated, one entry a row: the n continuations of the first prompt, then those of the second, ...

    tokens: new token ids, the prompt excluded, the token that ended the row included.
    text: the same as text without what ended the row; None without a tokenizer. It is what stands after the prompt in
        the text of the prompt and the new tokens together. A character that the prompt's last token begins and the
        first new one completes is the text's. Of a tokenizer whose text of some tokens changes with later ones in other
        ways, such as bytes that are no text, the first text is kept. After a state or embeddings the tokens before are
        not known, and the text is what stands after the tokens of this call.
    logprobs: of each new token under the model, before what `mamba_core.sampling` does to the logits.
    top_logprobs: for each new token the likeliest as (token, log-probability) pairs; None unless asked for.
    finish_reasons: "length", "eos" or "stop"; "masked" where no token was left to choose, "nan" where the logits were
        not numbers; None where it was interrupted.
    state: after the prompts and all new tokens; None unless asked for.
    prompt_seconds: until the first tokens were there. seconds: in all. What is compiled on the way is in them.
    """

    tokens: list[list[int]] = field(default_factory=list)
    text: list[str] | None = None
    logprobs: list[list[float]] = field(default_factory=list)
    top_logprobs: list[list[list[tuple[int, float]]]] | None = None
    finish_reasons: list[str | None] = field(default_factory=list)
    state: State | None = field(default=None, repr=False)
    prompt_seconds: float = 0.0
    seconds: float = 0.0


def generate(
    model: Any,
    prompts: Any = None,
    *,
    messages: Any = None,
    inputs_embeds: Any = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    processors: Callable | Sequence[Callable] = (),
    stop: str | int | Sequence[str | int] = (),
    seed: int | Sequence[int] = 0,
    n: int = 1,
    top_logprobs: int = 0,
    state: State | None = None,
    return_state: bool = False,
    prefill_chunk: int = PREFILL_CHUNK,
    tokenizer: Any = None,
) -> Result:
    """Continue a batch of prompts of any lengths; a row does not depend on its neighbours.

    Args:
        model: may be wrapped by torch.compile, DistributedDataParallel, AveragedModel or PEFT.
        prompts: a text or a list of texts, or a list of token ids or a list of such lists; or an array of any framework
            of one or two axes of token ids, or what a tokenizer gives, such as a mapping of input_ids and
            attention_mask, whose padding is left out. An empty one is the config's bos_token_id.
        messages: in the place of prompts: a conversation, which is a list of mappings such as {"role": "user",
            "content": "Hello"}, or a list of conversations. The chat template of the tokenizer or of the checkpoint
            makes the prompts of them.
        inputs_embeds: in the place of prompts: (l, d) or (b, l, d) floats, which are what the embedding would give,
            as an array of the model's framework or of NumPy.
        max_new_tokens: for each row; with 0 the prompts are read, and no more.
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias: see
            `mamba_core.sampling`; temperature 0 is greedy. The penalties know what this call is given and generates.
        processors: functions of logits (b, v) and a `mamba_core.backend.Context` that return logits, all arrays of the
            model's framework. They run inside the compiled step, and one that is new is compiled anew.
        stop: token ids, or texts, at which a row ends; the config's eos_token_id always does.
        seed: for all prompts, or one for each.
        n: continuations of each prompt.
        top_logprobs: how many of the likeliest tokens to return beside each.
        state: what the prompts go on from, of one row for each prompt, or of one row that all of them go on from.
        return_state: whether the result has a state, to go on from in another call.
        prefill_chunk: positions of the prompts that are computed at once. The memory they need grows with it, and not
            with the prompts.
        tokenizer: any object with `encode(text)` and `decode(ids)`, such as those of transformers, tokenizers,
            sentencepiece and tiktoken; by default the checkpoint's own, or bytes for a vocabulary of 256.

    Raises:
        TypeError: the model is not of this library, or something is of another type than above.
        ValueError: the model is of another task than "lm", a prompt is empty and there is a state or the config has no
            bos_token_id, a token is outside the vocabulary, there is no template for the messages, or a setting is out
            of range.
        ImportError: messages are given and jinja2 is not installed.
    """
    sampling = Sampling(
        *(temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty),
        processors=processors,  # type: ignore[arg-type]  # Sampling makes a tuple of it
        top_logprobs=top_logprobs,
    )
    run = Run(
        *(model, prompts, sampling),
        messages=messages,
        inputs_embeds=inputs_embeds,
        max_new_tokens=max_new_tokens,
        logit_bias=logit_bias,
        stop=stop,
        seed=seed,
        n=n,
        state=state,
        prefill_chunk=prefill_chunk,
        tokenizer=tokenizer,
    )
    for _ in run.steps():
        pass
    return run.result(return_state)


class Stream(Iterator[str]):
    """Text as it comes, always whole characters. `close()` ends it early, as leaving it does, and frees its memory."""

    def __init__(self, run: "Run"):
        self._run = run
        self._pieces = self._generate()

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        self._pieces.close()

    def result(self, return_state: bool = False) -> Result:
        """What has been generated so far, as `generate` would return it."""
        return self._run.result(return_state)

    def _generate(self) -> Generator[str, None, None]:
        row, sent = self._run.rows[0], 0
        for _ in self._run.steps():
            text, sent = row.since(sent)
            if text:
                yield text


def stream(
    model: Any,
    prompt: Any = None,
    *,
    messages: Any = None,
    inputs_embeds: Any = None,
    max_new_tokens: int = 64,
    logit_bias: Mapping[int, float] | None = None,
    stop: str | int | Sequence[str | int] = (),
    seed: int = 0,
    state: State | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    tokenizer: Any = None,
    **sampling: Any,
) -> Stream:
    """Continue one prompt, yielding text as it comes; arguments as in `generate`."""
    run = Run(
        *(model, prompt, Sampling(**sampling)),
        messages=messages,
        inputs_embeds=inputs_embeds,
        max_new_tokens=max_new_tokens,
        logit_bias=logit_bias,
        stop=stop,
        seed=seed,
        state=state,
        prefill_chunk=prefill_chunk,
        tokenizer=tokenizer,
    )
    if not run.has_text:
        raise ValueError("streaming text needs a tokenizer; the model has none, so pass tokenizer=")
    if len(run.rows) != 1:
        raise ValueError(f"stream continues one prompt; {len(run.rows)} were given")
    return Stream(run)


class Run:
    """One call of `generate` with its settings checked, to be taken step by step; `rows` holds what there is so far."""

    def __init__(
        self,
        model,
        prompts: Any = None,
        sampling: Sampling = GREEDY,
        *,
        messages: Any = None,
        inputs_embeds: Any = None,
        max_new_tokens: int = 64,
        logit_bias: Mapping[int, float] | None = None,
        stop: str | int | Sequence[str | int] = (),
        seed: int | Sequence[int] = 0,
        n: int = 1,
        state: State | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        tokenizer=None,
    ):
        model = unwrap(model, "generating")
        tasks.check_generates(model.config, "generating")
        check_steps(model.config, "generating")
        check_mixers_step(model, "generating")
        tokenizer = tokenizer_of(model) if tokenizer is None else as_tokenizer(tokenizer)
        self._model, self._backend, self._sampling = model, registry.get(model.backend), sampling
        self._chunk, n = integer("prefill_chunk", prefill_chunk, least=1), integer("n", n, least=1)
        self._limit = integer("max_new_tokens", max_new_tokens, least=0)
        given = {"prompts": prompts, "messages": messages, "inputs_embeds": inputs_embeds}
        if (count := sum(value is not None for value in given.values())) != 1:
            raise TypeError(f"expected one of {', '.join(given)}; {count or 'none'} given")
        # (b, l, d), in the place of prompts, which are then empty.
        self._embeds = None if inputs_embeds is None else inputs.embeddings(model, inputs_embeds)
        if self._embeds is not None:
            self._prompts: list[list[int]] = [[] for _ in self._embeds]
        elif messages is not None:
            self._prompts = inputs.of_messages(model, messages, tokenizer, state is not None)
        else:
            self._prompts = inputs.of_prompts(model, prompts, tokenizer, state is not None, self._limit)
        self._state = self._given(state)
        self._forks = np.repeat(np.arange(len(self._prompts)), n)
        self._draw = Uniforms(seed, len(self._prompts), n)
        contexts = [self._prompts[prompt] for prompt in self._forks]
        self._context = first_context(sampling, logit_bias, contexts, model.config.vocab_size)
        self.rows = [_Row(model.config, stop, tokenizer, self._limit, prompt) for prompt in contexts]
        self.has_text = tokenizer is not None
        self._read = False
        self._began = self._first = self._ended = perf_counter()

    def steps(self) -> Iterator[None]:
        """Decode until every row has ended, filling the rows; yields after each token."""
        self._began = self._first = self._ended = perf_counter()
        prefilled = self._prefill(self._prompts, self._state, self._embeds)
        if len(self._forks) > len(self._prompts):
            prefilled = self._backend.fork(prefilled, self._forks)
        self._state, self._read = prefilled.state, True
        if self._limit == 0:
            return
        draw = None if self._sampling.greedy else self._draw
        settings = {"context": self._context, "draw": draw, "limit": self._limit}
        for step, choice in enumerate(self._backend.decode(self._model, prefilled, self._sampling, **settings)):
            self._ended = perf_counter()
            self._first = self._first if step else self._ended
            for row, choices in zip(self.rows, _by_row(choice), strict=True):
                row.add(*choices)
            yield
            if all(row.finished for row in self.rows):
                return

    def result(self, return_state: bool = False) -> Result:
        """What there is so far; without a state as long as the prompts have not been read."""
        tokens = [row.tokens for row in self.rows]
        return Result(
            tokens=tokens,
            text=[row.text for row in self.rows] if self.has_text else None,
            logprobs=[row.logprobs for row in self.rows],
            top_logprobs=[row.top_logprobs for row in self.rows] if self._sampling.top_logprobs else None,
            finish_reasons=[row.finished for row in self.rows],
            state=self._prefill(tokens, self._state).state if return_state and self._read else None,
            prompt_seconds=self._first - self._began,
            seconds=self._ended - self._began,
        )

    def _given(self, state: State | None) -> State | None:
        """The state with a row for each prompt."""
        if state is None:
            return None
        rows = len(self._prompts)
        if rows > 1 and getattr(getattr(state, "segment", None), "shape", None) == (1,):
            state = self._backend.fork(state, np.zeros(rows, np.int64))
        check_state(self._model.config, rows, state)
        return state

    def _prefill(self, rows: list[list[int]], state: State | None, embeds: np.ndarray | None = None) -> Output:
        """The logits after each row's last token, and the state there, chunk by chunk; embeds in the place of rows.

        Rows are padded on the left, so that all end in the last chunk, and a chunk's end does not depend on neighbours.
        """
        if embeds is not None:
            return self._in_chunks(embeds, np.ones(embeds.shape[:2], bool), state)
        longest = max(len(row) for row in rows)
        if longest == 0:
            return Output(None, self._model.init_state(len(rows)) if state is None else state)
        tokens = np.zeros((len(rows), longest), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, given in enumerate(rows):
            if given:
                tokens[row, -len(given) :], mask[row, -len(given) :] = given, True
        return self._in_chunks(tokens, mask, state)

    def _in_chunks(self, tokens: np.ndarray, mask: np.ndarray, state: State | None) -> Output:
        """tokens (b, l), or (b, l, d) in the place of their embeddings; mask (b, l)."""
        length = tokens.shape[1]
        for end in range(length % self._chunk or self._chunk, length + 1, self._chunk):
            part = slice(max(end - self._chunk, 0), end)
            prefilled = self._backend.prefill(self._model, tokens[:, part], mask[:, part], state)
            state = prefilled.state
        return prefilled


def _by_row(choice: Choice) -> Iterator[tuple]:
    """(token, log-probability, the likeliest as pairs or None) of each row."""
    tops: list = [None] * len(choice.tokens)
    if choice.top_tokens is not None and choice.top_logprobs is not None:
        likeliest = zip(choice.top_tokens.tolist(), choice.top_logprobs.tolist(), strict=True)
        tops = [list(zip(tokens, logprobs, strict=True)) for tokens, logprobs in likeliest]
    return zip(choice.tokens.tolist(), choice.logprobs.tolist(), tops, strict=True)


class _Row:
    """One row's tokens and text so far, and why it ended."""

    def __init__(self, config, stop, tokenizer, limit: int, prompt: Sequence[int] = ()):
        stops = [stop] if isinstance(stop, str) or not isinstance(stop, Iterable) else list(stop)
        self._stop_texts = [item for item in stops if isinstance(item, str)]
        self._stop_tokens = {integer("stop", item) for item in stops if not isinstance(item, str)}
        if self._stop_texts and tokenizer is None:
            raise ValueError("stop has texts, which need a tokenizer; the model has none, so pass tokenizer= or ids")
        if "" in self._stop_texts:
            raise ValueError("stop has an empty text, which would end every row at once")
        self._longest = max((len(text) for text in self._stop_texts), default=0)
        self._eos = config.eos_token_ids
        self._decode = (lambda token: "") if tokenizer is None else tokenizer.decoder(prompt)
        self._limit = limit
        # Text that is surely there, and what may yet be the beginning of a stop text.
        self._pieces: list[str] = []
        self._held = ""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list = []
        self.finished = "length" if limit == 0 else None

    @property
    def text(self) -> str:
        return "".join(self._pieces) + self._held

    def since(self, sent: int) -> tuple[str, int]:
        """What has been surely there since this was last called, and what to call it with next."""
        return "".join(self._pieces[sent:]), len(self._pieces)

    def add(self, token: int, logprob: float, top: list | None) -> None:
        if self.finished:
            return
        if not math.isfinite(logprob):
            self._finish("nan" if math.isnan(logprob) else "masked")
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.top_logprobs.append(top)
        if token in self._eos:
            self._finish("eos")
        elif token in self._stop_tokens:
            self._finish("stop")
        elif not self._stopped(self._decode(token)) and len(self.tokens) == self._limit:
            self._finish("length")

    def _finish(self, reason: str) -> None:
        if not self._stopped(self._decode(None)):
            self._pieces.append(self._held)
            self._held, self.finished = "", reason

    def _stopped(self, piece: str) -> bool:
        """Whether a stop text is complete with this piece, which ends the row; else it joins the text."""
        text = self._held + piece
        if found := [at for stop in self._stop_texts if (at := text.find(stop)) >= 0]:
            self._pieces.append(text[: min(found)])
            self._held, self.finished = "", "stop"
            return True
        held = next(
            (
                length
                for length in range(min(self._longest - 1, len(text)), 0, -1)
                if any(stop.startswith(text[-length:]) for stop in self._stop_texts)
            ),
            0,
        )
        if piece:
            self._pieces.append(text[: len(text) - held])
            self._held = text[len(text) - held :]
        return False
