"""Pages of docs/ with sections that a script writes. A section is between two comments:

<!-- made by scripts/NAME: SECTION -->
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
    and 1 says that the page is not what would be written."""
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    place = re.compile(rf"(<!-- made by scripts/{script}.py: (\w+) -->\n).*?(<!-- end -->)", re.S)
    old = page.read_text()
    new = place.sub(lambda found: f"{found[1]}\n{sections[found[2]]}\n{found[3]}", old)
    if new == old:
        return 0
    if check:
        print(f"{script}: error: {page.name} is not what the code says: run it without --check", file=sys.stderr)
        return 1
    page.write_text(new)
    return 0
