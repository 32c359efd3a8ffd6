"""The largest batch and the longest rows that fit into memory."""

from __future__ import annotations

import math
from collections.abc import Callable

from finetune.plan.layers import layer_types
from finetune.plan.predict import Predictor
from finetune.plan.settings import StepSettings, with_length, with_rows

# The largest batch that the plan searches for.
MOST_ROWS = 1024
# Lengths of rows are searched in multiples of this number of tokens.
STRIDE = 64
# Layers whose memory is known after a few tokens. Those that pass a state from block to block of a row take minutes.
_ATTENTION_LAYERS = {"all", "full_attention", "sliding_attention", "chunked_attention"}


def largest_batch(predictor: Predictor, settings: StepSettings, limit: float, exact: bool = False) -> int:
    """The largest batch, in rows of the settings' length, that fits; at most `MOST_ROWS`.

    Args:
        predictor: Predicts the memory.
        settings: The settings of a step.
        limit: Bytes of memory.
        exact: False: takes the largest batch that certainly fits, without trying larger ones.
    """

    def required(rows: int) -> int:
        return predictor.required_memory(with_rows(settings, rows)).total

    return _largest_within(required, limit, max(2, settings.batch.rows), MOST_ROWS, tries=3 if exact else 0)


def longest_rows(predictor: Predictor, settings: StepSettings, limit: float) -> int:
    """The longest rows in tokens, a multiple of 64, for which the settings' batch fits and which the base can read.

    It is 0 if no rows fit, and for bases with layers other than attention, which are not searched.
    """
    if set(layer_types(predictor.config)) - _ATTENTION_LAYERS:
        return 0
    text = predictor.config.get_text_config()
    most = int(getattr(text, "max_position_embeddings", 0) or 8192) // STRIDE

    def required(strides: int) -> int:
        return predictor.required_memory(with_length(settings, strides * STRIDE)).total

    start = min(most, max(1, settings.batch.length // STRIDE))
    return _largest_within(required, limit, start, most, tries=1) * STRIDE


def _largest_within(required: Callable[[int], int], limit: float, start: int, most: int, tries: int) -> int:
    """A number for which `required` is within the limit, close to the largest one; 0 if there is none.

    `required` is convex: the maximum of lines (in rows) or parabolas (in length). So between two numbers it lies below
    their chord, and the number at which the chord meets the limit is within it.

    Args:
        required: Bytes for a number.
        limit: The most bytes.
        start: The number to begin with.
        most: The largest number to consider.
        tries: The most numbers beyond the chord to try; each of them shortens the chord.
    """
    low, high = 0, start
    while (fits := required(high) <= limit) and high < most:
        low, high = high, min(most, 4 * high)
    if fits:
        return high
    while low == 0 and high > 1:  # smaller than the start
        if required(half := high // 2) <= limit:
            low = half
        else:
            high = half
    while low:
        share = (limit - required(low)) / (required(high) - required(low))
        guess = low + math.floor(share * (high - low))
        if tries == 0 or high - low == 1:
            return guess
        tries -= 1
        guess = min(high - 1, guess + 1)
        if required(guess) <= limit:
            low = guess
        else:
            low, high = max(low, guess - 1), guess
    return 0
