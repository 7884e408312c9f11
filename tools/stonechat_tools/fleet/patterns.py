"""Regular expressions that an operator writes, matched in bounded time.

Python's engine goes back and forth: `(a+)+$` takes hours for a name of 64 letters, and so does `(a|a)(a|a)...`. What
can do that is refused: a repeat within a repeat, a choice within a repeat, references, looking around, more than
MAX_REPEATS repeats, and choices one after the other with more than MAX_WAYS ways through them.
"""

import re
from functools import lru_cache
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

MAX_PATTERN = 200  # characters
MAX_REPEATS = 3  # of a length that is not given: the time grows with the text's length to this power
MAX_WAYS = 1000  # through the choices of a pattern: those of (a|b|cd) are three, of two such in a row nine
MAX_TIMES = 100  # of a repeat with a number
MAX_SUBJECT = 128  # characters of the text

_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)
_PLAIN = (_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN, _constants.AT)


@lru_cache(1000)
def compiled(pattern: str) -> re.Pattern[str]:
    """Raises ValueError with the fix."""
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"a pattern of {len(pattern)} characters; at most {MAX_PATTERN}")
    try:
        count, ways = _check(_parser.parse(pattern), False)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"no regular expression: {error}") from None
    if count > MAX_REPEATS:
        raise ValueError(f"{count} repeats (* + ?); at most {MAX_REPEATS}")
    if ways > MAX_WAYS:
        raise ValueError(f"{ways:.3g} ways through the choices (|); at most {MAX_WAYS}: write [ab] in place of (a|b)")
    return re.compile(pattern)


@lru_cache(10_000)
def matches(pattern: str, text: str) -> bool:
    """Whether the pattern covers the whole text. Raises ValueError as compiled()."""
    return compiled(pattern).fullmatch(text[:MAX_SUBJECT]) is not None


def _check(parts: Any, repeated: bool) -> tuple[int, float]:
    """-> (how many repeats there are one after the other, how many ways there are through the choices)."""
    count, ways = 0, 1.0
    for kind, value in parts:
        if kind in _REPEATS:
            least, most, inner = value
            if repeated:
                raise ValueError("a repeat within a repeat; write [ab]+ in place of (a+|b)+")
            if least > MAX_TIMES or most > MAX_TIMES and most != _constants.MAXREPEAT:
                raise ValueError(f"a repeat of more than {MAX_TIMES} times")
            count += (least != most) + _check(inner, True)[0]
        elif kind is _constants.SUBPATTERN:
            more, times = _check(value[-1], repeated)
            count, ways = count + more, ways * times
        elif kind is _constants.BRANCH:
            if repeated:
                raise ValueError("a choice within a repeat; write [ab]+ in place of (a|b)+")
            found = [_check(branch, repeated) for branch in value[1]]
            count += max(repeats for repeats, _ in found)
            ways *= sum(times for _, times in found)
        elif kind not in _PLAIN:
            raise ValueError(f"{str(kind).lower()} is not taken; write letters, . [] () | * + ?")
    return count, ways
