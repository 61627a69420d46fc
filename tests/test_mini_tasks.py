import itertools
import re
from datetime import date, timedelta
from random import Random

import pytest

from neo.data.mini_tasks import KINDS
from neo.data.mini_wordings import MONTHS, PHRASINGS, RELATIONS


def draws(kind: str, count: int = 400) -> list:
    rng = Random(7)
    return [KINDS[kind](rng) for _ in range(count)]


def turns(kind: str, index: int = 0) -> list[tuple[str, str]]:
    return [task.turns[index] for task in draws(kind)]


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def operand_string(question: str) -> str:
    return max(re.findall(r"[A-Z]+", question), key=len)


def number_of(name: str, question: str) -> str:
    return re.search(rf"{name} (\d+)", question)[1]


def test_there_are_at_least_eight_kinds_worded_in_at_least_four_ways():
    assert len(KINDS) >= 8
    assert all(len(PHRASINGS[form]) >= 4 for form in PHRASINGS if form not in ("fact", "entry"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_random_state_gives_the_same_tasks(kind):
    assert draws(kind, 50) == draws(kind, 50)


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_names_its_operands_and_fills_every_placeholder(kind):
    for task in draws(kind):
        assert task.operands
        assert all(question and answer for question, answer in task.turns)
        assert not re.search(r"[{}]", str(task.turns))


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_two_thousand_operands_or_more(kind):
    rng = Random(7)
    seen = set()
    for _ in range(20_000):
        seen.add(KINDS[kind](rng).operands)
        if len(seen) == 2_000:
            return
    raise AssertionError(f"{kind} has {len(seen)} operands")


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_answer_is_its_working_and_then_its_result(kind):
    for task in draws(kind):
        assert task.result
        assert task.turns[-1][1] == task.working + task.result


def test_arithmetic_answers_follow_from_the_numbers_of_the_question():
    for question, answer in turns("arithmetic"):
        a, b = numbers(question)
        if re.search(r" - |Subtract|minus|Take", question):
            a, b = max(a, b), min(a, b)  # "subtract 3 from 120" names them the other way round
            assert answer == f"{a}-{b}={a - b}"
        else:
            assert answer == f"{a}+{b}={a + b}"


def test_string_answers_follow_from_the_letters_of_the_question():
    for question, answer in turns("strings"):
        s = operand_string(question)
        if re.search(r"[Rr]everse|backwards|from the end", question):
            assert answer == s[::-1]
        elif re.search("twice|Double|Repeat", question):
            assert answer == re.sub("(.)", r"\1\1", s)
        else:
            assert answer == s[0] + s[-1]


def test_sorting_answers_hold_the_same_letters_in_the_order_asked_for():
    for question, answer in turns("sorting"):
        s = operand_string(question)
        down = re.search("backwards|reverse|from the last", question) is not None
        assert list(answer) == sorted(s, reverse=down)


def test_counting_answers_are_the_count_of_the_letter_asked_for():
    for question, answer in turns("counting"):
        s = operand_string(question)
        (letter,) = re.findall(r"(?<![A-Za-z])[A-Z](?![A-Za-z])", question)
        assert answer == f"{letter}={s.count(letter)}"


def test_lookup_answers_are_what_the_list_says_of_the_person_asked_for():
    for question, answer in turns("lookup"):
        (asked,) = re.findall(r"(?:is|find|take) ([A-Z]\w+)", question)
        assert answer == f"{asked} {number_of(asked, question)}"


def in_small_units(amount: str) -> int:
    if amount.endswith((" cm", " g")):
        return int(amount.split()[0])
    if amount.endswith(" min"):
        hours, minutes = re.fullmatch(r"(?:(\d+) h )?(\d+) min", amount).groups("0")
        return 60 * int(hours) + int(minutes)
    return round(float(amount.split()[0]) * (100 if amount.endswith(" m") else 1000))


def test_a_converted_amount_is_the_same_amount():
    amount = r"\d+\.\d+ k?[mg]|\d+ h \d+ min|\d+ (?:cm|g|min)"
    for question, answer in turns("units"):
        (old,) = re.findall(amount, question)
        assert re.fullmatch(amount, answer)
        assert old != answer
        assert in_small_units(old) == in_small_units(answer)


@pytest.mark.parametrize("year", [2023, 2024])
def test_dates_are_right_in_common_and_in_leap_years(year):
    months = "|".join(MONTHS)
    for question, answer in turns("dates"):
        if written := re.search(rf"(\d+) ({months}) (\d+)", question):
            day, month, shown = written.groups()
            assert answer == f"{shown}-{MONTHS.index(month) + 1:02}-{int(day):02}"
            continue
        ((start, day, month),) = re.findall(rf"((\d+) ({months}))", question)
        (n,) = numbers(question.replace(start, ""))
        sign = -1 if re.search("before|earlier|back", question) else 1
        end = date(year, MONTHS.index(month) + 1, int(day)) + timedelta(sign * n)
        assert answer == f"{end.day} {MONTHS[end.month - 1]}"


def test_logic_answers_put_three_people_in_the_order_that_was_asked_for():
    more = {relation[0] for relation in RELATIONS}
    most = {relation[2] for relation in RELATIONS}
    for question, answer in turns("logic"):
        wins = []
        for p, relation, q in re.findall(r"([A-Z]\w+) is (\w+er) than ([A-Z]\w+)\.", question):
            wins.append((p, q) if relation in more else (q, p))
        order = answer.split(", ")
        if not any(word in question for word in most):
            order = order[::-1]
        assert sorted(wins) == sorted(itertools.pairwise(order))


def test_a_two_step_answer_takes_both_steps():
    for question, answer in turns("two_step"):
        if "larger" in question or "smaller" in question:
            shown = numbers(question)
            c = shown.pop(0) if question.startswith("Add") else shown.pop()
            chosen = max(shown) if "larger" in question else min(shown)
            assert answer == f"{chosen}+{c}={chosen + c}"
        else:
            assert answer == operand_string(question)[:0:-1]


def test_the_second_turn_of_a_dialogue_goes_on_from_the_first():
    for (first, answer), (second, last) in (task.turns for task in draws("dialogue")):
        if "+" in answer:
            (a, b), (c,) = numbers(first), numbers(second)
            assert (answer, last) == (f"{a}+{b}={a + b}", f"{a + b}+{c}={a + b + c}")
        elif " " in answer:
            (asked,) = re.findall(r"(?:about|And|find|is) ([A-Z]\w+)", second)
            assert last == f"{asked} {number_of(asked, first)}"
        else:
            assert answer == operand_string(first)[::-1]
            assert list(last) == sorted(answer)
