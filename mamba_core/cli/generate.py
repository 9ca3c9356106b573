"""mamba-core generate: continue a prompt with a checkpoint, or talk with it turn by turn."""

import argparse
import dataclasses
import sys

from mamba_core import factory, registry
from mamba_core.backend import State
from mamba_core.cli.output import add_backend, add_json, add_source, print_json
from mamba_core.generation import PREFILL_CHUNK, Result, Run, Stream, stream
from mamba_core.sampling import Sampling

try:
    import resource
except ModuleNotFoundError:  # on Windows
    resource = None  # type: ignore[assignment]

INTERRUPTED = 130  # as shells have it for a program that SIGINT ends
SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    "top_logprobs",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    prompt = parser.add_argument("prompt", metavar="PROMPT", help="text; - reads standard input")

    class Interactive(argparse.Action):
        """Then PROMPT may be left out. With nargs="?" options could not stand before it."""

        def __call__(self, parser, namespace, *_):
            namespace.interactive, prompt.required = True, False

    told = "turn by turn, each going on from what was before"
    parser.add_argument("--interactive", action=Interactive, nargs=0, default=False, help=told)
    parser.add_argument(
        "--chat", action="store_true", help="PROMPT is a message, which the chat template puts in place"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system's message, before it; with --chat")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 for all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    parser.add_argument("--presence-penalty", type=float, default=0.0, metavar="X")
    parser.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X")
    parser.add_argument("--logit-bias", action="append", default=[], metavar="ID=X", type=_bias, help="repeatable")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; repeatable")
    parser.add_argument("--stop-token", action="append", default=[], metavar="ID", type=int, help="and at this token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-n", type=int, default=1, metavar="N", help="continuations of the prompt")
    parser.add_argument("--top-logprobs", type=int, default=0, metavar="K", help="the likeliest tokens, with --json")
    parser.add_argument("--prefill-chunk", type=int, default=PREFILL_CHUNK, metavar="N", help="bounds the memory")
    parser.add_argument("--state", metavar="FILE", help="go on from a state that --save-state wrote")
    parser.add_argument("--save-state", metavar="FILE", help="write the state at the end, for any backend")
    add_backend(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.interactive and (arguments.json or arguments.n != 1):
        raise ValueError("--interactive shows one continuation as it comes; it goes without --json and -n")
    if arguments.system is not None and not arguments.chat:
        raise ValueError("--system is a message; it goes with --chat")
    if arguments.chat and arguments.state is not None:
        raise ValueError("--chat reads messages from their beginning; it goes without --state")
    model = factory.load(
        arguments.source,
        backend=arguments.backend,
        dtype=arguments.dtype,
        device=arguments.device,
        kernels=arguments.kernels,
        layout=arguments.layout,
        revision=arguments.revision,
        compat=arguments.compat,
    )
    state = None if arguments.state is None else factory.load_state(arguments.state, model)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    settings = {name: getattr(arguments, name) for name in ("max_new_tokens", "prefill_chunk", "seed")}
    settings |= {"stop": [*arguments.stop, *arguments.stop_token], "logit_bias": dict(arguments.logit_bias)}
    sampling = {name: getattr(arguments, name) for name in SAMPLING}
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    if arguments.interactive:
        turns: _Chat | _Text = _Chat(model, system) if arguments.chat else _Text(model, state)
        return _converse(model, prompt, turns, settings | sampling, arguments.save_state)
    talk = [*system, {"role": "user", "content": prompt.rstrip("\n")}] if arguments.chat else None
    text, given = None if arguments.chat else prompt, settings | {"messages": talk, "state": state}
    taken: Run | Stream
    if arguments.json or arguments.n != 1:
        run = taken = Run(model, text, Sampling(**sampling), n=arguments.n, **given)
        interrupted = _interrupted(run.steps())
        _show_all(model, prompt, run, arguments)
    else:
        shown = taken = stream(model, text, **given, **sampling)
        print("" if arguments.chat else prompt, end="", flush=True)
        interrupted = _shown(shown)
        _report(model, shown.result())
    if arguments.save_state is not None and (state := taken.result(return_state=True).state) is not None:
        factory.save_state(state, arguments.save_state, model)
    return INTERRUPTED if interrupted else 0


class _Text:
    """A text that grows by turns, each going on from the state of the last."""

    def __init__(self, model, state):
        self._model, self.state = model, state

    def begin(self, prompt: str, settings: dict) -> Stream:
        # What stands on the screen: a turn begins on a line of its own.
        text = prompt if self.state is None else f"\n{prompt}"
        return stream(self._model, text, state=self.state, **settings)

    def end(self, result: Result) -> None:
        # There is none where the interrupt came before all was read: then the turn has not been.
        self.state = self.state if result.state is None else result.state


class _Chat:
    """A conversation. Each turn reads all of it, because a template may write earlier messages anew."""

    def __init__(self, model, messages: list):
        self._model, self._messages, self._asked = model, messages, messages
        self.state: State | None = None

    def begin(self, prompt: str, settings: dict) -> Stream:
        self._asked = [*self._messages, {"role": "user", "content": prompt}]
        return stream(self._model, messages=self._asked, **settings)

    def end(self, result: Result) -> None:
        if result.state is not None and result.text is not None:
            self._messages = [*self._asked, {"role": "assistant", "content": result.text[0]}]
            self.state = result.state


def _converse(model, prompt: str | None, turns: _Text | _Chat, settings: dict, path: str | None) -> int:
    """Turn by turn until the end of the input. An interrupt ends a turn with what there is, and between them all."""
    seed = settings.pop("seed")
    while True:
        try:
            prompt = input("> ") if prompt is None else prompt
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        try:
            taken = turns.begin(prompt, settings | {"seed": seed})
            _shown(taken)
            result = taken.result(return_state=True)
        except ValueError as fault:
            print(f"mamba-core: {fault}", file=sys.stderr)
        else:
            _report(model, result)
            turns.end(result)
            seed += 1
            if path is not None and turns.state is not None:
                factory.save_state(turns.state, path, model)
        prompt = None


def _shown(pieces: Stream) -> bool:
    """Print text as it comes; whether it was interrupted."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
        return True
    finally:
        print(flush=True)
    return False


def _interrupted(steps) -> bool:
    """Take all steps; whether that was interrupted."""
    try:
        for _ in steps:
            pass
    except KeyboardInterrupt:
        return True
    return False


def _show_all(model, prompt: str, taken: Run, arguments: argparse.Namespace) -> None:
    result = taken.result()
    if arguments.json:
        shown = {"prompt": prompt} | dataclasses.asdict(result) | {"peak_memory": _peak_memory(model)}
        print_json({name: value for name, value in shown.items() if name != "state"})
        return
    for index, text in enumerate(result.text or []):
        print(f"--- {index}\n{'' if arguments.chat else prompt}{text}")
    _report(model, result)


def _report(model, result: Result) -> None:
    """Speed and memory, on standard error."""
    new, rest = sum(map(len, result.tokens)), result.seconds - result.prompt_seconds
    # The first token of each row comes with the prompt.
    later = new - sum(map(bool, result.tokens))
    speed = f", then {later / rest:.1f} tokens/s" if later and rest > 0 else ""
    memory = _peak_memory(model)
    told = "" if memory is None else f"; {memory / 2**20:,.0f} MiB at most"
    print(f"{new} tokens: the first after {result.prompt_seconds:.2f} s{speed}{told}", file=sys.stderr)


def _peak_memory(model) -> int | None:
    """Bytes: of the device's own memory, else of this process."""
    if (own := registry.get(model.backend).peak_memory(model.device)) is not None:
        return own
    if resource is None:
        return None
    # In KiB, but on a Mac in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _bias(text: str) -> tuple[int, float]:
    token, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=X")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a token id and a number as ID=X") from None
