"""The command line: ``python -m tokencomp demo | eval | info | methods | bench``."""

import argparse
import os
import platform
import runpy
import sys
from pathlib import Path

import torch

import tokencomp
from tokencomp import _load, methods, methods_table
from tokencomp.eval import command


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tokencomp", description="Token compression for Transformers.")
    parser.add_argument("--version", action="version", version=f"tokencomp {tokencomp.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="select tokens of two photographs and of the models that ship")
    demo.add_argument("--keep", type=float, default=0.1, help="share of tokens kept (default 0.1)")
    demo.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default out/)")
    commands.add_parser(
        "info", help="versions, back ends and why one is missing, instruction sets, threads, GPU"
    )
    known = commands.add_parser("methods", help="the compression methods and their knobs")
    known.add_argument("--markdown", action="store_true", help="as tables, without knobs")
    commands.add_parser(
        "bench", help="run the benches of the source checkout (options: bench --help)", add_help=False
    )
    evaluation = commands.add_parser("eval", help="quality, bytes and times of a compressed model that ships")
    command.add_arguments(evaluation)
    args, rest = parser.parse_known_args(arguments)
    if rest and args.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command == "demo":
        return _demo(args.keep, args.out)
    if args.command == "eval":
        return command.run(args)
    if args.command == "info":
        return _info()
    if args.command == "methods":
        return _methods(args.markdown)
    return _bench(rest)


def _demo(keep: float, out: Path) -> int:
    if not 0.0 < keep <= 1.0:
        print(f"demo: --keep must be in (0, 1], got {keep}", file=sys.stderr)
        return 2
    try:
        from tokencomp.demo import run
    except ImportError as error:
        print(
            f"demo: needs scikit-learn and pillow ({error}): pip install 'tokencomp[demo]'", file=sys.stderr
        )
        return 1
    return run(keep, out)


def _info() -> int:
    lines = {
        "tokencomp": tokencomp.__version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
    }
    for library in _load.libraries().values():
        lines[f"{library.name} back end"] = "loaded" if library.loaded else f"not loaded: {library.reason}"
    features = tokencomp.cpu_features()
    lines["instruction set"] = f"{features['active']} (available: {', '.join(features['available'])})"
    lines["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    lines["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines |= {f"build: {key}": str(value) or "none" for key, value in sorted(tokencomp.build_info().items())}
    width = max(map(len, lines))
    for key, value in lines.items():
        print(f"{key:{width}}  {value}")
    return 0


def _methods(markdown: bool) -> int:
    if markdown:
        print(methods_table.markdown(), end="")
        return 0
    for method in methods.all_methods():
        source = f"arXiv {method.paper}" if method.paper else "baseline"
        print(f"{method.name}  ({method.cls.__name__}, {source})")
        print(f"    {method.summary}")
        print(f"    acts on: {method.stage}")
        for knob in method.knobs:
            print(f"    {knob.name} = {knob.default!r}: {knob.help}")
        print()
    return 0


def _bench(rest: list[str]) -> int:
    script = Path(__file__).resolve().parents[2] / "bench" / "run.py"
    if not script.is_file():
        print(
            "bench: the benches are part of the source checkout, and this installation is not in one",
            file=sys.stderr,
        )
        return 1
    sys.argv = [str(script), *rest]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else _failed(stop.code)
    return 0


def _failed(message: object) -> int:
    print(message, file=sys.stderr)
    return 1
