"""The command line that the plotting programs share: record files in, pictures out."""

import argparse
from pathlib import Path

from flashstudy.figures import records


def main(argv, doc, of, draw, make=list, options=None, nothing="nothing to draw"):
    """Read record files, draw, and print the paths; the exit code.

    doc: the program's docstring, its --help. of: where its records come from, for the help.
    draw(made, args): writes the pictures below args.out and returns the paths.
    make: what draw takes, from the rows; raises ValueError where they do not make it.
    options(parser): adds the program's own. nothing: what is said where no picture came out.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="+", type=Path, help=f"record files of {of}")
    parser.add_argument("--out", type=Path, default=Path("figures"), metavar="DIR")
    if options is not None:
        options(parser)
    args = parser.parse_args(argv)
    try:
        made = make(records.read(*args.records))
    except (OSError, ValueError) as e:
        parser.error(f"argument records: {e}")
    paths = draw(made, args)
    if not paths:
        parser.error(f"argument records: {nothing} in {', '.join(map(str, args.records))}")
    for path in paths:
        print(path)
    return 0
