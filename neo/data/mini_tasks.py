"""The mini-lab's tasks: ten kinds of short instructions, each with one exact answer.

A kind is a function from a random state to a `Task`. What a task is about, its operands, is kept
apart from how it is worded: the operands decide the split (`neo.data.mini`), the wording does not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random
from string import ascii_uppercase

from neo.data.mini_wordings import MONTHS, NAMES, PHRASINGS, RELATIONS

Operands = tuple[str | int | tuple[str, int], ...]


@dataclass(frozen=True)
class Task:
    """One conversation and what decides its split.

    Args:
        form: The kind of answer; only tasks of the same form may trade answers.
        turns: Question and exact answer, turn by turn.
        operands: Per step, the operands in an order that neither the wording nor the order of
            presentation changes; the first entry names the space they come from.
    """

    form: str
    turns: tuple[tuple[str, str], ...]
    operands: tuple[Operands, ...]


def arithmetic(rng: Random) -> Task:
    """A sum or a difference of two numbers up to 99, never below zero."""
    a, b = _number(rng), _number(rng)
    if rng.random() < 0.5:
        return Task("number", ((_say(rng, "add", a=a, b=b), str(a + b)),), (_numbers(a, b),))
    a, b = max(a, b), min(a, b)
    return Task("number", ((_say(rng, "subtract", a=a, b=b), str(a - b)),), (_numbers(a, b),))


def strings(rng: Random) -> Task:
    """Three to six letters reversed, doubled, or cut down to their ends."""
    s = _letters(rng, 3, 6)
    form = rng.choice(("reverse", "double", "ends"))
    answer = {"reverse": s[::-1], "double": "".join(2 * c for c in s), "ends": s[0] + s[-1]}[form]
    return Task(form, ((_say(rng, form, s=s), answer),), (_multiset(s),))


def sorting(rng: Random) -> Task:
    """Three to five letters in alphabetical order, or in its reverse."""
    s = _letters(rng, 3, 5)
    down = rng.random() < 0.5
    question = _say(rng, "sort_down" if down else "sort_up", s=s)
    return Task("sort", ((question, "".join(sorted(s, reverse=down))),), (_multiset(s),))


def counting(rng: Random) -> Task:
    """How often a letter stands in five to eight letters, of which there are three sorts."""
    sorts = rng.sample(ascii_uppercase, 3)
    s = "".join(rng.choice(sorts) for _ in range(rng.randint(5, 8)))
    x = rng.choice(sorts)
    return Task("count", ((_say(rng, "count", s=s, x=x), str(s.count(x))),), (_multiset(s),))


def lookup(rng: Random) -> Task:
    """The number of one of three to five people in a list."""
    entries = _table(rng, 3, 5)
    x = rng.choice(list(entries))
    question = _say(rng, "lookup", table=_list(entries), x=x)
    return Task("number", ((question, str(entries[x])),), (_entries(entries),))


def units(rng: Random) -> Task:
    """A length, a weight or a time in a larger or a smaller unit."""
    small, large = rng.choice((("cm", "m"), ("g", "kg"), ("min", "h")))
    if large == "h":
        n = rng.randint(61, 599)
        amounts = (f"{n} min", f"{n // 60} h {n % 60} min")
        names = ("min", "h")
    else:
        digits = 2 if large == "m" else 3
        n = rng.randint(10**digits + 1, 10 ** (digits + 1) - 1)
        whole, rest = divmod(n, 10**digits)
        amounts = (f"{n} {small}", f"{whole}.{rest:0{digits}d} {large}")
        names = (small, large)
    up = rng.random() < 0.5
    old, new, unit = (*amounts, names[1]) if up else (*amounts[::-1], names[0])
    question = _say(rng, "convert", old=old, unit=unit)
    return Task(f"units_{unit}", ((question, new),), (("amount", small, n),))


def dates(rng: Random) -> Task:
    """The date two to nine days after or before a date, never across the end of February."""
    while True:
        # a leap and a common year agree wherever the way does not cross the end of February
        start, n = date(2023, 1, 1) + timedelta(rng.randrange(365)), rng.randint(2, 9)
        form, end = rng.choice((("after", start + timedelta(n)), ("before", start - timedelta(n))))
        if (start < date(2023, 3, 1)) == (end < date(2023, 3, 1)) or end.year != start.year:
            break
    question = _say(rng, form, n=n, day=_day(start))
    return Task("date", ((question, _day(end)),), (("date", start.month, start.day, n),))


def logic(rng: Random) -> Task:
    """Who of three people comes first or last, from two comparisons."""
    first, middle, last = rng.sample(NAMES, 3)
    more, less, most, least = rng.choice(RELATIONS)
    facts = [
        _say(rng, "fact", p=p, relation=more, q=q)
        if rng.random() < 0.5
        else _say(rng, "fact", p=q, relation=less, q=p)
        for p, q in ((first, middle), (middle, last))
    ]
    rng.shuffle(facts)
    asked, answer = rng.choice(((most, first), (least, last)))
    question = _say(rng, "logic", facts=" ".join(facts), most=asked)
    # read from its other end it is the same order, so both readings fall into the same split
    order = min((first, middle, last), (last, middle, first))
    return Task("name", ((question, answer),), (("order", *order),))


def two_step(rng: Random) -> Task:
    """One operation on what another one gives, asked for in one go."""
    if rng.random() < 0.5:
        s = _letters(rng, 3, 5)
        answer = s[::-1][:-1]
        return Task("reverse", ((_say(rng, "reverse_drop", s=s), answer),), (_multiset(s),))
    a, b = rng.sample(range(2, 100), 2)
    c = rng.randint(2, 9)
    form, chosen = rng.choice((("larger", max(a, b)), ("smaller", min(a, b))))
    question = _say(rng, form, a=a, b=b, c=c)
    return Task("number", ((question, str(chosen + c)),), (_numbers(a, b), _numbers(chosen, c)))


def dialogue(rng: Random) -> Task:
    """Two turns, the second of which needs the first."""
    form = rng.choice(("add", "reverse", "lookup"))
    if form == "add":
        a = rng.randint(2, 90)
        b, c = rng.randint(2, 99 - a), rng.randint(2, 9)
        turns = (
            (_say(rng, "add", a=a, b=b), str(a + b)),
            (_say(rng, "then_add", c=c), str(a + b + c)),
        )
        return Task("number", turns, (_numbers(a, b), _numbers(a + b, c)))
    if form == "reverse":
        s = _letters(rng, 3, 5)
        turns = (
            (_say(rng, "reverse", s=s), s[::-1]),
            (_say(rng, "then_sort"), "".join(sorted(s))),
        )
        return Task("sort", turns, (_multiset(s),))
    entries = _table(rng, 3, 4)
    x, y = rng.sample(list(entries), 2)
    turns = (
        (_say(rng, "lookup", table=_list(entries), x=x), str(entries[x])),
        (_say(rng, "then_who", x=y), str(entries[y])),
    )
    return Task("number", turns, (_entries(entries),))


KINDS: dict[str, Callable[[Random], Task]] = {
    task.__name__: task
    for task in (
        arithmetic,
        strings,
        sorting,
        counting,
        lookup,
        units,
        dates,
        logic,
        two_step,
        dialogue,
    )
}


def _say(rng: Random, form: str, **operands: str | int) -> str:
    return rng.choice(PHRASINGS[form]).format(**operands)


def _number(rng: Random) -> int:
    return rng.randint(2, 99)


def _letters(rng: Random, least: int, most: int) -> str:
    return "".join(rng.choices(ascii_uppercase, k=rng.randint(least, most)))


def _table(rng: Random, least: int, most: int) -> dict[str, int]:
    return {x: _number(rng) for x in rng.sample(NAMES, rng.randint(least, most))}


def _list(entries: dict[str, int]) -> str:
    return ", ".join(PHRASINGS["entry"][0].format(x=x, n=n) for x, n in entries.items())


def _day(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]}"


def _numbers(a: int, b: int) -> Operands:
    return ("numbers", min(a, b), max(a, b))


def _multiset(s: str) -> Operands:
    return ("letters", "".join(sorted(s)))


def _entries(entries: dict[str, int]) -> Operands:
    return ("table", *sorted(entries.items()))
