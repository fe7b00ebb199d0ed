"""Sentences of the word problems: how a story is told, and how its steps are worked out."""

from __future__ import annotations

# The order of the words is part of what a seed means.
NAMES = {
    "he": (
        "Adam Ben Carlos David Ethan Felix Gabriel Henry Ivan Jack Kevin Liam Marco Noah Oscar "
        "Paul Rami Sam Tom Victor"
    ).split(),
    "she": (
        "Alice Bella Clara Dina Emma Fiona Grace Hana Iris Julia Kate Lena Maria Nora Olivia Petra "
        "Rosa Sofia Tara Vera"
    ).split(),
}
OBJECT_PRONOUNS = {"he": "him", "she": "her"}
ITEMS = (
    "apples books cards coins marbles stickers pencils shells stamps buttons cookies candles "
    "balloons tickets badges beads crayons flowers leaves lemons magnets mugs oranges pears photos "
    "plums ribbons stones tokens toys"
).split()

OPENERS = (
    "{name} has {a} {items}.",
    "{name} starts the week with {a} {items}.",
    "There are {a} {items} on the desk of {name}.",
    "{name} owns {a} {items} at first.",
    "At the beginning {name} keeps {a} {items}.",
    "A box that belongs to {name} holds {a} {items}.",
)
QUESTIONS = (
    "How many {items} does {name} have now?",
    "How many {items} are there in the end?",
    "What is the final number of {items}?",
    "How many {items} does {name} end up with?",
    "Find how many {items} {name} has at the end.",
)
STEPS = {
    "+": (
        "A friend gives {name} {b} more {items}.",
        "{name} buys {b} {items} at the market.",
        "{name} finds {b} more {items} in a drawer.",
        "An aunt sends {name} {b} {items} by mail.",
        "{name} wins {b} {items} in a game.",
        "{name} picks up {b} {items} on the way home.",
        "Then {b} more {items} arrive.",
        "A neighbor adds {b} {items} to the pile.",
        "{name} receives {b} {items} as a present.",
        "The school hands {name} {b} extra {items}.",
        "{name} trades an old hat for {b} {items}.",
        "Later {name} collects {b} {items} more.",
    ),
    "-": (
        "{name} gives {b} {items} to a friend.",
        "{name} loses {b} {items} on the bus.",
        "{name} sells {b} {items} at the market.",
        "A sister borrows {b} {items} and keeps them.",
        "{name} throws away {b} broken {items}.",
        "{name} leaves {b} {items} at school.",
        "Then {b} of the {items} go missing.",
        "A dog runs off with {b} {items}.",
        "{name} donates {b} {items} to the library.",
        "{name} uses up {b} {items} for a project.",
        "A cousin takes {b} {items} home.",
        "Later {name} hands {b} {items} to a teacher.",
    ),
    "*": (
        "Then the pile grows to {b} times its size.",
        "A magician makes it {b} times as many {items}.",
        "{name} works until there are {b} times as many.",
        "By Friday the number is {b} times as large.",
        "A lucky draw multiplies the {items} by {b}.",
        "A sponsor makes the collection {b} times bigger.",
        "{name} keeps trading until it is {b} times as much.",
        "With help there are soon {b} times as many {items}.",
        "After a good deal {name} has {b} times as many.",
        "The club tops it up to {b} times the number.",
    ),
    "/": (
        "{name} shares all {items} equally among {b} people and keeps one share.",
        "{name} sorts the {items} into {b} equal bags and keeps one bag.",
        "The {items} are split into {b} equal parts and one part stays.",
        "{name} divides the pile by {b} and keeps a single part.",
        "Only one out of {b} equal heaps is kept.",
        "{name} puts the {items} in {b} equal rows and keeps one row.",
        "A storm leaves just one of {b} equal shares.",
        "{b} friends split the {items} evenly and {name} is one of them.",
        "{name} packs {b} equal boxes and keeps only one box.",
        "The {items} are dealt to {b} equal teams and {name} keeps one part.",
    ),
}

# Each sentence of a worked answer is put together from several choices: a lead, a clause form, a
# name or pronoun, a noun, an operator and a word for equality. So neighbouring tokens must agree.
# The likelier choice stands first.
OPENING_LEADS = ("First", "Now", "At this point", "In this step")
LEADS = ("Then", "Next", "After that", "Now", "So here", "In this step", "At this point")
THINGS = ("{items}", "of them", "{items} in hand", "in total")
OPERATORS = {"+": ("+", "plus"), "-": ("-", "minus"), "*": ("x", "times"), "/": ("/", "divided by")}
EQUALS = ("is", "equals", "makes", "gives")
# The old value {a}, the operand {b} and the result {c} stand in another order in each form, and the
# forms differ in length.
FORMS = (
    "we see that {a} {op} {b} {eq} {c} {things}.",
    "the count becomes {c} {things}, because {a} {op} {b} {eq} {c}.",
    "{owner} has {a} {op} {b} which {eq} {c} {things}.",
    "there are {c} {things}, as {a} {op} {b} {eq} {c}.",
)
FORMS_BY_OPERATION = {
    "+": (
        "adding {b} to the {a} {items} leaves {whom} with {c} {things}.",
        "{owner} gets {b} on top of {a} and holds {c} {things}.",
        "with {b} more than {a} {owner} has {c} {things}.",
    ),
    "-": (
        "taking {b} from the {a} {items} leaves {whom} with {c} {things}.",
        "{owner} gives up {b} out of {a} and holds {c} {things}.",
        "with {b} fewer than {a} {owner} has {c} {things}.",
    ),
    "*": (
        "{owner} counts {b} sets of {a} and holds {c} {things}.",
        "with {b} lots of {a} {owner} has {c} {things}.",
        "taking {b} times the {a} {items} leaves {whom} with {c} {things}.",
    ),
    "/": (
        "{owner} keeps one in {b} out of {a} and holds {c} {things}.",
        "cutting the {a} {items} by {b} leaves {whom} with {c} {things}.",
        "with one of {b} parts of {a} {owner} has {c} {things}.",
    ),
}
