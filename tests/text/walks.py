"""Random walks through the masks of a grammar, with the demo model's vocabulary."""

import random

import numpy as np

VOCAB = 49152 + 37  # rows of padding, and no multiple of 32
EOS = 2


def new_row():
    return np.full((VOCAB + 31) // 32, -1, np.int32)


def allowed(matcher):
    row = new_row()
    matcher.fill_mask(row)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def walk(matcher, seed, longest=600):
    """Random tokens that the masks allow, EOS apart where there is a choice, up to the grammar's end."""
    chance, ids = random.Random(seed), []
    while not matcher.is_finished:
        choices = allowed(matcher)
        if len(choices) > 1 and matcher.is_accepting and chance.random() < 0.5:
            choices = [EOS] if EOS in choices else choices
        token_id = chance.choice(choices)
        matcher.advance(token_id)
        if token_id == EOS:
            break
        ids.append(token_id)
        assert len(ids) <= longest
    return ids
