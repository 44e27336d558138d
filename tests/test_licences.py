"""What a user installs with this package has a licence that asks nothing of who uses it unchanged."""

import re
from importlib import metadata

import pytest
from packaging.requirements import Requirement

ALLOWED = re.compile(
    r"MIT|MPL|Mozilla|BSD|Apache|PSF|Python Software Foundation|ISC|Unlicense|0BSD|Zlib|HPND|CC0|CMU|matplotlib", re.I
)
STRICT = re.compile(r"(?<!L)GPL|AGPL|SSPL|proprietary", re.I)
EXTRAS = ("", "bench", "real", "completion")
"""Without those that bring vLLM or xformers, which users choose for themselves."""


def licence(of: metadata.Distribution) -> str:
    facts = of.metadata
    classifiers = [c.split(" :: ")[-1] for c in facts.get_all("Classifier", []) if c.startswith("License ::")]
    text = facts.get("License-Expression") or "; ".join(classifiers) or facts.get("License") or ""
    return text.strip().splitlines()[0] if text.strip() else ""


def installed_with(extra: str) -> dict[str, str]:
    """Distribution -> its licence, of all that come with this package and one of its extras."""
    found: dict[str, str] = {}
    waiting = [("specattn-vllm", extra)]
    while waiting:
        name, wanted = waiting.pop()
        if name in found and not wanted:
            continue
        distribution = metadata.distribution(name)
        found[name] = licence(distribution)
        for line in distribution.requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": wanted}):
                waiting.append((re.sub(r"[-_.]+", "-", needed.name).lower(), ""))
    return found


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_comes_along_may_be_used(extra):
    try:
        found = installed_with(extra)
    except metadata.PackageNotFoundError as missing:
        pytest.skip(f"not installed: {missing}")
    assert "pydantic" in found and found["specattn-vllm"] == "Apache-2.0"
    assert len(found) > (6 if extra in ("bench", "real") else 5)
    doubtful = {n: words for n, words in found.items() if not ALLOWED.search(words) or STRICT.search(words)}
    assert not doubtful, doubtful


@pytest.mark.parametrize("words", ["GPL-3.0-only", "GNU General Public License (GPL)", "AGPL-3.0", "", "Proprietary"])
def test_others_would_be_found(words):
    assert not ALLOWED.search(words) or STRICT.search(words)
