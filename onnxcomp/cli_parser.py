"""The commands and options of `onnxcomp`, and what is said about a misspelt one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from onnxcomp import __version__
from onnxcomp.errors import UsageError

__all__ = ["parse"]

_DATA = (
    "samples: .npz, .npy, a folder of those, of test_data_set_N or of pictures, or package.module:function"
)
_EXIT_CODES = """\
exit codes: 0 done and verified, 1 internal error, 2 usage, 3 model or data
rejected, 4 verification failed, 5 target or budget not met, 6 provider not
available, 7 inconclusive, 8 out of memory, time or disk, 130 interrupted"""


class _Parser(argparse.ArgumentParser):
    """argparse, but errors are UsageErrors in one sentence, and options are never abbreviated."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` shows how it is used")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options in `argv`. Raises UsageError; exits with 0 after --help and --version."""
    parser, commands = _build()
    if argv:
        _check_spelling(argv, commands)
    args = parser.parse_args(argv)
    args.words = tuple(argv)
    if args.command is None:
        raise UsageError(f"give a command: {', '.join(commands)}; `onnxcomp --help` explains them")
    return args


def _check_spelling(argv: Sequence[str], commands: dict[str, argparse.ArgumentParser]) -> None:
    """Name the closest known command or option where one is unknown; argparse would only list all."""
    word, *rest = argv
    if word.startswith("-"):
        return
    from onnxcomp.registry import suggest  # it knows installed packages, which takes as long as all the rest

    if word not in commands:
        raise UsageError(
            f"unknown command {word!r}{suggest(word, commands)}; there are: {', '.join(commands)}"
        )
    known = commands[word]._option_string_actions
    for text in rest:
        if text == "--":
            return
        option = text.partition("=")[0]
        if option.startswith("--") and option not in known:
            raise UsageError(
                f"`onnxcomp {word}` has no option {option!r}{suggest(option, known)}; "
                f"`onnxcomp {word} --help` lists them"
            )


def _build() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(
        prog="onnxcomp",
        description="Makes ONNX models smaller and faster, and proves that they still do the same job.",
        epilog=f"to begin: onnxcomp optimize model.onnx --calib samples.npz -o small.onnx\n\n{_EXIT_CODES}",
    )
    parser.add_argument("--version", action="version", version=f"onnxcomp {__version__}")
    group = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    commands: dict[str, argparse.ArgumentParser] = {}
    for name, text, add in (
        ("optimize", "run passes on a model, verify and time the result, write it", _add_optimize),
        ("verify", "compare two models on data", _add_verify),
        ("bench", "latency, memory and load time; several models are interleaved", _add_bench),
        ("bisect", "find the first rewrite of a pipeline that breaks the tolerance", _add_bisect),
        ("inspect", "what is in a model: parameters, MACs, bytes, operators, dimensions", _add_inspect),
        ("report", "make the HTML report from the JSON of `optimize --json`", _add_report),
        ("passes", "list the passes, or explain one: options, formulas, guarantees", _add_passes),
        ("doctor", "what works on this machine: versions, providers, int8 instructions", _add_doctor),
    ):
        commands[name] = group.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add(commands[name])
        _add_common(commands[name])
    return parser, commands


def _add_optimize(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="the ONNX file; it is never modified")
    add("-o", "--output", metavar="OUT", help="file to write (default: MODEL.opt.onnx beside the model)")
    add("--calib", metavar="DATA", help=f"unlabelled {_DATA}; unlocks int8")
    add(
        "--eval",
        metavar="DATA",
        help="data to verify on, with labels if there are any (default: a fifth of --calib)",
    )
    add("--preprocess", metavar="SPEC", help="how pictures become arrays: imagenet, or a TOML file")
    add("--target", metavar="NAME", help="cpu, cuda or tensorrt (default: cpu)")
    add("--max-drop", metavar="SHARE", help="quality that may be lost against the original (default: 1%%)")
    add(
        "--metric",
        metavar="FUNCTION",
        help="package.module:function(outputs, labels) -> float, higher is better",
    )
    add("--goal", metavar="NAME", help="latency, size or balanced (default: balanced)")
    add("--size", metavar="FACTOR", help="file size to reach, such as 4x; exit code 5 if it is not")
    add("--speed", metavar="FACTOR", help="speed-up to reach, such as 2x; exit code 5 if it is not")
    add("--passes", metavar="SPEC", help='passes to run, such as "cleanup,fuse,quantize:ranges=mse"')
    add("--recipe", metavar="FILE", help="TOML file with these options as keys; what is given here wins")
    add("--report", metavar="FILE", type=_page, help="write a page for people as well: one HTML file, complete offline")
    add("--samples", metavar="N", type=int, help="calibration samples to use at most (default: 512)")
    add("--seed", metavar="N", type=int, help="seed of everything random (default: 0)")
    add("--threads", metavar="N", type=int, help="threads of ONNX Runtime, 0 for all cores (default: 1)")
    add("--workers", metavar="N", type=int, help="processes for calibration; this version always uses one")
    add("--memory", metavar="SIZE", help="memory for calibration statistics, such as 2GB (default: 1GiB)")
    add("--bench-seconds", metavar="S", type=float, help="time for the benchmark, 0 for none (default: 4)")
    add("--dry-run", **_flag(), help="show what passes such as prune-channels would remove, and write no model")
    add("--external-data", **_flag(), help="weights into a separate file (always done above 1.5 GB)")
    _add_symlinks(parser)
    add(
        "--no-verify",
        dest="verify",
        action="store_const",
        const=False,
        help="skip the comparison with the original",
    )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("original", metavar="ORIGINAL")
    add("candidate", metavar="CANDIDATE")
    _add_data(parser)
    add("--max-drop", metavar="SHARE", default="1%", help="quality that may be lost (default: 1%%)")
    add(
        "--metric",
        metavar="FUNCTION",
        help="package.module:function(outputs, labels) -> float, higher is better",
    )
    add("--samples", metavar="N", type=int, help="samples to compare at most (default: all)")
    add("--layers", **_flag(), help="compare layer by layer as well: where an error comes from, worst first")
    _add_runtime(parser)
    _add_symlinks(parser)
    parser.epilog = "exit codes: 0 passed, 4 failed, 7 inconclusive (too few samples, or a random model)"


def _add_bisect(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="the ONNX file; it is never modified")
    add("-o", "--output", metavar="DIR", help="folder for a minimal reproducer of what is found (default: none)")
    add("--passes", metavar="SPEC", help="passes to run (default: those of `onnxcomp optimize`)")
    add("--calib", metavar="DATA", help=f"unlabelled {_DATA}")
    add("--eval", metavar="DATA", help="data to compare on (default: a fifth of --calib, or made up from the graph)")
    add("--preprocess", metavar="SPEC", help="how pictures become arrays: imagenet, or a TOML file")
    add("--max-drop", metavar="SHARE", help="quality that a lossy pass may cost (default: 1%%)")
    add("--metric", metavar="FUNCTION", help="package.module:function(outputs, labels) -> float, higher is better")
    add(
        "--tolerance",
        metavar="ERROR",
        type=float,
        help="largest error that any pass may make, relative to the element or the rms of its output "
        "(default: the original's own noise for lossless passes, --max-drop for lossy ones)",
    )
    add("--samples", metavar="N", type=int, default=128, help="samples to compare at most (default: 128)")
    add("--seconds", metavar="S", type=float, default=300.0, help="time for the search (default: 300)")
    add("--seed", metavar="N", type=int, help="seed of everything random (default: 0)")
    add("--threads", metavar="N", type=int, help="threads of ONNX Runtime, 0 for all cores (default: 1)")
    _add_symlinks(parser)
    parser.epilog = "exit codes: 0 no rewrite is guilty, 4 one is"


def _add_bench(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+", help="the first is the baseline of the others")
    _add_data(parser)
    add(
        "--shape",
        metavar="NAME=SIZES",
        action="append",
        help="shape of an input that is made up, such as input=1x3x224x224; once for each input",
    )
    add("--batch", metavar="N[,N]", help="samples per run, where the model leaves it open (default: 1)")
    add("--provider", metavar="NAME[,NAME]", default="cpu", help="cpu, cuda, tensorrt, openvino, ... (default: cpu)")
    add("--threads", metavar="N[,N]", default="1", help="threads of one run, 0 for all cores (default: 1)")
    add("--streams", metavar="N[,N]", default="1", help="concurrent runs; with several, throughput is compared")
    add(
        "--seconds",
        metavar="S",
        type=float,
        default=10.0,
        help="time for timing in each combination of these (default: 10)",
    )
    add("--precision", metavar="SHARE", default="1%", help="speed-up known to this ends it early (default: 1%%)")
    add("--allow-fallback", **_flag(), help="measure also where the provider leaves weighted operators to another")
    _add_seed(parser)
    _add_symlinks(parser)
    parser.epilog = "exit code 6: the provider is not installed, did not load, or did not run the model"


def _add_symlinks(parser: argparse.ArgumentParser) -> None:
    text = "follow symbolic links to external data, as in hub caches"
    parser.add_argument("--allow-symlinks", **_flag(), help=text)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--nodes", **_flag(), help="one line for each node as well")


def _add_report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="JSON", help="what `onnxcomp optimize --json` wrote")
    add("-o", "--output", metavar="FILE", type=_page, help="file to write (default: .html in place of .json)")


def _add_passes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="the pass to explain")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    del parser  # it has the common options only


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="DATA", help=f"{_DATA} (default: made up from the graph)")
    parser.add_argument(
        "--preprocess", metavar="SPEC", help="how pictures become arrays: imagenet, or a TOML file"
    )


def _add_runtime(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--provider", metavar="NAME", default="cpu", help="cpu, cuda, tensorrt, or a full name (default: cpu)"
    )
    add(
        "--threads",
        metavar="N",
        type=int,
        default=1,
        help="threads of ONNX Runtime, 0 for all cores (default: 1)",
    )
    _add_seed(parser)


def _add_seed(parser: argparse.ArgumentParser) -> None:
    text = "seed of everything random (default: 0)"
    parser.add_argument("--seed", metavar="N", type=int, default=0, help=text)


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--json",
        metavar="FILE",
        nargs="?",
        const="-",
        type=_json_file,
        help="write the result as JSON; - (or nothing, at the end) for standard output",
    )
    add("--force", **_flag(), help="overwrite files that exist")
    add("-v", "--verbose", action="store_true", help="every reason in full, and tracebacks")
    add("-q", "--quiet", action="store_true", help="no progress")


def _flag() -> dict[str, Any]:
    """True where the flag is given, else None: "not given", so that a recipe may say otherwise."""
    return {"action": "store_const", "const": True}


def _json_file(text: str) -> str:
    if text.endswith(".onnx"):
        raise argparse.ArgumentTypeError(
            f"{text} looks like a model; name a file to write, or put --json at the end"
        )
    return text


def _page(text: str) -> str:
    if text.endswith(".onnx"):
        raise argparse.ArgumentTypeError(f"{text} looks like a model; name the HTML file to write")
    return text
