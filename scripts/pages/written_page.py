"""Pages of docs/ with sections that a script writes. A section is between two comments:

<!-- made by scripts/pages/NAME.py: SECTION -->
<!-- end -->
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def main(script: str, summary: str, page: Path, sections: Mapping[str, str]) -> int:
    """The command line of a script that writes these sections. Returns the exit status: with --check it writes nothing,
    and 1 says that the page is not what would be written, or has other sections."""
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    place = re.compile(rf"(<!-- made by scripts/pages/{script}\.py: (\w+) -->\n).*?(<!-- end -->)", re.S)
    old = page.read_text()
    if (there := sorted(found[2] for found in place.finditer(old))) != sorted(sections):
        has, wanted = (", ".join(names) or "none" for names in (there, sorted(sections)))
        print(f"{script}: error: the sections of {page.name} are {has}, not {wanted}: mend the page", file=sys.stderr)
        return 1
    new = place.sub(lambda found: f"{found[1]}\n{sections[found[2]]}\n{found[3]}", old)
    if new == old:
        return 0
    if check:
        print(f"{script}: error: {page.name} is not what the code says: run it without --check", file=sys.stderr)
        return 1
    page.write_text(new)
    return 0
