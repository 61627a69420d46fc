from string import Formatter

import pytest

from neo.data.mini_wordings import MONTHS, NAMES, PHRASINGS, RELATIONS


@pytest.mark.parametrize("form", PHRASINGS)
def test_every_wording_of_a_form_is_different_and_asks_for_the_same_operands(form):
    operands = [
        {field for _, field, _, _ in Formatter().parse(w) if field} for w in PHRASINGS[form]
    ]
    assert len(set(PHRASINGS[form])) == len(PHRASINGS[form])
    assert all(names == operands[0] for names in operands)


def test_no_wording_belongs_to_two_forms():
    wordings = [wording for form in PHRASINGS.values() for wording in form]
    # a list may be sorted in the first turn or in the second
    assert len(set(wordings)) >= len(wordings) - 1


def test_names_months_and_relations_are_single_words_that_differ():
    words = [*NAMES, *MONTHS, *(word for relation in RELATIONS for word in relation)]
    assert len(set(words)) == len(words)
    assert all(word.isalpha() for word in words)
