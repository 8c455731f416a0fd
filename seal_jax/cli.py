"""The command line, `seal-jax`: each command reads a config or a run folder, calls one function of the library, and prints its result."""

from __future__ import annotations

import argparse
import logging
import os
import pathlib
import sys
from collections.abc import Sequence

from seal_jax import __version__, config
from seal_jax.config import RunConfig
from seal_jax.errors import SealError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code. Faults of the user's input are one line on standard error and code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for noisy in ("absl", "orbax", "jax", "httpx", "openai"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        arguments = parser().parse_args(argv)
        return arguments.run(arguments) or 0
    except SealError as error:
        print(f"seal-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nseal-jax: interrupted; nothing finished is lost, the same command goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="seal-jax", description="Language models that write their own fine-tuning data and learn from it.", allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: object, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(run=function)
        return made

    def configured(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
        made.add_argument("config", metavar="RUN_OR_CONFIG", help="a YAML config, or the folder of a run to go on with")
        made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="config keys to set, say rest_em.rounds=1")
        return made

    configured(command("train", train, "run ReST-EM and print the result table; continues a run that was stopped"))
    configured(command("evaluate", evaluate, "print the result table of a model as it is, or of a trained run's policy"))
    made = configured(command("generate", generate, "write self-edits and print them as JSON lines, nothing trained"))
    made.add_argument("--split", default="validation", choices=("train", "validation"))
    made.add_argument("--limit", type=int, default=4, help="contexts (default 4)")
    made = command("grade", grade, "how far to trust a grader: its agreement with recorded verdicts")
    made.add_argument("cases", help="recorded verdicts (JSON, gzipped or not)")
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the config's grade section, say name=endpoint")
    made.add_argument("--split", choices=("dev", "held"), help="only this part (by title)")
    made.add_argument("--limit", type=int, help="about this many answers, spread over the file")
    made = command("export", export, "write a run's policy for other programs")
    made.add_argument("run_folder", metavar="RUN")
    made.add_argument("output", metavar="FOLDER")
    made.add_argument("--format", choices=("hf", "peft"), default="hf", help="hf: a merged model for transformers; peft: one adapter")
    made.add_argument("--round", type=int, help="the policy after this round (default: the last; peft: that round's adapter)")
    made = command("report", report, "write the report of a run, finished or not")
    made.add_argument("run_folder", metavar="RUN")
    return top


def _config(arguments: argparse.Namespace) -> RunConfig:
    path = pathlib.Path(arguments.config)
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise SealError(f"{path}: no run in this folder (config.yaml is missing)")
        return config.load(path / "config.yaml", [*arguments.overrides, f"run_dir={path}"])
    return config.load(path, arguments.overrides)


def _finish(run_dir: str, table: dict[str, object]) -> None:
    from seal_jax.runs.report import write_report
    from seal_jax.runs.table import format_table

    page = write_report(run_dir)
    print(f"\n{format_table(table)}\n\nrun folder: {run_dir}\nreport:     {page}")


def train(arguments: argparse.Namespace) -> None:
    settings = _config(arguments)
    _say(f"seal-jax train: {settings.name}, run folder {settings.run_dir}")
    from seal_jax.rest_em import loop

    _finish(settings.run_dir, loop.train(settings))


def evaluate(arguments: argparse.Namespace) -> None:
    settings = _config(arguments)
    _say(f"seal-jax evaluate: {settings.name}, run folder {settings.run_dir}")
    from seal_jax.rest_em import loop

    _finish(settings.run_dir, loop.evaluate_only(settings))


def generate(arguments: argparse.Namespace) -> None:
    import json

    settings = _config(arguments)
    from seal_jax.rest_em import loop

    for record in loop.generate(settings, arguments.split, arguments.limit):
        print(json.dumps(record, ensure_ascii=False))


def grade(arguments: argparse.Namespace) -> None:
    settings = config.build({"task": {"name": "knowledge"}}, [f"grade.{item}" for item in arguments.overrides], "grade")
    from seal_jax.grade import agreement
    from seal_jax.rest_em import loop

    print(agreement.run(arguments.cases, loop.grader(settings), arguments.split, arguments.limit))


def export(arguments: argparse.Namespace) -> None:
    from seal_jax.rest_em import export as exporting

    print(exporting.export(arguments.run_folder, arguments.output, arguments.format, arguments.round))


def report(arguments: argparse.Namespace) -> None:
    from seal_jax.runs.report import write_report

    print(write_report(arguments.run_folder))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
