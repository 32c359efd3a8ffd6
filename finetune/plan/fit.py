"""A recipe and a card to a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trl import SFTConfig

from finetune.base import ModelError, quiet
from finetune.cards import CARDS, GIB, Card, here
from finetune.plan.facts import PlanError, config_of
from finetune.plan.predict import Need, Predictor, Setting
from finetune.plan.rows import Rows, rows_of
from finetune.plan.step import Batch, dtypes
from finetune.recipe import Recipe

Say = Callable[[str], None]
# A row is cut to a whole number of these when a shorter length is looked for.
_STRIDE = 64
# What a check may be wrong by: a run that lacks less is left to the rehearsal of its longest batch, which measures.
_DOUBT = 0.9
# Of `training`, what decides about memory and steps.
_MEMORY = [
    *(
        "output_dir",
        "optim",
        "optim_args",
        "optim_target_modules",
        "learning_rate",
        "weight_decay",
        "adam_beta1",
    ),
    *(
        "adam_beta2",
        "adam_epsilon",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "max_grad_norm",
    ),
    *(
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "max_steps",
        "packing",
    ),
    *("packing_strategy", "padding_free", "pad_to_multiple_of"),
]


@dataclass
class Fit:
    """A card, what it must have, and what it could hold beside."""

    card: Card
    need: Need | None
    refused: str = ""  # why the recipe cannot run on it at all
    rows: int = 0  # the largest batch of the recipe's length
    length: int = 0  # the longest rows of the recipe's batch; only where it was looked for
    how: str = ""  # of several cards: ddp or fsdp

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.need is not None and self.need.total <= self.card.memory


@dataclass
class Plan:
    """What is known of a recipe before it is run."""

    recipe: Recipe
    setting: Setting
    rows: Rows | None  # None where the rows are not at hand
    fit: Fit  # the card that was asked for
    others: list[Fit]  # each known card
    advice: list[tuple[str, int]] = field(default_factory=list)  # a change, and the bytes with it
    layout: list[Fit] = field(default_factory=list)  # of several cards, each way to use them
    flops: float = 0.0  # of the longest batch
    steps: int | None = None
    computes: str = "no"
    measured: list[float] = field(default_factory=list)  # seconds of real steps

    @property
    def fits(self) -> bool:
        """Whether it fits the card that was asked for; several of them: in one way or the other."""
        return any(fit.fits for fit in self.layout or [self.fit])


def arguments_of(recipe: Recipe) -> SFTConfig:
    """What decides about memory and steps of the recipe's `training`, as trl takes it, without asking for a device."""
    values = {name: recipe.training[name] for name in _MEMORY if name in recipe.training}
    if values.get("padding_free") and not values.get("packing"):
        values["max_length"] = None  # as `launch.training_arguments`
    with quiet():
        return SFTConfig(**values, report_to="none", use_cpu=True, bf16=False)


def setting_of(recipe: Recipe, arguments: Any, rows: Rows | None) -> Setting:
    """The recipe's own longest batch and settings."""
    count = int(arguments.per_device_train_batch_size)
    packs = bool(arguments.packing)
    flat = bool(arguments.padding_free) or (packs and arguments.packing_strategy in ("bfd", "bfd_split"))
    limit = recipe.training.get("max_length", 1024)
    if rows is not None and not packs:
        limit = rows.longest
        count = min(count, rows.count)
    if limit is None:
        raise PlanError("training.max_length: is null and the rows are not at hand; write a length")
    multiple = arguments.pad_to_multiple_of or 1
    length = math.ceil(limit / multiple) * multiple
    trained = rows.trained(count) if rows is not None and not packs else None
    batch = Batch(count, length, padded=count > 1 and not flat, packed=flat, trained=trained)
    optim = str(getattr(arguments.optim, "value", arguments.optim))
    return Setting(
        recipe,
        batch,
        optim,
        bool(arguments.gradient_checkpointing),
        int(arguments.gradient_accumulation_steps),
    )


def plan(
    recipe: Recipe,
    card: Card | None = None,
    cards: int = 1,
    say: Say = lambda line: None,
    use_rows: bool = True,
) -> Plan:
    """What the recipe needs on a card, and on each known one.

    Args:
        recipe: It is not run, and no weights are read.
        card: Absent: this machine's.
        cards: How many of them.
        say: Told what becomes of the rows, where they are at hand.
        use_rows: Whether they are looked for.

    Raises:
        PlanError, ModelError: The card cannot compute as the recipe says, or the base is not known.
    """
    card = card or here()
    arguments, config = arguments_of(recipe), config_of(recipe.model)
    rows = rows_of(recipe, say) if use_rows else None
    setting = setting_of(recipe, arguments, rows)
    predictors: dict[Any, Predictor] = {}

    def predictor(place: Card) -> Predictor:
        kind = (place.cuda, dtypes(recipe, place.device))
        if kind not in predictors:
            predictors[kind] = Predictor(config, place, arguments)
        return predictors[kind]

    own = predictor(card)
    fit = Fit(card, own.need(setting), rows=_largest_batch(own, setting, card, sure=True))
    fit.length = _longest_row(own, setting, card, config)
    made = Plan(
        recipe, setting, rows, fit, [], flops=own.step(setting).flops, computes=dtypes(recipe, card.device)[2]
    )
    if cards > 1:
        for how in ("ddp", "fsdp"):
            spread = replace(setting, cards=cards, sharded=how == "fsdp")
            made.layout.append(Fit(card, own.need(spread), how=how))
    if rows is not None:
        made.steps = _steps(arguments, rows, recipe, cards)
    elif arguments.max_steps > 0:
        made.steps = int(arguments.max_steps)
    asked = replace(setting, cards=cards, sharded=cards > 1)
    for other in CARDS.values():
        try:
            its = predictor(other)
        except ModelError as error:
            made.others.append(Fit(other, None, str(error)))
        else:
            made.others.append(Fit(other, its.need(asked), rows=_largest_batch(its, asked, other)))
    if not made.fits:
        made.advice = advice(own, setting, card, config)
    return made


def _steps(arguments: Any, rows: Rows, recipe: Recipe, cards: int) -> int:
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    count = rows.count
    if arguments.packing:
        count = math.ceil(rows.tokens / int(recipe.training.get("max_length", 1024)))
    batches = math.ceil(count / (arguments.per_device_train_batch_size * cards))
    steps: int = math.ceil(batches / int(arguments.gradient_accumulation_steps))
    epochs: float = arguments.num_train_epochs
    return math.ceil(steps * epochs)


def _largest_batch(own: Predictor, setting: Setting, card: Card, sure: bool = False) -> int:
    """The largest batch that fits; 4096 stands for any; `sure`: the next one is tried, too."""

    def total(rows: int) -> int:
        return own.need(_of_rows(setting, rows)).total

    return _edge(total, card.memory, max(2, setting.batch.rows), 4096, tries=3 if sure else 0)


def _longest_row(own: Predictor, setting: Setting, card: Card, config: Any) -> int:
    """The longest rows of the recipe's batch that fit, in steps of 64 tokens, and that the base knows."""
    most = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 8192) // _STRIDE

    def total(strides: int) -> int:
        return own.need(_of_length(setting, strides * _STRIDE)).total

    start = min(most, max(1, setting.batch.length // _STRIDE))
    return _edge(total, card.memory, start, most, tries=1) * _STRIDE


def _edge(total: Callable[[int], int], limit: float, start: int, most: int, tries: int) -> int:
    """About the largest number, at most `most`, for which `total` keeps the limit; 0: none. It does for the answer.

    `total` is the maximum of some lines (of a length, of parabolas), so between two points it is below their chord, and
    where that meets the limit is safe. After each of `tries` the chord is a shorter one.
    """
    low, high = 0, start
    while (fits := total(high) <= limit) and high < most:
        low, high = high, min(most, 2 * high)
    if fits:
        return high
    while low == 0 and high > 1:  # below the start
        if total(half := high // 2) <= limit:
            low = half
        else:
            high = half
    while low:
        share = (limit - total(low)) / (total(high) - total(low))
        guess = low + math.floor(share * (high - low))
        if tries == 0 or high - low == 1:
            return guess
        tries -= 1
        guess = min(high - 1, guess + 1)  # one more than is safe
        if total(guess) <= limit:
            low = guess
        else:
            low, high = max(low, guess - 1), guess
    return 0


def _of_rows(setting: Setting, rows: int) -> Setting:
    padded = rows > 1 and not setting.batch.packed
    share = setting.batch.trained
    trained = None if share is None else math.ceil(share * rows / setting.batch.rows)
    return replace(setting, batch=replace(setting.batch, rows=rows, padded=padded, trained=trained))


def _of_length(setting: Setting, length: int) -> Setting:
    share = setting.batch.trained
    trained = None if share is None else math.ceil(share * length / setting.batch.length)
    return replace(setting, batch=replace(setting.batch, length=length, trained=trained))


# ---------------------------------------------------------------------------------------------------------------
# What to change


def advice(own: Predictor, setting: Setting, card: Card, config: Any) -> list[tuple[str, int]]:
    """Up to three changes of which each makes it fit, those first that change the result least."""
    found: list[tuple[str, int]] = []
    for text, changed in _changes(own, setting, card, config):
        if (need := own.need(changed).total) <= card.memory and text not in dict(found):
            found.append((text, need))
            if len(found) == 3:
                break
    return found


def _changes(own: Predictor, setting: Setting, card: Card, config: Any) -> Iterator[tuple[str, Setting]]:
    recipe = setting.recipe
    steps: list[tuple[str, Callable[[Setting], Setting]]] = []
    if not setting.checkpointing:
        steps.append(("training.gradient_checkpointing: true", lambda s: replace(s, checkpointing=True)))
    eight = "adamw_8bit" if own.step(setting).paged or not card.cuda else "paged_adamw_8bit"
    if "8bit" not in setting.optim:
        steps.append((f"training.optim: {eight}", lambda s: replace(s, optim=eight)))
    if recipe.lora is None:
        plain = {"target_modules": "all-linear", "trainable_token_indices": None, "r": 16, "lora_alpha": 16}
        steps.append(("a lora section (r: 16)", lambda s: replace(s, recipe=replace(s.recipe, lora=plain))))
    if recipe.quantization is None:
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        loads = "a quantization section (load_in_4bit: true, bnb_4bit_quant_type: nf4)"
        if recipe.lora is not None:
            steps.append((loads, lambda s: replace(s, recipe=replace(s.recipe, quantization=bits))))
        else:
            both: dict[str, Any] = {"lora": plain, "quantization": bits}
            steps.append((f"lora and {loads}", lambda s: replace(s, recipe=replace(s.recipe, **both))))
    done: list[str] = []
    now = setting
    for text, change in steps[:1] if not setting.checkpointing else []:
        yield text, change(setting)
    yield from _smaller(own, setting, card)
    for text, change in steps:
        yield text, change(setting)
    # One alone is not enough: one after the other, with a smaller batch behind.
    for text, change in steps:
        if text.startswith("lora and"):
            continue
        now, done = change(now), [*done, text]
        yield ", ".join(done), now
        for smaller, its in _smaller(own, now, card):
            yield ", ".join([*done, smaller]), its
    for length in _shorter(setting.batch.length):
        yield f"training.max_length: {length}", _of_length(setting, length)
    for count in (2, 4, 8):
        if card.cuda:
            text = f"{count} cards with accelerate_configs/fsdp.yaml"
            yield text, replace(setting, cards=count, sharded=True, optim="adamw_torch_fused")
    for length in _shorter(setting.batch.length):
        smallest = _of_length(_of_rows(now, 1), length)
        yield ", ".join([*done, "per_device_train_batch_size: 1", f"training.max_length: {length}"]), smallest


def _smaller(own: Predictor, setting: Setting, card: Card) -> Iterator[tuple[str, Setting]]:
    """The largest part of the batch that fits, as many more of them a step: the same result."""
    rows = setting.batch.rows
    for part in (n for n in range(2, rows + 1) if rows % n == 0):
        changed = replace(_of_rows(setting, rows // part), accumulation=setting.accumulation * part)
        if own.need(changed).total <= card.memory:
            yield (
                f"training.per_device_train_batch_size: {rows // part} with training.gradient_accumulation_steps: "
                f"{setting.accumulation * part}",
                changed,
            )
            return


def _shorter(length: int) -> list[int]:
    return [cut for cut in (length * 3 // 4, length // 2, length // 4) if cut >= _STRIDE]


# ---------------------------------------------------------------------------------------------------------------
# At the start of a run


def check(recipe: Recipe, arguments: Any, dataset: Any) -> None:
    """Refuses a run for which the memory that is really free cannot suffice.

    Small runs are passed by: nothing is built where sixteen bytes a weight and a generous share a token are there.

    Args:
        recipe: What is to be run.
        arguments: Its `training`, as trl takes it.
        dataset: The prepared rows; None of a stream.

    Raises:
        PlanError: With what to change.
    """
    from finetune import ranks

    card = here(free=True)
    config = config_of(recipe.model)
    rows = Rows.of(dataset) if dataset is not None and hasattr(dataset, "__len__") else None
    setting = setting_of(recipe, arguments, rows)
    if _small(config, setting, card):
        return
    own = Predictor(config, card, arguments)
    setting = replace(setting, cards=ranks.count(), sharded=ranks.sharded())
    need = own.need(setting)
    # The context is there already.
    total = need.total - need.parts.get("context", 0) - need.parts.get("process", 0)
    if total * _DOUBT <= card.memory:
        return
    found = advice(own, replace(setting, cards=1, sharded=False), card, config) if ranks.count() == 1 else []
    write = " or ".join(text for text, _ in found) or "a smaller model.name_or_path"
    raise PlanError(
        f"this run needs about {total / GIB:.1f} GiB, and {card.name} has {card.memory / GIB:.1f} GiB free. "
        f"Write {write}; finetune plan {Path(recipe.path)} shows what takes it, --force goes on"
    )


def _small(config: Any, setting: Setting, card: Card) -> bool:
    text = config.get_text_config()
    width, depth = text.hidden_size, text.num_hidden_layers
    inner = getattr(text, "intermediate_size", None) or 4 * width
    weights = 2 * text.vocab_size * width + depth * width * (4 * width + 3 * inner)
    tokens = setting.batch.rows * setting.batch.length
    work = tokens * (
        depth * 40 * (width + inner) + 8 * setting.batch.length * depth * text.num_attention_heads
    )
    return bool(16 * weights + work + 2 * GIB <= card.memory)
