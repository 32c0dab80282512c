"""Writes one page about many runs.

``python -m facecls.results RUN_DIR ... [--baseline RUN_DIR --changes RUN_DIR ...] [--out RESULTS.md]``
"""

from collections.abc import Sequence
from pathlib import Path

from facecls.console import console
from facecls.errors import CommandParser, UserError, command, program

_DESCRIPTION = (
    "Writes the scores of runs, their worst groups and how they were made into one page of Markdown. Runs that differ "
    "in the seed alone are one recipe, with mean and spread. What is written by hand below the mark of the page "
    "stays when it is written again."
)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs the command.

    Args:
        arguments: Command line; ``None`` for that of the process.

    Returns:
        Path of the page.

    Raises:
        UserError: For a mistake in the options or in a run's folder.
    """
    parser = CommandParser(prog=program("facecls.results"), description=_DESCRIPTION)
    folders = "such as runs/base/version_0, or runs/base for all in it"
    parser.add_argument("runs", type=Path, metavar="RUN_DIR", nargs="*", help=folders)
    parser.add_argument("--baseline", type=Path, metavar="RUN_DIR", help="runs of one recipe that others change")
    parser.add_argument(
        "--changes",
        type=Path,
        metavar="RUN_DIR",
        nargs="+",
        default=[],
        help="runs that change it, tested or not; each is called by the options that differ",
    )
    parser.add_argument("--out", type=Path, default=Path("RESULTS.md"), help="the page (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not options.runs and options.baseline is None:
        raise UserError("Expected runs to report, but got none; name their folders, such as runs/base.")
    if (options.baseline is None) != (not options.changes):
        raise UserError("Expected --baseline and --changes together, but got one of them; name the other as well.")
    if options.out.suffix.lower() != ".md":
        raise UserError(f"Expected --out to end in .md, since the page is Markdown, but got {options.out}; name it so.")

    from facecls.results.contenders import changes, group, read_trials  # pandas, for which --help must not wait
    from facecls.results.page import markdown, write_page

    baseline, changed = None, []
    if options.baseline is not None:
        several = group(read_trials([options.baseline]))
        if len(several) > 1:
            names = ", ".join(each.name for each in several)
            raise UserError(f"Expected --baseline to have runs of one recipe, but got {names}; name one of them.")
        [baseline] = several
        changed = changes(read_trials(options.changes), baseline.trials[0])
    page = write_page(options.out, markdown(group(read_trials(options.runs)), baseline, changed))
    console().print(f"wrote {page}")
    return page


if __name__ == "__main__":
    with command("facecls.results"):
        main()
