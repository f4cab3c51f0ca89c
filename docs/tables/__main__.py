"""`python -m docs.tables` checks every table of numbers; `--write` brings them up to date."""

import argparse
import sys

from docs.tables import pages


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.tables", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the tables that differ")
    options = parser.parse_args()
    differing = []
    for page in pages.all_pages():
        differing += pages.outdated(page)
        if options.write:
            pages.write(page)
    for table in differing:
        print(f"{'wrote' if options.write else 'differs from its JSON:'} {table}")
    if differing and not options.write:
        print("bring them up to date by: python -m docs.tables --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
