"""The ``lightning`` command. Nothing heavy is imported before a subcommand needs it."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.config import Point

DESCRIPTION = """\
Scion: graft small trainable parts onto large frozen models.

  lightning run domains/audio/esc50.yaml                        adapt an audio model with LoRA
  lightning run domains/audio/esc50.yaml --peft DoRA --peft.rank 16 --trainer.max_epochs 5
  lightning run domains/audio/esc50.yaml --over peft=LoRA,BitFit --over seed_everything=0,1,2
  lightning methods LoRA                                        what a method is and does
"""


def parser() -> argparse.ArgumentParser:
    """The argument parser: ``run`` and ``describe`` take any ``--key value`` of the configuration besides."""
    main = argparse.ArgumentParser("lightning", description=DESCRIPTION,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    main.add_argument("--version", action="store_true", help="print Scion's version and exit")
    commands = main.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    overrides = ("Any key of the configuration can be set beside it: --peft LoRA --peft.rank 16, --data.root FOLDER, "
                 "--peft+=BitFit; the last word on a key holds. --over AXIS=A,B repeats the run over values, --per "
                 "'{AXIS: {A: {KEY: VALUE}}}' sets keys for one of them.")
    sub = command("run", "train, test and save what a configuration describes")
    sub.formatter_class = argparse.RawDescriptionHelpFormatter
    sub.epilog = _run_epilog(overrides)
    sub.add_argument("config", help="a YAML file, on disk or in an installed domain")
    sub.add_argument("--run_dir", help="folder of the run (default runs/<config>/<method>-seed<n>-<k>)")
    sub.add_argument("--overwrite", action="store_true", help="start anew where the folder holds a run")
    sub.add_argument("--print_config", action="store_true", help="print the resolved configuration as YAML and stop")
    sub = command("describe", "count parameters, FLOPs and bytes before training")
    sub.epilog = overrides
    sub.add_argument("config", help="a YAML file, on disk or in an installed domain")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument("--trust", action="store_true", help="where CONFIG is in a run's folder: the run is your own")
    sub = command("methods", "list the methods, or show one's card")
    sub.add_argument("name", nargs="?", help="a method")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument("--family", help="of a family: additive, partial, reparameterised, hybrid, unified, or a folder's")
    sub.add_argument("--kind", help="what it modifies: linear, block, tokens, scale, entries, norms, optimizer, ...")
    sub.add_argument("--mergeable", action="store_true", help="what can be written into the weights")
    sub.add_argument("--planned", action="store_true", help="what is known and not here yet")
    sub = command("roles", "show which roles a backbone has, and which modules play them")
    sub.add_argument("model", help="nano, a timm name, a transformers id or a folder")
    sub = command("merge", "write a run's methods into its backbone and save that as a plain checkpoint")
    sub.add_argument("run", help="a run folder")
    sub.add_argument("out", help="a folder to make")
    sub = command("export", "write methods as an adapter that another library opens")
    sub.add_argument("adapter", help="a run folder, or an adapter folder")
    sub.add_argument("out", help="a folder to make")
    sub.add_argument("--format", choices=["peft"], default="peft", help="the library: Hugging Face peft")
    sub.add_argument("--model", help="the backbone that an adapter alone does not name; names as for roles")
    sub = command("import", "make an adapter of one that Hugging Face peft wrote")
    sub.add_argument("folder", help="with adapter_config.json and adapter_model.safetensors")
    sub.add_argument("out", help="a folder to make")
    sub.add_argument("--model", required=True, help="the backbone that it is for; names as for roles")
    _add_patch(command("patch", "carry what a run has learned to another base of its architecture"))
    sub = command("test", "measure a finished run on other data, or with a method replaced")
    sub.epilog = ("What is other than in the run: --data.root FOLDER, --data.X, --task.X (arguments of the task), "
                  "--trainer.accelerator.")
    sub.add_argument("run", help="a run folder")
    sub.add_argument("--swap", action="append", default=[], metavar="NAME=FOLDER",
                     help="give the run's method NAME the values of the one in FOLDER")
    sub.add_argument("--trust", action="store_true", help="the run is your own: it may name any class by its full path")
    sub = command("predict", "label files with a finished run, or write texts behind the prompts in them")
    sub.epilog = ("A language model writes texts: --generate.max_new_tokens 64, and --generate.X for other settings "
                  "(temperature, top_p, top_k, seed, samples, beams, stop, batch_size, cache, set, restart).")
    sub.add_argument("run", help="a run folder")
    sub.add_argument("files", nargs="+", help="files to label, or folders of them; of texts one a line, - for "
                     "standard input")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument("--features", action="store_true", help="give the vector that the head reads, and no label")
    sub.add_argument("--out", metavar="FILE", help="write all, each class's probability too: .csv, .jsonl or .npy")
    sub.add_argument("--trust", action="store_true", help="the run is your own: it may name any class by its full path")
    main.set_defaults(names=tuple(commands.choices))
    return main


def _run_epilog(overrides: str) -> str:
    """What ``lightning run --help`` ends with."""
    import textwrap

    from core.config.keys import keys_text  # start-up time

    paragraphs = textwrap.fill(f"{overrides} `lightning run CONFIG --help` prints every field of a configuration.", 110)
    return f"{paragraphs}\n\nkeys of a configuration:\n{keys_text()}"


def _add_patch(main: argparse.ArgumentParser) -> None:
    """The subcommands of ``patch``."""
    actions = main.add_subparsers(dest="action", metavar="take|apply|add", required=True)

    def action(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, description=text, allow_abbrev=False)

    sub = action("take", "write what a run's methods change, and its head, as a patch")
    sub.add_argument("run", help="a run folder")
    sub.add_argument("out", help="a folder to make")
    sub.add_argument("--rank", type=int, help="keep this rank of each matrix's change (default: all)")
    sub = action("apply", "add a patch to another base and save that as a plain checkpoint")
    sub.add_argument("patch", help="a patch's folder")
    sub.add_argument("base", help="a run folder (its methods are merged first), or a backbone's folder or name")
    sub.add_argument("out", help="a folder to make")
    sub.add_argument("--scale", type=_finite, default=1.0, help="factor of the patch (default 1)")
    sub = action("add", "write the sum of two patches")
    sub.add_argument("one", help="a patch's folder")
    sub.add_argument("other", help="another one")
    sub.add_argument("out", help="a folder to make")
    sub.add_argument("--scale", type=_finite, nargs=2, default=(1.0, 1.0), metavar=("ONE", "OTHER"),
                     help="factors of the two (default 1 1; 1 -1 subtracts)")
    sub.add_argument("--head", choices=["first", "second", "none"], help="whose head stays, where both bring one")


def _finite(text: str) -> float:
    import math

    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return number


OWN = {"--run_dir": True, "--overwrite": False, "--json": False, "--trust": False, "--print_config": False,
       "--help": False, "--swap": True}
"""Options of ``run``, ``describe`` and ``test`` that are no keys of a configuration, or stand beside one
(``--run_dir``), and whether a value follows."""


def _apart(words: list[str], prefix: str = "--") -> tuple[list[str], list[str]]:
    """The command's own words, and those that set keys of the configuration, or of what ``prefix`` begins with, each
    with its value."""
    own: list[str] = []
    keys: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        is_key = word.startswith(prefix) and name not in OWN and word != "--"
        into = keys if is_key else own
        into.append(word)
        follows = not equals and (is_key or OWN.get(name, False))
        if follows and rest and rest[0].partition("=")[0] not in OWN:
            into.append(rest.pop(0))
    return own, keys


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for what went wrong, 130 or 143 when interrupted."""
    main_parser = parser()
    names = main_parser.get_default("names")
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words  # wherever it stands
    words = [word for word in words if word != "--debug"]
    if words and not words[0].startswith("-") and words[0] not in names:
        return _guarded(words[0], lambda: _call_domains(words, names), debug)
    if not words or words[0] in ("--help", "-h"):
        main_parser.epilog = _domains_help(names)
    own, keys = _apart(words) if words[:1] in (["run"], ["describe"], ["test"]) else (words, [])
    if words[:1] == ["predict"]:
        own, keys = _apart(words, "--generate.")
    asks = [word for word in own if word in ("--help", "-h")]
    if words[:1] == ["run"] and asks and len(own) > 1 + len(asks):
        return _fields_of([word for word in own if word not in asks], keys)
    arguments, rest = main_parser.parse_known_args(own)
    rest += keys
    if arguments.version:
        from core import __version__  # start-up time

        print(f"scion-peft {__version__}")
        return 0
    if arguments.command is None:
        main_parser.print_help()
        return 0
    if rest != keys and arguments.command not in ("run", "describe", "test"):
        main_parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if getattr(arguments, "run_dir", None) == "":
        main_parser.error("argument --run_dir: the name of a folder is missing")
    return _guarded(arguments.command, lambda: _dispatch(arguments, rest), debug)


def _guarded(command: str, work: Callable[[], int], debug: bool) -> int:
    """Do the work of a command; whatever goes wrong is one line and an exit code."""
    from core.errors import Interrupted, ScionError, bad_input, interruptible, one_line  # start-up time

    begin = f"lightning {one_line(command)}"
    try:
        with interruptible(), _brief_warnings():
            return work()
    except BrokenPipeError:  # whoever reads our output, a `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (KeyboardInterrupt, Exception) as error:
        stop = Interrupted.behind(error)
        if stop is not None:
            print(f"{begin}: {one_line(stop)}", file=sys.stderr)
            return stop.code
        if debug:
            import traceback

            traceback.print_exc()
            return 2
        known = error if isinstance(error, ScionError) else bad_input(error)
        text = known or f"unexpected {type(error).__name__}: {error} (--debug shows where; please report it)"
        print(f"{begin}: {one_line(text)}", file=sys.stderr)
        return 2


def _call_domains(words: list[str], names: Sequence[str]) -> int:
    """Call a command that is none of the core's."""
    from core.cli.domain_commands import call  # start-up time

    return call(words, names)


def _domains_help(names: Sequence[str]) -> str:
    """The commands of domains; what is wrong with their tables goes to the other stream."""
    from core.cli.domain_commands import help_text, read_tables  # start-up time

    tables = read_tables(names)
    for problem in tables.problems:
        print(f"lightning: {problem}", file=sys.stderr)
    return help_text(tables)


def _fields_of(own: list[str], keys: list[str]) -> int:
    """Print what can be set in the configuration of ``lightning run CONFIG --help``."""
    from core.errors import ScionError, one_line  # start-up time

    try:
        _quick_imports()
        from core.config import points  # start-up time
        from core.config.page import fields_text  # start-up time

        config = parser().parse_args(own).config
        print(fields_text(points(config, keys)[0]))
    except ScionError as error:
        print(f"lightning run: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def _brief_warnings() -> Iterator[None]:
    """Show warnings as one line each, without the line of code that they come from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _dispatch(arguments: argparse.Namespace, rest: list[str]) -> int:
    if arguments.command == "run":
        from core.config import points  # start-up time

        found = points(arguments.config, rest)  # tells most mistakes before anything heavy is imported
        if arguments.print_config:
            from core.config.page import resolved  # seldom needed

            print(resolved(found), end="")
            return 0
        _quick_imports()
        from core.config import rehearse  # start-up time

        rehearse(_as_built(found, arguments))  # tells nearly all others before anything is written
        from core.training.many_runs import run  # start-up time

        return run(found, arguments.run_dir, arguments.overwrite)
    if arguments.command in ("merge", "predict", "test") or getattr(arguments, "action", None) == "take":
        _glance(arguments.run)
    _quick_imports()
    return _call(arguments, rest) or 0


def _as_built(points: list[Point], arguments: Any) -> list[Point]:
    """The runs as their folders let them be built: one that goes on has copies of the trained adapters that it was
    begun with."""
    from core.config.entries import adapters_in  # start-up time

    if arguments.overwrite or not any(adapters_in(point.config) for point in points):
        return points
    from core.training.kept_adapters import points_from_copies  # start-up time
    from core.training.many_runs import folders_of  # start-up time

    return points_from_copies(points, folders_of(points, arguments.run_dir))


def _call(arguments: Any, rest: list[str]) -> int | None:
    """Call the function of a command; each is imported only when it is asked for."""
    command = arguments.command
    if command == "describe":
        from core.cli.describe import describe  # start-up time

        return describe(arguments.config, rest, arguments.json, arguments.trust)
    if command == "methods":
        from core.cli.methods import methods  # start-up time

        return methods(arguments.name, arguments.json, family=arguments.family, kind=arguments.kind,
                       mergeable=arguments.mergeable, planned=arguments.planned)
    if command == "roles":
        from core.cli.roles import roles  # start-up time

        return roles(arguments.model)
    if command == "merge":
        from core.cli.merge import merge  # start-up time

        return merge(arguments.run, arguments.out)
    if command == "export":
        from core.cli.export import export  # start-up time

        return export(arguments.adapter, arguments.out, arguments.model)
    if command == "import":
        from core.cli.export import import_  # start-up time

        return import_(arguments.folder, arguments.out, arguments.model)
    if command == "patch":
        return _call_patch(arguments)
    if command == "test":
        from core.cli.test import test  # start-up time

        return test(arguments.run, rest, arguments.swap, arguments.trust)
    if rest:
        from core.cli.generation import generate_texts  # start-up time

        return generate_texts(arguments.run, arguments.files, rest, arguments.json, arguments.features, arguments.out)
    from core.cli.predict import predict  # start-up time

    return predict(arguments.run, arguments.files, arguments.json, arguments.trust, arguments.features, arguments.out)


def _call_patch(arguments: Any) -> int | None:
    from core.cli import patch  # start-up time

    if arguments.action == "take":
        return patch.take(arguments.run, arguments.out, arguments.rank)
    if arguments.action == "apply":
        return patch.apply(arguments.patch, arguments.base, arguments.out, arguments.scale)
    return patch.add(arguments.one, arguments.other, arguments.out, tuple(arguments.scale), arguments.head)


def _glance(run: str) -> None:
    """Refuse what can be seen from a run folder's records alone, before anything heavy is imported."""
    from pathlib import Path

    from core.errors import ScionError, one_line  # start-up time
    from core.files import read_json  # start-up time

    try:
        adapter = one_line(read_json(Path(run) / "adapter" / "adapter.json")["base"]["fingerprint"])
        trained_on = one_line(read_json(Path(run) / "metrics.json")["backbone"]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # told in detail by those who need them
    if adapter != trained_on:
        raise ScionError(f"{run}/adapter: the adapter belongs to another base (fingerprint {adapter}) than the run "
                         f"({trained_on}); put the run's own adapter back")


def _quick_imports() -> None:
    from core.cli.fast_imports import quick_lightning  # start-up time

    with quick_lightning():
        import lightning.pytorch  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
