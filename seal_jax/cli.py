"""The command line, `seal-jax`: each command reads a config or a run folder, calls one function of the library, and prints its result."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from seal_jax import __version__, config, logs, preemption
from seal_jax.config import RunConfig
from seal_jax.errors import SealError
from seal_jax.runs.files import reason
from seal_jax.runs.places import Place, place
from seal_jax.words import counted


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code. Faults of the user's input are one line on standard error and code 2."""
    logs.setup()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who called
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for as long as the process lives)
        getattr(sys, name).reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    with preemption.watched():
        code, text = _outcome(argv)
        preemption.leave(code, text)
    return code


def _outcome(argv: Sequence[str] | None) -> tuple[int, str | None]:
    """Runs a command. Its exit code, and a line about what went wrong."""
    try:
        arguments, left = parser().parse_known_args(argv)
        if left and (not hasattr(arguments, "overrides") or any(item.startswith("-") for item in left)):
            raise SealError(f"unrecognised arguments: {' '.join(left)}; see seal-jax --help")
        if left:  # overrides after an option
            arguments.overrides = [*arguments.overrides, *left]
        arguments.run(arguments)
        sys.stdout.flush()
        return 0, None
    except SealError as error:
        return 2, f"seal-jax: {error}"
    except KeyboardInterrupt:
        return 130, f"\nseal-jax: interrupted; {preemption.GOES_ON}"
    except preemption.Preempted as told:
        return _told(str(told))
    except BrokenPipeError:
        _close_output()
        return 1, None
    except OSError as error:
        if error.filename is None:
            _close_output()
        return 2, f"seal-jax: {error.filename or 'standard output'}: {reason(error)}"
    except Exception as error:
        from seal_jax.parallel import processes

        if "RESOURCE_EXHAUSTED" in str(error) and preemption.alone():
            lower = "lower answer.rows, sample.rows, fit.slots or m_step.microbatch, or set model.remat=full"
            return 2, f"seal-jax: the devices' memory is full ({str(error).splitlines()[0][:200]}); {lower}, and run the command again"
        if not processes.lost(error):
            if preemption.alone():
                raise
            traceback.print_exc()
            return 1, None
        notice = preemption.notice(wait=3.0)  # why the other process is gone, if it has said so
        return _told(f"another process of this run is gone ({' '.join(str(error).split())[:200]})" if notice is None else notice.text)


def _told(text: str) -> tuple[int, str]:
    """The end of a run that was told to end, or has to."""
    notice = preemption.notice()
    return 2 if notice is None else notice.code, f"seal-jax: {text}; {preemption.GOES_ON}"


def _close_output() -> None:
    """What is still to be written to a standard output that takes no more goes nowhere, instead of failing again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """Tells what is wrong with the arguments in one line, as everything else is told."""

    def error(self, message: str) -> NoReturn:
        raise SealError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="seal-jax", description="Language models that write their own fine-tuning data and learn from it.", allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: object, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(run=function)
        return made

    def configured(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
        made.add_argument("config", metavar="RUN_OR_CONFIG", help="a YAML config, or the folder of a run")
        made.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="config keys to set, say rest_em.rounds=1")
        return made

    configured(command("train", train, "run ReST-EM and print the result table; goes on with a run that was stopped"))
    text = "evaluate a config's base model, or a run's policy after its last finished round, and print the result table"
    configured(command("evaluate", evaluate, f"{text} (in a folder of its own, RUN-evaluate or run_dir=...)"))
    text = "learn passage after passage and print how earlier ones are forgotten, by method"
    configured(command("continual", continual, f"{text} (of a run: in a folder of its own, RUN-continual or run_dir=...)"))
    text = "train one model on the self-edits of many passages at once, and print what it then answers"
    configured(command("pretrain", pretrain, f"{text} (of a run: in a folder of its own, RUN-pretrain or run_dir=...)"))
    made = command("sweep", sweep, "the same run under many settings, and a table of them; goes on with a sweep that was stopped")
    made.add_argument("file", metavar="FILE", help="a sweep file (YAML)")
    made.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="keys of it to set, say trials=20")
    made = configured(
        command("generate", generate, "write self-edits (rest_em.edits per context) and print them as JSON lines, without training")
    )
    made.add_argument("--split", default="validation", choices=("train", "validation"), help="which contexts (default validation)")
    made.add_argument("--limit", type=_count, default=4, help="contexts (default 4)")
    made = command("grade", grade, "measure a grader's agreement with recorded verdicts")
    made.add_argument("cases", help="recorded verdicts (JSON, gzipped or not)")
    made.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the config's grade section, say name=endpoint")
    made.add_argument("--split", choices=("dev", "held"), help="only one half of the titles")
    made.add_argument("--limit", type=_count, help="this many answers, drawn at random, always the same ones")
    made = command("export", export, "write a run's policy for other programs")
    made.add_argument("run_folder", metavar="RUN", help="the folder of a run")
    made.add_argument("output", metavar="FOLDER", help="a folder that does not exist yet")
    made.add_argument("--format", choices=("hf", "peft"), default="hf", help="hf: a merged model; peft: its adapter")
    made.add_argument("--round", type=int, help="the policy after this round (default: the last finished one)")
    made = command("plan", plan, "compile a config for devices that need not be attached, and print memory, time and edits per hour")
    made.add_argument("config", help="a YAML config")
    made.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="config keys to set, say mesh.fsdp=4")
    made.add_argument("--topology", metavar="NAME", help="what to compile for: TPUs, say v5p:2x2x4 or v6e:2x2, or GPUs, say h200 or h100:8")
    made.add_argument("--devices", choices=("cpu",), help="cpu: for the CPUs that are here instead")
    made.add_argument("--spec", help="the model's shape, where model.name is out of reach: qwen2.5-7b, say, a config.json or a hub id")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    made = command("report", report, "write the report of a run, finished or not")
    made.add_argument("run_folder", metavar="RUN", help="the folder of a run")
    return top


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return int(text)


def _config(arguments: argparse.Namespace) -> tuple[RunConfig, Place | None, bool]:
    """The config, the run folder if one was given, and whether an override sets run_dir."""
    path, overrides = place(arguments.config), arguments.overrides
    chosen = any(item.startswith("run_dir=") for item in overrides)
    if not path.is_dir():
        if not str(path).endswith((".yaml", ".yml")) and not path.exists():
            raise SealError(f"{path}: no such run folder or config file")
        return config.load(path, overrides), None, chosen
    from seal_jax.runs.store import CONFIG, existing

    settings = config.load(existing(path).folder / CONFIG, overrides)
    return settings if chosen else dataclasses.replace(settings, run_dir=str(path)), path, chosen


def _finish(run_dir: str, table: dict[str, object]) -> None:
    from seal_jax.parallel import processes
    from seal_jax.runs.report import write_report
    from seal_jax.runs.table import format_table

    if not processes.first():
        return
    page = write_report(run_dir)
    print(f"\n{format_table(table)}\n\nrun folder: {run_dir}\nreport:     {page}")


def train(arguments: argparse.Namespace) -> None:
    settings, run, chosen = _config(arguments)
    if run is not None and chosen:
        raise SealError(f"run_dir={settings.run_dir}: the run in {run} goes on where it is; leave run_dir out, or give a config")
    _start("train", settings, f"run folder {settings.run_dir}")
    from seal_jax.fleet import run as fleet

    _finish(settings.run_dir, fleet.train(settings))


def evaluate(arguments: argparse.Namespace) -> None:
    settings, trained = _measured(arguments, "evaluate")
    from seal_jax.fleet import run as fleet

    _finish(settings.run_dir, fleet.evaluate(settings, trained))


def continual(arguments: argparse.Namespace) -> None:
    settings, trained = _measured(arguments, "continual")
    from seal_jax.experiments import continual as experiment

    _finish(settings.run_dir, experiment.run(settings, trained))


def pretrain(arguments: argparse.Namespace) -> None:
    settings, trained = _measured(arguments, "pretrain")
    from seal_jax.experiments import pretraining

    _finish(settings.run_dir, pretraining.run(settings, trained))


def _measured(arguments: argparse.Namespace, command: str) -> tuple[RunConfig, Place | str | None]:
    """The config of a command that measures, and the run whose policy it measures, if any: then in a folder of its own."""
    settings, run, chosen = _config(arguments)
    trained = None
    if run is not None:
        from seal_jax.runs.store import RunStore

        store = RunStore(run)
        if store.has("origin") and not chosen:  # such a measurement, to go on with
            trained = store.read("origin")["run"]
        elif store.has("rounds/1/m_step") or chosen:
            trained = run
            if not chosen:
                settings = dataclasses.replace(settings, run_dir=f"{run.resolve() if run.name in ('', '..') else run}-{command}")
    _start(command, settings, f"run folder {settings.run_dir}")
    return settings, trained


def sweep(arguments: argparse.Namespace) -> None:
    from seal_jax.sweep import config as sweep_config

    asked = sweep_config.load(arguments.file, arguments.overrides)
    text = f"{asked.config.search}, folder {asked.folder}"
    if asked.config.search == "lanes":
        _start("sweep", dataclasses.replace(asked.base, name=asked.config.name), text)
    else:  # trials join nobody: each is a process of its own
        _say(f"seal-jax sweep: {asked.config.name}, {text}")
    from seal_jax.sweep import run
    from seal_jax.sweep.table import format_table

    table = run.run(asked)
    if run.speaks(asked):
        print(f"\n{format_table(table)}\n\ntable: {asked.folder / run.TABLE}\nplot:  {asked.folder / run.PLOT}")
    if failed := run.failures(table):
        raise SealError(f"{failed} of {len(table['rows'])} trials failed, as the table says; the same command tries them again")


def generate(arguments: argparse.Namespace) -> None:
    settings, run, _ = _config(arguments)
    _start("generate", settings, f"{counted(arguments.limit, 'context')} of {arguments.split}")
    from seal_jax.parallel import processes
    from seal_jax.rest_em import loop

    for record in loop.generate(settings, arguments.split, arguments.limit, run):
        if processes.first():
            print(json.dumps(record, ensure_ascii=False), flush=True)


def grade(arguments: argparse.Namespace) -> None:
    overrides = [f"grade.{item.removeprefix('grade.')}" for item in arguments.overrides]  # in a config's words too
    settings = config.build({"task": {"name": "knowledge"}}, overrides, "seal-jax grade")
    _say(f"seal-jax grade: {settings.grade.name}, cases of {arguments.cases}")
    from seal_jax.grade import agreement
    from seal_jax.rest_em.stage import grader

    found = grader(settings)
    found.check()
    print(agreement.run(arguments.cases, found, arguments.split, arguments.limit))


def export(arguments: argparse.Namespace) -> None:
    from seal_jax.rest_em import export as exporting

    written, number = exporting.export(arguments.run_folder, arguments.output, arguments.format, arguments.round)
    form = {"hf": "merged model (hf)", "peft": "adapter (peft)"}[arguments.format]
    _say(f"seal-jax export: {form} of {arguments.run_folder} after round {number}")
    print(written)


def plan(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config, arguments.overrides)
    if (arguments.topology is None) == (arguments.devices is None):
        raise SealError("plan wants either --topology NAME, say v5p:2x2x4, or --devices cpu; see seal-jax plan --help")
    from seal_jax.models import shapes
    from seal_jax.parallel import plan_table, targets, topology

    model = arguments.spec or settings.model.name
    target = targets.here() if arguments.topology is None else targets.named(arguments.topology)
    made = plan_table.record(topology.make(settings, shapes.find(model), target, _say), settings, model)
    print(json.dumps(made) if arguments.json else plan_table.table(made))


def report(arguments: argparse.Namespace) -> None:
    from seal_jax.runs.report import write_report

    print(write_report(arguments.run_folder))


def _start(command: str, settings: RunConfig, what: str) -> None:
    """Says what the command does, as soon as it is known, and joins the other processes of the run, if it has any."""
    if os.environ.get("JAX_PROCESS_ID", "0") == "0":
        _say(f"seal-jax {command}: {settings.name}, {what}")
    if settings.executor.name == "ray":  # others do the work: this process takes no accelerator from them
        if command not in ("train", "evaluate"):
            raise SealError(f"executor.name=ray: train and evaluate run by workers, {command} does not; set executor.name=local")
        import jax

        jax.config.update("jax_platforms", "cpu")
        return
    from seal_jax.parallel import compiler, processes

    processes.start()
    compiler.keep()
    preemption.watch_peers()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
