"""How likely a number of events is by chance: the arithmetic behind every judgement of the fleet. No package needed."""

from math import erfc, exp, lgamma, log, sqrt


def poisson_tail(count: int, expected: float) -> float:
    """P(N >= count) for a Poisson number N with this mean."""
    if count <= 0:
        return 1.0
    if expected <= 0:
        return 0.0
    if count > expected:  # the terms fall from here on
        term = exp(count * log(expected) - expected - lgamma(count + 1))
        total, at = 0.0, count
        while term > total * 1e-12:
            total += term
            at += 1
            term *= expected / at
        return min(1.0, total)
    term = exp((count - 1) * log(expected) - expected - lgamma(count))
    total, at = 0.0, count - 1
    while at >= 0 and term > total * 1e-12:
        total += term
        term *= at / expected
        at -= 1
    return max(0.0, 1.0 - total)


def upper_rate(events: float, exposure: float) -> float:
    """Events per unit of exposure that the observation does not rule out: two standard deviations above the mean."""
    return (events + 2 * sqrt(events + 1)) / exposure


def upper_share(part: int, whole: int) -> float:
    """The same for a share of `whole`; 1 where too little was seen to say less."""
    if whole < 20:
        return 1.0
    return min(1.0, (part + 2 * sqrt(part + 1) + 1) / whole)


def normal_quantile(share: float) -> float:
    """The standard normal's quantile, to 1e-6, by bisection of erfc."""
    low, high = -8.0, 8.0
    for _ in range(50):
        middle = (low + high) / 2
        if 0.5 * erfc(-middle / sqrt(2)) < share:
            low = middle
        else:
            high = middle
    return (low + high) / 2
