"""An end by something that the user can correct, told in one form by all scripts, which is argparse's own."""

import sys
from pathlib import Path


class Refused(SystemExit):
    """Exit status 1, and on stderr the script's name, `error:`, and what to do."""

    def __init__(self, message: str):
        super().__init__(f"{Path(sys.argv[0]).name}: error: {message}")
