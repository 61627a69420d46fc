"""The mini-lab's tasks: ten kinds of short instructions, each with one exact answer.

A kind is a function from a random state to a `Task`. What a task is about, its operands, is kept
apart from how it is worded: the operands decide the split (`neo.data.mini`), the wording does not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random

from neo.data.mini_wordings import LETTERS, MONTHS, NAMES, PHRASINGS, RELATIONS

Operands = tuple[str | int | tuple[str, int], ...]


@dataclass(frozen=True)
class Task:
    """One conversation and what decides its split.

    Args:
        form: The kind of answer; only tasks of the same form may trade answers.
        turns: Question and exact answer, turn by turn.
        operands: Per step, the operands in an order that neither the wording nor the order of
            presentation changes; the first entry names the space they come from.
        working: How the last answer begins before its result, such as `12+30=`.
    """

    form: str
    turns: tuple[tuple[str, str], ...]
    operands: tuple[Operands, ...]
    working: str = ""

    @property
    def result(self) -> str:
        """What the last answer comes to, without its working."""
        return self.turns[-1][1].removeprefix(self.working)


def arithmetic(rng: Random) -> Task:
    """A number of three digits plus or minus one of one digit."""
    a, b = rng.randint(100, 999), rng.randint(2, 9)
    if rng.random() < 0.5:
        form, working, result = "add", f"{a}+{b}=", a + b
    else:
        form, working, result = "subtract", f"{a}-{b}=", a - b
    turn = (_say(rng, form, a=a, b=b), f"{working}{result}")
    return Task("number", (turn,), (_numbers(a, b),), working)


def strings(rng: Random) -> Task:
    """Three to six different letters reversed, doubled, or cut down to their ends."""
    s = _letters(rng, 3, 6)
    form = rng.choice(("reverse", "double", "ends"))
    answer = {"reverse": s[::-1], "double": "".join(2 * c for c in s), "ends": s[0] + s[-1]}[form]
    return Task(form, ((_say(rng, form, s=s), answer),), (_multiset(s),))


def sorting(rng: Random) -> Task:
    """Three to five different letters in alphabetical order, or in its reverse."""
    s = _letters(rng, 3, 5)
    down = rng.random() < 0.5
    question = _say(rng, "sort_down" if down else "sort_up", s=s)
    return Task("sort", ((question, "".join(sorted(s, reverse=down))),), (_multiset(s),))


def counting(rng: Random) -> Task:
    """How often a letter stands in four to six letters, of which there are up to three sorts."""
    sorts = rng.sample(LETTERS, 3)
    s = "".join(rng.choice(sorts) for _ in range(rng.randint(4, 6)))
    x = rng.choice(sorts)
    turn = (_say(rng, "count", s=s, x=x), f"{x}={s.count(x)}")
    return Task("count", (turn,), (_multiset(s),), f"{x}=")


def lookup(rng: Random) -> Task:
    """The number of one of two to four people in a list."""
    entries = _table(rng, 2, 4)
    x = rng.choice(list(entries))
    question = _say(rng, "lookup", table=_list(entries), x=x)
    return Task("number", ((question, f"{x} {entries[x]}"),), (_entries(entries),), f"{x} ")


def units(rng: Random) -> Task:
    """A length, a weight or a time in a larger or a smaller unit."""
    small, large = rng.choice((("cm", "m"), ("g", "kg"), ("min", "h")))
    if large == "h":
        n = rng.randint(61, 599)
        amounts = (f"{n} min", f"{n // 60} h {n % 60:02} min")
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
    """A date in numbers, or the date two to nine days on or back in any year."""
    start, n = date(2023, 1, 1) + timedelta(rng.randrange(365)), rng.randint(2, 9)
    form, end = rng.choice((("after", start + timedelta(n)), ("before", start - timedelta(n))))
    if rng.random() < 0.5 or (start.month, end.month) in ((2, 3), (3, 2)):
        year = rng.randint(1900, 2099)
        question = _say(rng, "iso", day=_day(start), year=year)
        answer = f"{year}-{start:%m-%d}"
        return Task("iso", ((question, answer),), (("date", start.month, start.day, year),))
    question = _say(rng, form, n=n, day=_day(start))
    return Task("date", ((question, _day(end)),), (("date", start.month, start.day, n),))


def logic(rng: Random) -> Task:
    """Three people in the order that two comparisons give, from either end."""
    first, middle, last = rng.sample(NAMES, 3)
    more, less, most, least = rng.choice(RELATIONS)
    chain = ((first, middle), (middle, last))
    if rng.random() < 0.5:
        facts = [_say(rng, "fact", p=p, relation=more, q=q) for p, q in chain]
    else:
        facts = [_say(rng, "fact", p=q, relation=less, q=p) for p, q in chain]
    order = (first, middle, last)
    asked, answer = rng.choice(((most, order), (least, order[::-1])))
    question = _say(rng, "logic", facts=" ".join(facts), most=asked)
    # read from its other end it is the same order, so both readings fall into the same split
    return Task("order", ((question, ", ".join(answer)),), (("order", *min(order, order[::-1])),))


def two_step(rng: Random) -> Task:
    """One operation on what another one gives, asked for in one go."""
    if rng.random() < 0.5:
        s = _letters(rng, 3, 5)
        answer = s[::-1][:-1]
        return Task("reverse", ((_say(rng, "reverse_drop", s=s), answer),), (_multiset(s),))
    a, b = rng.sample(range(10, 100), 2)
    c = rng.randint(2, 9)
    form, chosen = rng.choice((("larger", max(a, b)), ("smaller", min(a, b))))
    question = _say(rng, form, a=a, b=b, c=c)
    working = f"{chosen}+{c}="
    turn = (question, f"{working}{chosen + c}")
    return Task("number", (turn,), (_numbers(a, b), _numbers(chosen, c)), working)


def dialogue(rng: Random) -> Task:
    """Two turns, the second of which needs the first."""
    form = rng.choice(("add", "reverse", "lookup"))
    if form == "add":
        a, b, c = rng.randint(100, 999), rng.randint(2, 9), rng.randint(2, 9)
        turns = (
            (_say(rng, "add", a=a, b=b), f"{a}+{b}={a + b}"),
            (_say(rng, "then_add", c=c), f"{a + b}+{c}={a + b + c}"),
        )
        return Task("number", turns, (_numbers(a, b), _numbers(a + b, c)), f"{a + b}+{c}=")
    if form == "reverse":
        s = _letters(rng, 3, 5)
        turns = (
            (_say(rng, "reverse", s=s), s[::-1]),
            (_say(rng, "then_sort"), "".join(sorted(s))),
        )
        return Task("sort", turns, (_multiset(s),))
    entries = _table(rng, 2, 3)
    x, y = rng.sample(list(entries), 2)
    turns = (
        (_say(rng, "lookup", table=_list(entries), x=x), f"{x} {entries[x]}"),
        (_say(rng, "then_who", x=y), f"{y} {entries[y]}"),
    )
    return Task("number", turns, (_entries(entries),), f"{y} ")


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
    return rng.randint(10, 99)


def _letters(rng: Random, least: int, most: int) -> str:
    return "".join(rng.sample(LETTERS, rng.randint(least, most)))


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
