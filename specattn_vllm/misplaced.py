"""Finds misspelt keys of ours, and options of ours in the wrong place. They are refused: they would have no effect.

`--additional-config` and a request's extra arguments belong to vLLM, and other plugins put their keys there too. So a
name is refused only if it can hardly be meant for another plugin.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

from specattn_vllm import data_file

LONGEST = 80
ALIKE = 0.82
"""Names that are at least this similar (difflib's ratio) count as misspelt: 'specatn' (0.93), not 'sparse_attn'
(0.78)."""


def spells(name: Any, key: str) -> bool:
    """Whether a name is `key` but for case, punctuation or a longer ending: 'Spec-Attn', 'specattn.x'."""
    return isinstance(name, str) and name != key and _letters(name).startswith(_letters(key))


def resembles(name: Any, key: str) -> bool:
    """Whether a name is probably meant to be `key`. Unlike `spells`, it allows missing, doubled and swapped letters."""
    if not isinstance(name, str) or name == key:
        return False
    # A client may send a name of any length; one that is longer than this is not alike, or begins alike.
    ours, theirs = _letters(key), _letters(name[:LONGEST])
    begins = theirs.startswith(ours[:-1])  # 'spec_attention'
    return begins or bool(difflib.get_close_matches(ours, [theirs], cutoff=ALIKE))


def shown(value: Any) -> str:
    """A value that somebody sent, short enough for an error and a log."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # a number of thousands of digits, or what is nested as deep
        return f"a {type(value).__name__} that is too large to show"
    return data_file.plain(text, LONGEST)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def in_config(config: Any, key: str, options: Iterable[str], methods: Container[str] = (), *, ours: bool) -> list[str]:
    """Finds entries of an `--additional-config` that were meant for the object under `key`: one message with a remedy
    for each. `ours`: whether the engine uses our backend. If not, option names may belong to any plugin. Methods, and
    names that are only similar to an option, count as long as nothing is set under `key`.
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
        unset = key not in config and isinstance(name, str) and not resembles(name, key)
        if unset and _letters(name) in methods:
            found.append(
                f"{name!r} is a method of '{key}' and stands where nothing reads it: give "
                f"{_line({key: {'method': _letters(name)}})}. If it belongs to another plugin, also set ours in '{key}'"
            )
            continue
        option, what = named.get(_letters(name)) if isinstance(name, str) else None, "is an option"
        if option is None and unset and (option := _near_option(name, value, named)):
            what = f"looks like the option {option!r}"
        if option is not None and option not in settled:
            found.append(
                f"{name!r} {what} of '{key}' but stands outside of it, where it has no effect: give "
                f"{_line({key: {option: value}})}. If it belongs to another plugin, also set ours in '{key}'"
            )
        elif isinstance(value, Mapping) and key in value and not resembles(name, key) and name != key:
            found.append(f"'{key}' stands inside {name!r}, where it has no effect: give {_line({key: value[key]})}")
    return found


def _near_option(name: str, value: Any, named: Mapping[str, str]) -> str | None:
    """The option that a name is probably meant to be: 'mthod'. None has an object for its value."""
    if isinstance(value, Mapping):
        return None
    near = difflib.get_close_matches(_letters(name[:LONGEST]), named, n=1, cutoff=ALIKE)
    return named[near[0]] if near else None


def _near_key(name: str, value: Any, key: str) -> str:
    inside = value if isinstance(value, Mapping) else {"method": "dense"}
    return f"{name!r} is not a name that anything reads; ours is '{key}': give {_line({key: inside})}"


def _line(config: Mapping[str, Any]) -> str:
    return f"--additional-config '{json.dumps(config, default=str)}'"
