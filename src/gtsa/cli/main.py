"""The command line: which verbs there are, and how a command ends. What a verb needs is imported when it is called."""

from __future__ import annotations

import inspect
import os
import re
import sys
from typing import Annotated, Literal

import cyclopts
from cyclopts import Parameter
from cyclopts.exceptions import CycloptsError, UnusedCliTokensError

import gtsa
from gtsa.cli.examples import EXAMPLES
from gtsa.core.errors import ProcessLost, UserError, is_first_process
from gtsa.core.migration import name_now
from gtsa.core.stops import handle_signals

app = cyclopts.App(
    name="gtsa",
    version=lambda: gtsa.__version__,
    help="Learn dense visual features from your own scenes. The weights are yours.",
    help_on_error=False,
)
VERBS = {
    "pretrain": """Train a vision transformer on a folder of images, without labels.

    Without --data it runs on the sample that comes with gtsa (the demo, at most four minutes on two CPU cores).
    """,
    "evaluate": """Evaluate a backbone on labelled images, on one task or several.

    WEIGHTS is a run, an export, timm:NAME, random:NAME, a timm or Hugging Face ViT folder, a .safetensors or .pth file.
    """,
    "explore": """Open a local page on the features: click a patch and see what is similar, in all images.

    WEIGHTS as for evaluate. The page is served to this machine alone, at the address that is printed. Features are
    computed while the page is in use, and kept in a cache (--cache) from which the same command continues.
    """,
    "compare": """Train methods with several seeds on the same images, evaluate all on the same tasks, and report.

    The same command resumes after any interruption: finished networks are kept.

    A YAML file (--config) can hold more: pretrain (settings of every run), evaluate (of every task), tasks (of
    single tasks), rows (further rows: {name: settings of gtsa pretrain}). See docs/compare.md.
    """,
    "check": "Decode every image once. Report the kinds of images, damaged files, and what pretraining would use.",
    "preview": "Draw the views of one image as the model sees them: boxes, rotations, colours, and the pooled targets.",
    "profile": """Measure where the time of a training step goes on this machine, what bounds it, and what to change.

    The settings are those of 'gtsa pretrain' that change a step. One process is measured; nothing is written.
    """,
    "report": """Write one self-contained HTML page about a run: verdict, pictures, curves, data, plan.

    The run may be finished, in progress, stopped or dead. 'gtsa pretrain' writes the page at the end of every run.
    """,
    "export": "Write the trained encoder in a format that other libraries open, with identical outputs.",
    "embed": """Write the vectors of images to a Parquet or .npy file, with the names and sizes of the images.

    WEIGHTS as for evaluate. The same command resumes after an interruption. See docs/embed.md.
    """,
    "shard": """Pack images into tar shards (WebDataset layout) for large data and object storage.

    The files are packed as they are. Damaged images are left out and listed. The same command resumes after an
    interruption. Other verbs read the shards with --data. See docs/large_data.md.
    """,
    "methods": "List the training methods.",
    "models": "List timm's plain vision transformers: all, or those whose name contains a word.",
}
for verb, words in VERBS.items():
    example = f"\n\nExample: {EXAMPLES[verb]}" if verb in EXAMPLES else ""
    app.command(f"gtsa.cli.commands:{verb}", name=verb, help=inspect.cleandoc(words) + example)


@app.command
def completion(
    shell: Literal["bash", "zsh", "fish"], /, *, install: Annotated[bool, Parameter(negative=())] = False
) -> None:
    """Print the script that completes gtsa's verbs and flags in a shell, or install it.

    Parameters
    ----------
    shell
        The shell to complete in.
    install
        Install the script where the shell finds it, with a line in its start-up file if it needs one.
    """
    if install:
        print(f"{app.install_completion(shell=shell)}: open a new {shell} to use it")
        if shell == "zsh":
            print("~/.zshrc has to end with: autoload -Uz compinit && compinit")
    else:
        print(app.generate_completion(shell=shell))


def main(arguments: list[str] | None = None) -> None:
    """Runs a command and exits with a code of core.errors.EXIT_CODES; users see no traceback."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """The exit code of a command line."""
    try:
        with handle_signals(trains=_verb(arguments) in ("pretrain ", "evaluate ")):
            command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
            command(*bound.args, **bound.kwargs)
        return 0
    except CycloptsError as error:
        verb = _verb(arguments)
        example = f"\nexample: {EXAMPLES[verb.strip()]}" if verb.strip() in EXAMPLES else ""
        print(f"gtsa: {_explain(error, verb)}; see gtsa {verb}--help{example}", file=sys.stderr)
        return 2
    except UserError as error:
        if is_first_process() or isinstance(error, ProcessLost):
            print(f"gtsa: {error}", file=sys.stderr)
        return error.code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away, e.g. head
        return 0
    except KeyboardInterrupt as stop:
        if is_first_process():
            print(f"gtsa: stopped at once; {_next_step(arguments)}", file=sys.stderr)
        code: int = getattr(stop, "code", 130)
        return 75 if code != 130 and _verb(arguments) == "pretrain " else code  # what schedulers start again


def _next_step(arguments: list[str] | None) -> str:
    """What to do after a stop."""
    given = sys.argv[1:] if arguments is None else arguments
    verb = given[0] if given else ""
    if verb == "evaluate" and any(word.split("=")[0] == "--work" for word in given):
        return "the same command resumes the trainings in --work"
    if verb == "evaluate":
        return "the unfinished task is lost; with --work FOLDER the same command resumes long trainings"
    if verb in ("compare", "embed", "shard"):
        return "the same command resumes"
    if verb == "explore":
        return "the same command continues with the features that were computed"
    if verb == "check":
        return "the same command resumes; images that were decoded are not decoded again"
    if verb == "pretrain":
        anew = ", in place of --overwrite" if "--overwrite" in given else ""
        resumes = f"the same command with --resume{anew} resumes from the last checkpoint"
        if any(word.split("=")[0] in ("--data", "--config") for word in given):
            return f"{resumes}, or starts if there is none"
        return f"{resumes}; if there is no run yet, give the same command again"
    return "give the same command again"


def _explain(error: CycloptsError, verb: str) -> str:
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        hint = "; give the images with --data" if verb in ("pretrain ", "compare ") else ""
        return f"unexpected argument {' '.join(error.unused_tokens)}{hint}"
    if option := re.match(r"Unknown option: \"?--(?:(\w+)\.)?([\w-]+)", text := _flat(error)):
        section, name = option[1] or "", option[2].replace("-", "_")
        if now := name_now(section, name):
            flag = f"--{section}.{now}" if section else f"--{now}"
            return f"{text.partition('. Did')[0]}. It is called {flag.replace('_', '-')} now"
    missing = re.search(r"parameter (--[\w.-]+) requires an argument", text)
    return f"{missing[1]} needs a value" if missing else text


def _flat(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text.endswith("...") else text.removesuffix(".")


def _verb(arguments: list[str] | None) -> str:
    given = sys.argv[1:] if arguments is None else arguments
    return f"{given[0]} " if given and not given[0].startswith("-") and given[0] in (*VERBS, "completion") else ""
