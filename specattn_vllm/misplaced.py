"""Names that are nearly ours, or ours in another place: they are refused, because what was asked for would not happen.

`--additional-config` and a request's extra arguments are vLLM's, and other plugins put theirs there too. So only what
can hardly be meant for anybody else counts.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

ALIKE = 0.82
"""From which likeness on (difflib's ratio) a name is taken for a slip: 'specatn' (0.93), not 'sparse_attn' (0.78)."""


def spells(name: Any, key: str) -> bool:
    """Whether a name is `key` in other letters, with other signs, or with more behind it: 'Spec-Attn', 'specattn.x'."""
    return isinstance(name, str) and name != key and _letters(name).startswith(_letters(key))


def resembles(name: Any, key: str) -> bool:
    """Whether a name is likely to be meant for `key`: also with letters missing, doubled or swapped."""
    if not isinstance(name, str) or name == key:
        return False
    ours, theirs = _letters(key), _letters(name)
    begins = theirs.startswith(ours[:-1])  # 'spec_attention'
    return begins or difflib.SequenceMatcher(None, theirs, ours).ratio() >= ALIKE


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def in_config(config: Any, key: str, options: Iterable[str], *, ours: bool) -> list[str]:
    """What of an `--additional-config` was meant for the object under `key`, each with its remedy.

    `ours`: whether the engine uses our backend. If not, names of options are anybody's.
    """
    if not isinstance(config, Mapping):
        return []
    given = config.get(key)
    settled = set(given) if isinstance(given, Mapping) else set()
    is_near = resembles if ours else spells
    found = [_near_key(name, value, key) for name, value in config.items() if is_near(name, key)]
    if not ours:
        return found
    named = {_letters(option): option for option in options}
    for name, value in config.items():
        option = named.get(_letters(name)) if isinstance(name, str) else None
        if option is not None and option not in settled:
            found.append(
                f"{name!r} is an option of '{key}' and stands outside of it, where it does nothing: give "
                f"{_line({key: {option: value}})}. If it is another plugin's, set ours too, in '{key}'"
            )
        elif isinstance(value, Mapping) and key in value and not resembles(name, key) and name != key:
            found.append(f"'{key}' stands inside of {name!r}, where it does nothing: give {_line({key: value[key]})}")
    return found


def _near_key(name: str, value: Any, key: str) -> str:
    inside = value if isinstance(value, Mapping) else {"method": "dense"}
    return f"{name!r} is not a name that anything reads; ours is '{key}': give {_line({key: inside})}"


def _line(config: Mapping[str, Any]) -> str:
    return f"--additional-config '{json.dumps(config, default=str)}'"
