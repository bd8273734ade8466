"""Every figure of every study, from saved results, and the gallery.

python -m figures [NAME …]
make figures
"""

import argparse
import sys
import time
from pathlib import Path

from figures import gallery


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(gallery.MODULES)}; default all")
    parser.add_argument("--out", type=Path, default=gallery.HERE, help="folder of the figures")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in gallery.MODULES]:
        parser.error(f"expected some of {', '.join(gallery.MODULES)}; found {unknown[0]!r}")
    given.out.mkdir(parents=True, exist_ok=True)
    names = given.names or gallery.MODULES
    for number, name in enumerate(names, 1):
        start, of = time.perf_counter(), gallery.module(name)
        drawn = gallery.write(of.figures, given.out)
        told = f"{', '.join(drawn)}  ({time.perf_counter() - start:.1f} s)" if drawn else f"no results: {of.STUDY}"
        print(f"[{number}/{len(names)}] {name}: {told}", file=sys.stderr, flush=True)
    gallery.write_page(given.out)


if __name__ == "__main__":
    main()
