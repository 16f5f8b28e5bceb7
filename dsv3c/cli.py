"""The command `dsv3c`: its flags and how its errors are told; `dsv3c.commands` does the work.

Nothing but the standard library is imported until a command runs, so `dsv3c --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from dsv3c import __version__
from dsv3c.errors import Dsv3cError, InputError, did_you_mean

JOBS = ("train", "prefill", "decode", "forward")
PRECISIONS = ("fp8", "bf16", "fp32", "fp64")
SCHEDULES = ("auto", "dualpipe", "dualpipev", "zb1p", "1f1b")
KERNELS = ("none", "source", "binary")
IMPLEMENTATIONS = ("auto", "generated", "library")

INTERRUPTED = 130
BROKEN_PIPE = 141
OUT_OF_MEMORY = "out of memory; choose a smaller model, batch or sequence"

MODEL_HELP = "a preset (dsv3c list models), a config.json or a directory with one; MODEL:field=value,... overrides"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status: 0, 1 for failed work, 2 for bad input, 130 for Ctrl-C."""
    _open_streams()
    try:
        arguments = build_parser().parse_args(argv)
        from dsv3c import commands
        from dsv3c.plugins import load_plugin

        for path in arguments.plugin:
            load_plugin(path)
        status: int = getattr(commands, arguments.command.replace("-", "_"))(arguments)
        sys.stdout.flush()
        return status
    except Dsv3cError as error:
        return _fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader has gone; without this the interpreter would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{(error.strerror or str(error)).lower()}", Dsv3cError.exit_status)
    except MemoryError:
        return _fail(OUT_OF_MEMORY, Dsv3cError.exit_status)
    except RuntimeError as error:  # torch has no type of its own for this on the CPU
        if not re.search("can't allocate memory|out of memory", str(error)):
            raise
        return _fail(OUT_OF_MEMORY, Dsv3cError.exit_status)


def _open_streams() -> None:
    """Where the caller closed standard output or error, what is printed there is dropped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - it is used until the end


def _fail(message: str, status: int) -> int:
    """Print an error; of ranks that have the same one, the first does."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from dsv3c.runtime.watch import first_to_say

        if not first_to_say(message):
            return status
    print(f"dsv3c: {message}", file=sys.stderr, flush=True)
    return status


class _Parser(argparse.ArgumentParser):
    """Reports a wrong flag in one sentence, as every other error."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)  # type: ignore[arg-type, misc]

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see '{self.prog} --help'")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            given = " ".join(filter(None, ("/".join(action.option_strings), str(value))))
            raise InputError(f"{given}: no such choice; {did_you_mean(str(value), map(str, action.choices))}")


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _real(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return value


def _tokens(text: str) -> list[int]:
    parts = text.split(",")
    if not all(p.strip().isdecimal() for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token numbers such as 1,2,3")
    return [int(p) for p in parts]


def build_parser() -> argparse.ArgumentParser:
    """The flags of every command."""
    parser = _Parser("dsv3c", description="Compile, train and run DeepSeek-V3-class models.")
    parser.add_argument("--version", action="version", version=f"dsv3c {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        added.add_argument("--json", action="store_true", help="print the result as JSON")
        added.add_argument("--plugin", action="append", default=[], metavar="FILE.py",
                           help="first run this file, which registers ops, passes, targets or models")  # fmt: skip
        return added

    _compile(command("compile", "turn a model into a plan"))
    _opt(command("opt", "run passes on the text of a program"))
    inspect = command("inspect", "show what a plan holds")
    inspect.add_argument("plan", metavar="FILE.plan", help="the plan")
    inspect.add_argument("--notes", action="store_true", help="show every note of every pass")
    inspect.add_argument("--ir", action="store_true", help="show the program's text instead")
    diff = command("diff", "show what differs between two plans")
    diff.add_argument("first", metavar="A.plan", help="the first plan")
    diff.add_argument("second", metavar="B.plan", help="the second plan")
    listing = command("list", "list the ops, passes, targets, models or schedules there are")
    listing.add_argument("what", choices=("ops", "passes", "targets", "models", "schedules"), help="what to list")
    _schedule(command("schedule", "make, check and draw a pipeline schedule"))
    _simulate(command("simulate", "say how long a plan takes on its machine, and where the time goes"))
    report = command("report", "write one page about a plan: time, memory, schedule, overlap, notes")
    report.add_argument("plan", metavar="FILE.plan", help="the plan")
    report.add_argument("-o", "--out", required=True, metavar="FILE.html", help="where to write the page")
    _machine_flags(report)
    _train(command("train", "train a plan on text"))
    _generate(command("generate", "continue a prompt"))
    _verify(command("verify", "compare a checkpoint's logits, gradients and expert choices with transformers"))
    _tune(command("tune", "measure implementations of matrix products on this machine's GPU, for compile"))
    export = command("export", "write a trained model for other programs")
    export.add_argument("directory", metavar="DIR", help="what 'dsv3c train --out' wrote, or a checkpoint")
    export.add_argument("--format", required=True, choices=("hf",), help="hf: a Hugging Face checkpoint")
    export.add_argument("-o", "--out", required=True, metavar="OUT", help="the directory to write")
    return parser


def _pipeline_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--print-after", metavar="NAME|all", help="print the program after this pass, or after every one")
    p.add_argument("--dump", metavar="DIR", help="write the program before and after every pass to DIR/NN-NAME.ir")
    p.add_argument(
        "--stop-after", metavar="NAME", help="leave out the passes behind this one; compile then writes no plan"
    )


def _compile(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    p.add_argument("--job", choices=JOBS, help="what the plan is for (default train)")
    p.add_argument("--target", metavar="NAME", help="the machine, see 'dsv3c list targets' (default cpu)")
    p.add_argument(
        "--mesh",
        metavar="AXES",
        help="ranks by axis, for example pp=16,dp=128,ep=64 (default one)",
    )
    p.add_argument(
        "--ranks-per-node",
        type=_count,
        metavar="N",
        help="ranks that share the fast link (default 8)",
    )
    p.add_argument(
        "--seq", type=_count, metavar="N", help="tokens in a sequence (default what the model takes, at most 4096)"
    )
    p.add_argument("--micro-batch", type=_count, metavar="N", help="sequences at a time (default 1)")
    p.add_argument("--global-batch", type=_count, metavar="N", help="sequences in a step (default micro-batch x dp)")
    p.add_argument("--precision", choices=PRECISIONS, help="of the arithmetic (default fp32 on cpu, fp8 on Hopper)")
    p.add_argument("--schedule", choices=SCHEDULES, help="of the pipeline ranks (default auto)")
    p.add_argument("--expert-headroom", type=_real, metavar="X",
                   help="expert buffers as a multiple of balanced load (default 1.5)")  # fmt: skip
    p.add_argument("--kernels", choices=KERNELS, help="how far kernels are made (default binary)")
    p.add_argument(
        "--implementations",
        choices=IMPLEMENTATIONS,
        help="what executes matrix products: the fastest as measured, our kernels, or libraries (default auto)",
    )
    p.add_argument("--document-end", type=_seed, metavar="TOKEN",
                   help="the token between packed documents, if attention must not cross it")  # fmt: skip
    p.add_argument("-p", "--passes", metavar="PIPELINE", help="passes to run instead of the job's own: 'a,b{k=1}'")
    _pipeline_flags(p)
    p.add_argument("--keep-ir", action="store_true", help="keep the program after every pass in the plan")
    p.add_argument("--allow-oversize", action="store_true", help="plan also what does not fit, and mark the plan")
    p.add_argument("-o", "--out", metavar="FILE.plan", help="where to write the plan (default MODEL.plan)")


def _opt(p: argparse.ArgumentParser) -> None:
    p.add_argument("file", metavar="FILE.ir", help="a program's text, for example a dump; - is standard input")
    p.add_argument("-p", "--passes", required=True, metavar="PIPELINE", help="the passes: 'a,b{k=1}'")
    p.add_argument("--target", metavar="NAME", help="the machine that cost-driven passes assume")
    p.add_argument("--precision", choices=PRECISIONS, help="of the job on that target")
    p.add_argument("--sizes", metavar="B=2,S=8", help="values of dimension symbols")
    _pipeline_flags(p)
    p.add_argument("-o", "--out", metavar="FILE.ir", help="write the result there instead of printing it")


def _schedule(p: argparse.ArgumentParser) -> None:
    p.add_argument("kind", metavar="KIND", help="one of 'dsv3c list schedules', or auto for the fastest")
    p.add_argument("--pp", type=_count, metavar="P", help="pipeline ranks")
    p.add_argument("--micro-batches", type=_count, metavar="M", help="micro-batches in a step")
    p.add_argument("--read", metavar="FILE", help="instead check and draw the schedule in this CSV file")
    p.add_argument("--times", metavar="F=1,...",
                   help="durations in any unit, of one action, or with auto of a rank's share (default "
                        "F=1,I=1,W=1, B=I+W, FB=F+B for an overlapped pair)")  # fmt: skip
    p.add_argument("--transfer", type=_real, default=0.0, metavar="X", help="time from rank to rank (default 0)")
    p.add_argument("--csv", metavar="FILE", help="write it there: a row per rank, cells such as 0F7 or (0F7;7B3)")
    p.add_argument("--svg", metavar="FILE", help="draw it there")


def _simulate(p: argparse.ArgumentParser) -> None:
    p.add_argument("plan", metavar="FILE.plan", help="the plan")
    p.add_argument("--trace", metavar="FILE.json", help="write there what every stream does when, as a Chrome trace")
    _machine_flags(p)


def _machine_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                   help="another figure of the machine: slow_link=80e9, matrix_flops.e4m3=4e15")  # fmt: skip


def _train(p: argparse.ArgumentParser) -> None:
    p.add_argument("plan", metavar="FILE.plan", help="a plan for the job train")
    p.add_argument("--data", required=True, nargs="+", metavar="PATH", help="text files, or folders of them")
    p.add_argument("--steps", required=True, type=_count, metavar="N", help="optimizer steps in all")
    p.add_argument("--out", required=True, metavar="DIR", help="where metrics and checkpoints go")
    p.add_argument("--init", metavar="HF_DIR", help="start from this checkpoint instead of random weights")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out, if there is one")
    p.add_argument("--seed", type=_seed, default=0, metavar="N", help="of initial weights and data order (default 0)")
    p.add_argument(
        "--save-every",
        type=_count,
        metavar="N",
        help="steps between checkpoints (default a tenth of all, at most 1000)",
    )
    p.add_argument("--lr", type=_real, metavar="X", help="peak learning rate (default the plan's)")
    p.add_argument("--tokenizer", metavar="FILE|bytes",
                   help="a tokenizer.json, or raw bytes (default byte-level BPE trained on the data)")  # fmt: skip
    p.add_argument("--trace", metavar="FILE.json",
                   help="of many ranks, write what each did in the last steps to FILE.rankN.json, as a Chrome "
                        "trace")  # fmt: skip


def _generate(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="FILE.plan|HF_DIR", help="a plan, or a checkpoint")
    p.add_argument("--weights", metavar="DIR", help="the checkpoint to load, for a plan")
    prompt = p.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--tokens", type=_tokens, metavar="1,2,3", help="the tokens to continue")
    p.add_argument("--max-new-tokens", type=_count, default=64, metavar="N", help="how many at most (default 64)")
    p.add_argument("--temperature", type=_real, default=0.0, metavar="X", help="0 takes the likeliest (default 0)")
    p.add_argument("--top-p", type=_real, default=1.0, metavar="X", help="sample from so much probability (default 1)")
    p.add_argument("--stop", metavar="TEXT", help="end before this text")
    p.add_argument("--seed", type=_seed, default=0, metavar="N",
                   help="of sampling, and of the weights of a plan without --weights (default 0)")  # fmt: skip
    p.add_argument("--tokenizer", metavar="FILE|bytes", help="instead of the one beside the weights")


def _tune(p: argparse.ArgumentParser) -> None:
    p.add_argument("sources", nargs="*", metavar="FILE.plan|MODEL",
                   help="whose products are measured (default those of the table that comes with dsv3c)")  # fmt: skip
    p.add_argument("--target", metavar="NAME", help="h100, h200 or h800 (default what this GPU is)")
    p.add_argument("--precision", choices=("fp8", "bf16"), help="of a MODEL (default fp8)")
    p.add_argument("--seq", type=_count, metavar="N", help="tokens in a sequence of a MODEL (default at most 4096)")
    p.add_argument("--micro-batch", type=_count, default=1, metavar="N", help="sequences at a time (default 1)")
    p.add_argument("--rounds", type=_count, default=20, metavar="N", help="timed runs of each (default 20)")


def _verify(p: argparse.ArgumentParser) -> None:
    p.add_argument("directory", metavar="HF_DIR", help="a Hugging Face checkpoint")
    p.add_argument("--precision", choices=("fp32", "fp64"), default="fp32", help="of both sides (default fp32)")
    p.add_argument("--sequences", type=_count, default=2, metavar="N", help="random sequences (default 2)")
    p.add_argument("--length", type=_count, default=16, metavar="N", help="tokens in each (default 16)")
    p.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the random tokens (default 0)")
