"""The command line: `fastperturb COMMAND [--config FILE.yaml] [options]`.

A command is a module with a frozen dataclass of options and `run(options) -> int`. It is imported
only when it is called, so that `fastperturb --version` does not wait for torch.
"""

import argparse
import importlib
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastperturb.runs import messages, option_files
from fastperturb.version import __version__

# name: (module:OptionsClass, the line that --help shows)
COMMANDS = {
    "demo": (
        "fastperturb.demo:DemoOptions",
        "compare learned and fixed noise on a toy language",
    ),
    "train": (
        "fastperturb.train:TrainOptions",
        "train a language model on text, with a learned perturbation or a baseline",
    ),
    "eval": (
        "fastperturb.eval:EvalOptions",
        "measure the perplexity of texts under trained models, with confidence intervals",
    ),
    "study": (
        "fastperturb.study:StudyOptions",
        "train every method on one text and compare them on several others",
    ),
    "rank": (
        "fastperturb.rank:RankOptions",
        "measure the rank of a model's logit matrix, and generate by combining prompts",
    ),
    "doctor": (
        "fastperturb.cli.doctor:DoctorOptions",
        "report which kernels run on this machine, and check their results",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status, after one line on an error of ours."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--version"]:
        print(f"fastperturb {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    quiet = "--quiet" in argv
    messages.show(quiet=quiet)
    try:
        return call(argv[0], [flag for flag in argv[1:] if flag != "--quiet"])
    except (ValueError, OSError, ImportError, MemoryError, FloatingPointError) as error:
        if not _is_ours(error):
            raise
        print(f"fastperturb: error: {error}", file=sys.stderr)
        return 2


def usage() -> str:
    width = max(map(len, COMMANDS))
    commands = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastperturb COMMAND [--help] [--config FILE.yaml] [options]",
            "       fastperturb --version",
            "",
            *commands,
        ]
    )


def call(command: str, argv: list[str]) -> int:
    if command not in COMMANDS:
        raise ValueError(
            f"unknown command {command!r}{option_files.did_you_mean(command, COMMANDS)}"
        )
    module_name, _, class_name = COMMANDS[command][0].partition(":")
    module = importlib.import_module(module_name)
    options_class = getattr(module, class_name)
    return int(module.run(parse(options_class, argv, prog=f"fastperturb {command}")))


def parse(options_class: type, argv: list[str], *, prog: str) -> Any:
    """Return options of flags, else of the --config file, else the class's defaults."""
    import tyro

    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE.yaml")
    known, flags = parser.parse_known_args(argv)
    # In the description because tyro never sees the flag.
    about = "--config FILE.yaml sets options by name from a file; flags given here win."
    default = None
    if known.config is not None:
        with warnings.catch_warnings():  # those of the final options are enough
            warnings.simplefilter("ignore")
            default = option_files.load(known.config, options_class)
    return tyro.cli(
        options_class,
        prog=prog,
        description=f"{options_class.__doc__} {about}",
        args=_respelled(flags),
        default=default,
    )


def _respelled(flags: list[str]) -> list[str]:
    """Spell the old --perturb.antithetic, which takes no value, as --perturb.sampling.

    A sampling that is given wins over the old spelling in a file of options.
    """
    respelled = []
    for flag, value in zip(flags, [*flags[1:], ""]):
        old = re.fullmatch(r"(--(?:.+\.)?perturb\.)(no-)?antithetic", flag)
        new = re.fullmatch(r"(--(?:.+\.)?perturb\.)sampling(?:=.*)?", flag)
        if old is not None and value not in ("True", "False", "None"):
            sampling = "independent" if old[2] else "antithetic"
            respelled += [f"{old[1]}sampling", sampling, f"{old[1]}antithetic", "False"]
        elif new is not None:
            respelled += [f"{new[1]}antithetic", "False", flag]
        else:
            respelled.append(flag)
    return respelled


def _is_ours(error: BaseException) -> bool:
    """Return True if our own code raised the error; any other keeps its traceback."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "fastperturb"
