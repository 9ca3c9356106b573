"""mamba-core generate: continue a prompt with a checkpoint."""

import argparse
import dataclasses
import sys

from mamba_core import factory
from mamba_core.cli.output import add_backend, add_json, add_source, print_json
from mamba_core.generation import generate, stream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="text; - reads standard input")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 for all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    add_backend(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
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
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    if arguments.json:
        print_json({"prompt": prompt} | dataclasses.asdict(generate(model, prompt, **settings)))
        return 0
    pieces = stream(model, prompt, **settings)
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
