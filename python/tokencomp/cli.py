"""The command line: ``tokencomp demo | eval | plan | methods | operators | info | bench``."""

import argparse
import dataclasses
import json
import runpy
import sys
from pathlib import Path

import tokencomp
from tokencomp import installation, methods, methods_table, operators_reference, planning
from tokencomp.eval import command


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=_called(), description="Token compression for Transformers. Begin with: demo"
    )
    parser.add_argument("--version", action="version", version=f"tokencomp {tokencomp.__version__}")
    commands = parser.add_subparsers(dest="command")
    demo = commands.add_parser("demo", help="select tokens of two photographs and of the models that ship")
    demo.add_argument("--keep", type=float, default=0.1, help="share of tokens kept (default 0.1)")
    demo.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default out/)")
    demo.add_argument("--json", action="store_true", help="print JSON in place of tables")
    info = commands.add_parser(
        "info", help="versions, back ends and why one is missing, operators, instruction sets, threads, GPU"
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    known = commands.add_parser("methods", help="the compression methods and their knobs")
    known.add_argument("name", nargs="*", help="of a method, such as snapkv (default: all)")
    form = known.add_mutually_exclusive_group()
    form.add_argument("--markdown", type=Path, metavar="FOLDER", help="write the tables, and a page a group")
    form.add_argument("--json", action="store_true", help="print JSON")
    operators = commands.add_parser("operators", help="the operators, their schemas and back ends")
    form = operators.add_mutually_exclusive_group()
    form.add_argument("--markdown", type=Path, metavar="FOLDER", help="write the reference, a page a family")
    form.add_argument("--json", action="store_true", help="print JSON")
    commands.add_parser(
        "bench", help="run the benches of the source checkout (options: bench --help)", add_help=False
    )
    evaluation = commands.add_parser("eval", help="quality, bytes and times of a compressed model that ships")
    command.add_arguments(evaluation)
    plan = commands.add_parser("plan", help="what fits: bytes of weights and KV caches, and the call to make")
    planning.command.add_arguments(plan)
    args, rest = parser.parse_known_args(arguments)
    if rest and args.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    if args.command == "demo":
        return _demo(args.keep, args.out, args.json)
    if args.command == "eval":
        return command.run(args)
    if args.command == "plan":
        return planning.command.run(args)
    if args.command == "info":
        return _info(args.json)
    if args.command == "methods":
        return _methods(args.name, args.markdown, args.json)
    if args.command == "operators":
        return _operators(args.markdown, args.json)
    return _bench(rest)


def _called() -> str:
    name = Path(sys.argv[0]).name
    return name if name == "tokencomp" else "python -m tokencomp"


def _demo(keep: float, out: Path, as_json: bool) -> int:
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
    return run(keep, out, as_json)


def _info(as_json: bool) -> int:
    found = installation.describe()
    if as_json:
        print(json.dumps(found, indent=1))
        return 0
    lines = installation.lines(found)
    width = max(map(len, lines))
    for key, value in lines.items():
        print(f"{key:{width}}  {value}")
    return 0


def _methods(names: list[str], folder: Path | None, as_json: bool) -> int:
    try:
        chosen = [methods.get(name) for name in names] or methods.all_methods()
    except KeyError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    if folder is not None:
        pages = {f"methods/{group}.md": page for group, page in methods_table.pages().items()}
        readme = folder.resolve().parent / "README.md"
        if readme.is_file() and (text := readme.read_text()) != (new := methods_table.with_short(text)):
            readme.write_text(new)
            print(f"wrote {readme}")
        return _write(folder, {"methods.md": methods_table.markdown(), **pages})
    if as_json:
        wanted = {method.name for method in chosen}
        print(json.dumps([entry for entry in methods_table.as_json() if entry["name"] in wanted], indent=1))
        return 0
    for method in chosen:
        source = f"arXiv {method.paper}" if method.paper else "baseline"
        print(f"{method.name}  ({method.cls.__name__}, {source})")
        print(f"    {method.summary}")
        print(f"    acts on: {method.stage}")
        for knob in method.knobs:
            default = " (required)" if knob.default is dataclasses.MISSING else f" = {knob.default!r}"
            print(f"    {knob.name}{default}: {knob.help}")
        print()
    return 0


def _operators(folder: Path | None, as_json: bool) -> int:
    if folder is not None:
        return _write(folder, {f"{family}.md": page for family, page in operators_reference.pages().items()})
    if as_json:
        print(json.dumps(operators_reference.as_json(), indent=1))
    else:
        for entry in operators_reference.as_json():
            on = ", ".join(entry["back_ends"])
            print(f"{entry['name']}  ({entry['family']}; {on})\n    {entry['summary']}")
    return 0


def _write(folder: Path, pages: dict[str, str]) -> int:
    for name, page in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(page)
        print(f"wrote {folder / name}", file=sys.stderr)
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
