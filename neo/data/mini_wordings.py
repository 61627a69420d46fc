"""What the mini-lab's tasks are worded in: phrasings by form, and the words of operands."""

NAMES = (
    *("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ivo", "Jane"),
    *("Kim", "Leo", "Mia", "Nils", "Olga", "Pat", "Rosa", "Sam", "Tina", "Vera"),
)
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August"),
    *("September", "October", "November", "December"),
)
# more, less, most, least
RELATIONS = (
    ("older", "younger", "oldest", "youngest"),
    ("taller", "shorter", "tallest", "shortest"),
    ("faster", "slower", "fastest", "slowest"),
    ("richer", "poorer", "richest", "poorest"),
)
LETTERS = "ABCDEFGHIJKLMN"
UNITS = ("cm", "m", "g", "kg", "min", "h")

PHRASINGS = {
    "add": (
        "What is {a} + {b}?",
        "Add {a} and {b}.",
        "{a} plus {b} is?",
        "Find the sum of {a} and {b}.",
        "Compute {a} + {b}.",
    ),
    "subtract": (
        "What is {a} - {b}?",
        "Subtract {b} from {a}.",
        "{a} minus {b} is?",
        "Take {b} from {a}.",
        "Compute {a} - {b}.",
    ),
    "reverse": (
        "Reverse {s}.",
        "Write {s} backwards.",
        "Spell {s} from the end.",
        "What is {s} in reverse?",
    ),
    "double": (
        "Write each letter of {s} twice.",
        "Double each letter of {s}.",
        "Repeat every letter of {s}.",
        "What is {s} with every letter twice?",
    ),
    "ends": (
        "Give the first and the last letter of {s}.",
        "How does {s} begin and end?",
        "Keep only the first and last letter of {s}.",
        "First and last letter of {s}?",
    ),
    "sort_up": (
        "Sort the letters of {s}.",
        "Order the letters of {s} alphabetically.",
        "Put {s} in order.",
        "What is {s} with sorted letters?",
    ),
    "sort_down": (
        "Sort the letters of {s} backwards.",
        "Order the letters of {s} from the last to the first.",
        "Put {s} in reverse order.",
        "What is {s} with letters sorted backwards?",
    ),
    "count": (
        "How many {x} are in {s}?",
        "Count the letter {x} in {s}.",
        "How often does {x} occur in {s}?",
        "In {s}, how many letters are {x}?",
    ),
    "lookup": (
        "Given {table}: what is {x}?",
        "If {table}, find {x}.",
        "What is {x} if {table}?",
        "From {table} take {x}.",
    ),
    "entry": ("{x} {n}",),
    "convert": (
        "Convert {old} to {unit}.",
        "What is {old} in {unit}?",
        "Write {old} in {unit}.",
        "How many {unit} are {old}?",
    ),
    "iso": (
        "Write {day} {year} in numbers.",
        "Give {day} {year} as year-month-day.",
        "{day} {year} in digits?",
        "How is {day} {year} written in numbers?",
    ),
    "after": (
        "What date is {n} days after {day}?",
        "Which day comes {n} days after {day}?",
        "What is {n} days later than {day}?",
        "Go {n} days on from {day}.",
    ),
    "before": (
        "What date is {n} days before {day}?",
        "Which day comes {n} days before {day}?",
        "What is {n} days earlier than {day}?",
        "Go {n} days back from {day}.",
    ),
    "logic": (
        "{facts} Order them from the {most}.",
        "{facts} List all, the {most} first.",
        "{facts} Who comes in which place, from the {most}?",
        "From the {most} on, order them: {facts}",
    ),
    "fact": ("{p} is {relation} than {q}.",),
    "larger": (
        "Take the larger of {a} and {b} and add {c}.",
        "Add {c} to the larger of {a} and {b}.",
        "Which is larger, {a} or {b}? Add {c} to it.",
        "What is the larger of {a} and {b}, plus {c}?",
    ),
    "smaller": (
        "Take the smaller of {a} and {b} and add {c}.",
        "Add {c} to the smaller of {a} and {b}.",
        "Which is smaller, {a} or {b}? Add {c} to it.",
        "What is the smaller of {a} and {b}, plus {c}?",
    ),
    "reverse_drop": (
        "Reverse {s}, then drop the last letter.",
        "Write {s} backwards without its first letter.",
        "Drop the first letter of {s}, then reverse it.",
        "Spell {s} from the end, but not the first letter.",
    ),
    "then_add": (
        "Now add {c}.",
        "Add {c} to it.",
        "And plus {c}?",
        "What is it plus {c}?",
    ),
    "then_sort": (
        "Now sort it.",
        "Now sort the letters.",
        "And in alphabetical order?",
        "Put it in order.",
    ),
    "then_who": (
        "And {x}?",
        "What about {x}?",
        "Now find {x}.",
        "And what is {x}?",
    ),
}

# what operands and answers spell out in words, beside the phrasings
WORDS = (*NAMES, *MONTHS, *UNITS, *(word for relation in RELATIONS for word in relation))
