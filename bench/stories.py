"""Text to train on: stories from a seeded grammar, whose entropy is known exactly.

    ann takes the red key . tom takes the old map . ann gives the red key to eve .
    where is the red key ? with eve . …

Who holds what has to be looked up where the story last told it, tens to hundreds of words back: a
model that knows the words and the grammar alone stays some tenths of a nat above one that looks.
Every story is drawn by independent choices, and no two sequences of choices give the same text. So
the sum of their logarithms is the logarithm of its probability, and a model's mean loss cannot, but
by luck, be below its mean over the words: the entropy of the text.
"""

import math
import random

NAMES = (
    "ann", "bob", "eve", "ida", "jim", "kay", "leo", "max",
    "ned", "ola", "pam", "ron", "sue", "tom", "uma", "wim",
)  # fmt: skip
KINDS = ("big", "blue", "green", "new", "old", "red", "small", "white")
THINGS = ("book", "coin", "cup", "hat", "key", "lamp", "map", "ring")
OTHERS = ("<story>", ".", "?", "takes", "gives", "to", "the", "where", "is", "with")
WORDS = (*OTHERS, *NAMES, *KINDS, *THINGS)
NUMBER = {word: i for i, word in enumerate(WORDS)}
ITEMS = [f"the {kind} {thing}" for kind in KINDS for thing in THINGS]

TAKES, GIVES = 0.4, 0.3  # how often someone takes something, gives it away; else it is asked for


def numbers(text):
    """Words to tokens."""
    return [NUMBER[word] for word in text.split()]


def story(rng, length):
    """(tokens, nats): a story of `length` tokens, its last sentence cut off, and -log p of it.

    The cut sentence counts in part: as many of its nats as of its tokens are there.
    """
    tokens, nats = [NUMBER["<story>"]], 0.0  # the first token is given, not predicted
    holder, held = {}, []  # item -> name, and the items in the order in which they turned up
    a_name, an_item = math.log(len(NAMES)), math.log(len(ITEMS))
    while len(tokens) < length:
        draw = rng.random() if held else 0.0
        cost = 0.0 if not held else -math.log(TAKES)
        if draw < TAKES:
            item, name = rng.randrange(len(ITEMS)), rng.randrange(len(NAMES))
            if item not in holder:
                held.append(item)
            holder[item] = name
            sentence = _TAKES[name][item]
            cost += an_item + a_name
        else:
            item = held[rng.randrange(len(held))]
            cost = math.log(len(held))
            if draw < TAKES + GIVES:
                name = rng.randrange(len(NAMES))
                sentence = _GIVES[holder[item]][item] + _TO[name]
                holder[item] = name
                cost += a_name - math.log(GIVES)
            else:
                sentence = _WHERE[item] + _WITH[holder[item]]
                cost -= math.log(1 - TAKES - GIVES)
        there = min(len(sentence), length - len(tokens))
        tokens += sentence
        nats += cost * there / len(sentence)
    return tokens[:length], nats


_TAKES = [[numbers(f"{name} takes {item} .") for item in ITEMS] for name in NAMES]
_GIVES = [[numbers(f"{name} gives {item}") for item in ITEMS] for name in NAMES]
_TO = [numbers(f"to {name} .") for name in NAMES]
_WHERE = [numbers(f"where is {item} ?") for item in ITEMS]
_WITH = [numbers(f"with {name} .") for name in NAMES]


def write(count, length, seed):
    """(bytes of count · length tokens, nats a predicted token): stories one after the other."""
    rng, nats, text = random.Random(seed), 0.0, bytearray()
    for _ in range(count):
        tokens, cost = story(rng, length)
        text += bytes(tokens)
        nats += cost
    return bytes(text), nats / (count * (length - 1))


def read(tokens):
    """Tokens to words."""
    return " ".join(WORDS[t] for t in tokens)
