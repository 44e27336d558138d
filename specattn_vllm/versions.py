"""The range of vLLM versions that the plugin is written for."""

import re

FIRST, END = (0, 32), (0, 34)  # END excluded; the `gpu` extra in pyproject.toml says the same
SUPPORTED = f">={FIRST[0]}.{FIRST[1]},<{END[0]}.{END[1]}"


def is_supported(version: str) -> bool:
    """Whether a vLLM version, such as '0.32.0+cpu', lies in the range; False for one without a number."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and FIRST <= (int(numbers[1]), int(numbers[2])) < END
