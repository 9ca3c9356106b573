"""mamba-core convert: write a checkpoint in another layout."""

import argparse
import re
from contextlib import ExitStack
from pathlib import Path

from mamba_core.cli.output import add_json, add_layout, add_source, byte_progress, console, print_nonfinite, print_table
from mamba_core.config import COMPUTE_DTYPES
from mamba_core.weights.convert import Conversion, convert
from mamba_core.weights.formats import WRITERS, atomic_file, probe_file

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser, "SRC")
    parser.add_argument("target", metavar="DST", help="a folder, which appears only when complete")
    add_layout(parser, "--to", required=True, help="the layout to write")
    parser.add_argument("--format", choices=sorted(WRITERS), help="the kind of file; what the layout's library reads")
    parser.add_argument("--dtype", choices=COMPUTE_DTYPES, help="cast, but A_log, D and dt bias to float32; as stored")
    parser.add_argument("--lossy", action="store_true", help="allow a --dtype that rounds values")
    parser.add_argument(
        "--shard-size", type=parse_size, metavar="SIZE", help="the most in one safetensors file, such as 2GB; 5GB"
    )
    parser.add_argument("--verify", action="store_true", help="read DST again and compare checksums and a forward")
    parser.add_argument("--overwrite", action="store_true", help="replace DST")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write every tensor's row as JSON")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.report is not None:
        probe_file(arguments.report, arguments.overwrite)
    with ExitStack() as shown:
        done = convert(
            arguments.source,
            arguments.target,
            to=arguments.to,
            layout=arguments.layout,
            file_format=arguments.format,
            dtype=arguments.dtype,
            lossy=arguments.lossy,
            shard_bytes=arguments.shard_size,
            verify=arguments.verify,
            overwrite=arguments.overwrite,
            revision=arguments.revision,
            compat=arguments.compat,
            progress=None if arguments.json else byte_progress(shown, "convert"),
        )
    if arguments.report is not None:
        with atomic_file(arguments.report, overwrite=arguments.overwrite) as path:
            path.write_text(done.to_json() + "\n")
    if arguments.json:
        print(done.to_json())
    else:
        _show(arguments, done)
    return 0


def parse_size(text: str) -> int:
    """Bytes of a size such as 2GB, 500 MB or 1000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected such as 2GB or 500MB")
    return size


def _show(arguments: argparse.Namespace, done: Conversion) -> None:
    if arguments.tensors:
        rows = [
            [row.source, row.target, "x".join(map(str, row.shape)), row.source_dtype, row.dtype, row.transform or "-",
             row.checksum]
            for row in done.tensors
        ]  # fmt: skip
        print_table("tensors", ["source", "target", "shape", "from", "to", "transform", "crc32"], rows)
    print_nonfinite(done.nonfinite)
    size = f"{len(done.tensors)} tensors, {done.nbytes / 1e6:,.1f} MB"
    console.print(f"{size} from {done.source_layout} to {done.target_layout}: {arguments.target}", soft_wrap=True)
    if done.left_out:
        console.print(f"left out, for they are no part of the model: {', '.join(done.left_out)}", soft_wrap=True)
    if (checked := done.verification) is not None:
        forward = "no forward: no framework is installed, and the model is large for the reference"
        if checked.backend is not None:
            forward = f"{checked.positions} positions on {checked.backend} in {checked.dtype} agree bit for bit"
        console.print(f"verified: {checked.tensors} checksums agree; {forward}", soft_wrap=True)
