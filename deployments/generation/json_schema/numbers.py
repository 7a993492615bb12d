"""Numbers of a JSON schema: bounds and multiples that llguidance keeps to.

llguidance 1.9 turns bounds into regular expressions over decimal digits and gets some wrong: exclusive bounds within
one unit let the bound itself through, and its JSON parser reads numbers of more than 15 digits as a neighbour
(1.9999999999999998 as 2). Who reads what it wrote rounds to doubles too: 1.00000000000000000001 is not greater than 1.
Hence inclusive bounds alone, at the next number within that has at most 15 digits.
"""

from __future__ import annotations

import decimal
import math
from fractions import Fraction
from typing import Any

from deployments.generation.json_schema.place import Place

SMALLEST = 1e-60  # llguidance's expression nests once for each zero after the point, at most some 125 times
LARGEST = int(math.nextafter(1e18, 0))  # llguidance computes with doubles and 64-bit integers
_FIFTEEN_UP = decimal.Context(prec=15, rounding=decimal.ROUND_CEILING)
FEW = 100  # multiples within bounds that are listed one by one
MAX_COEFFICIENT = 2**32 - 1  # of multipleOf, times the power of ten that makes it whole; llguidance's limit


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_exact(value: int | float, place: Place) -> None:
    """Refuses a constant that llguidance would write as another number."""
    digits = decimal.Decimal(repr(value)).normalize()
    exact = len(digits.as_tuple().digits) <= 15 and abs(digits.adjusted()) < 15 if isinstance(value, float) else True
    if not exact or abs(value) > LARGEST or float(value) != value:
        raise place.found(value, "a number of at most 15 digits")


def number(value: object, place: Place) -> int | float:
    """`value`, if it is a number that a double can hold. Python reads 1e400 as infinity."""
    if not is_number(value) or not abs(value) < 1e308:  # type: ignore[arg-type]
        raise place.found(value, "a number below 1e308")
    return value  # type: ignore[return-value]


def counts(schema: dict[str, Any], place: Place, *keywords: str) -> dict[str, int]:
    """Keywords that count something; JSON Schema allows 2.0 for 2."""
    result = {}
    for keyword in keywords:
        if keyword in schema:
            value = number(schema[keyword], place / keyword)
            if value < 0 or value != int(value):
                raise (place / keyword).found(value, "a whole number, zero or more")
            result[keyword] = int(value)
    return result


def bounds(schema: dict[str, Any], integer: bool, place: Place) -> dict[str, int | float]:
    """`minimum` and `maximum` for what the four keywords of `schema` allow; `integer`: of integers alone."""
    lower, upper = _lower(schema, "inimum", 1, integer, place), _lower(schema, "aximum", -1, integer, place)
    result: dict[str, int | float] = {}
    if lower:
        result["minimum"] = _reachable(max(lower), place / "minimum")
    if upper:
        result["maximum"] = -_reachable(max(upper), place / "maximum")
    return result


def multiples(step: object, limits: dict[str, int | float], integer: bool, place: Place) -> list[int | float] | None:
    """The multiples of `step` within `limits` if they are few, None otherwise. llguidance does not notice that none of
    what it would write within narrow bounds is a multiple."""
    exact = exact_step(step, place)
    if integer:
        exact *= exact.denominator  # the multiples that are integers: those of the numerator
    if len(limits) < 2:
        return None
    first = math.ceil(_decimal(limits["minimum"]) / exact)
    last = math.floor(_decimal(limits["maximum"]) / exact)
    if last - first >= FEW:
        return None
    values = [n * exact for n in range(first, last + 1)]
    found = [int(value) if value.denominator == 1 else float(value) for value in values]
    for value in found:
        check_exact(value, place)
    return found


def exact_step(step: object, place: Place) -> Fraction:
    """multipleOf as a fraction. Raises InvalidRequestError where llguidance would take another number."""
    value = number(step, place)
    if value <= 0:
        raise place.found(value, "a number greater than zero")
    scaled, digits = float(value), 0
    while scaled != math.floor(scaled) and scaled <= MAX_COEFFICIENT:  # as llguidance counts the digits
        scaled, digits = scaled * 10, digits + 1
    if scaled > MAX_COEFFICIENT or Fraction(int(scaled), 10**digits) != _decimal(value):
        raise place.found(value, f"a number of fewer digits (up to {MAX_COEFFICIENT} without the point)")
    return _decimal(value)


def _lower(schema: dict[str, Any], ending: str, sign: int, integer: bool, place: Place) -> list[int | float]:
    """Inclusive lower bounds of `sign` times the number, from `minimum` and `exclusiveMinimum` or their opposites."""
    found = []
    inclusive, exclusive = schema.get(f"m{ending}"), schema.get(f"exclusiveM{ending}")
    if exclusive is True or exclusive is False:  # as in draft 4
        inclusive, exclusive = (None, inclusive) if exclusive else (inclusive, None)
    if inclusive is not None:
        bound = sign * number(inclusive, place / f"m{ending}")
        found.append(_whole_double(math.ceil(bound)) if integer or bound == int(bound) else _within(bound))
    if exclusive is not None:
        bound = sign * number(exclusive, place / f"exclusiveM{ending}")
        found.append(_whole_double(math.floor(bound) + 1) if integer else _within(bound, excluded=True))
    return found


def _whole_double(value: int) -> int:
    """The least whole number from `value` on that is a double."""
    double = float(value)
    return int(double if double >= value else math.nextafter(double, math.inf))


def _within(bound: int | float, excluded: bool = False) -> int | float:
    """The least number from `bound` on that has at most 15 digits."""
    if abs(bound) < SMALLEST:
        return SMALLEST if bound > 0 or (excluded and bound == 0) else 0
    written = decimal.Decimal(repr(bound))
    rounded = _FIFTEEN_UP.plus(written)
    if excluded and rounded == written:
        rounded = _FIFTEEN_UP.next_plus(rounded)
    return int(rounded) if rounded == int(rounded) else float(rounded)


def _reachable(lower: int | float, place: Place) -> int | float:
    if lower > LARGEST:
        raise place.found(lower, "a bound below 1e18")
    return max(lower, -LARGEST)


def _decimal(value: int | float) -> Fraction:
    """The number that was written, not the double it was rounded to."""
    return Fraction(repr(value))
