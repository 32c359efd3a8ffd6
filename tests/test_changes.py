"""Changes of a recipe between two starts of a run: which are allowed, in the exact words; none is silent."""

import copy
import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.recipe.diff import check_changes, digests
from finetune.recipe.load import Recipe, load_recipe
from finetune.recipe.schema import DataSection, DataSource, ModelSection
from finetune.recipe.upstream_types import upstream_keys
from finetune.recipe.yaml_scalars import scalar_text
from finetune.system.errors import RunError

Write = Callable[..., Path]
ROWS = str(Path(__file__).parents[1] / "data" / "chat_sample.jsonl")
OTHER_ROWS = "the rows of data.train are not those that the run was trained on"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def going_on(old: Recipe | str, new: Recipe, same_rows: bool = True, processes: tuple[int, int] = (1, 1)) -> list[str]:
    """The lines logged when a run is resumed with another recipe, one for each change."""
    saved = Path("saved.yaml")
    saved.write_text(old if isinstance(old, str) else old.to_yaml(), encoding="utf-8")
    said: list[str] = []
    known = None if isinstance(old, str) else digests(old)
    check_changes(saved, new, said.append, same_rows, processes, known)
    assert len(said) <= 1
    assert all(line.startswith("resuming with changes: ") and "\n" not in line for line in said)
    return said[0].removeprefix("resuming with changes: ").split("; ") if said else []


def refusal(*arguments: Any, **options: Any) -> str:
    """The refused change, without the words that all of these messages share."""
    with pytest.raises(RunError) as caught:
        going_on(*arguments, **options)
    before, after = "training.resume_from_checkpoint: ", ", with which the checkpoint cannot be resumed; "
    text, _, cure = str(caught.value).removeprefix(before).partition(after)
    assert str(caught.value) == f"{before}{text}{after}{cure}"
    assert "\n" not in text
    assert cure.endswith(", or train anew in another training.output_dir")
    cures = {"write the old values": text != OTHER_ROWS, "restore the old rows": OTHER_ROWS in text}
    assert cure.split(", or ")[0] == " and ".join(name for name, there in cures.items() if there)
    return text


@pytest.fixture
def recipe(write_recipe: Write) -> Recipe:
    return load_recipe(write_recipe())


REFUSED = [
    ("model.name_or_path=random:gemma", "random:gemma3", "random:gemma"),
    ("model.dtype=float32", "auto", "float32"),
    ("model.chat_template=chatml", "null", "chatml"),
    ("model.system_role=fold", "template", "fold"),
    ("lora.r=32", "4", "32"),
    ("lora.lora_alpha=9", "8", "9"),
    ("lora.use_rslora=true", "false", "true"),
    ("lora.target_modules=[q_proj, v_proj]", "all-linear", "[q_proj, v_proj]"),
    ("lora.trainable_token_indices=[4, 5]", "auto", "[4, 5]"),
    ("lora.rank_pattern={q_proj: 2}", "null", "{q_proj: 2}"),
    ("lora.init_lora_weights=pissa", "true", "pissa"),
    ("lora.init_lora_weights=mica", "true", "mica"),
    ("training.seed=1", "42", "1"),
    ("training.data_seed=1", "null", "1"),
    ("training.max_length=64", "128", "64"),
    ("training.packing=true", "false", "true"),
    ("training.packing_strategy=bfd_split", "bfd", "bfd_split"),
    ("training.shuffle_dataset=true", "false", "true"),
    ("training.train_sampling_strategy=sequential", "random", "sequential"),
    ("training.dataloader_drop_last=true", "false", "true"),
    ("training.auto_find_batch_size=true", "false", "true"),
    ("training.optim=adafactor", "adamw_torch_fused", "adafactor"),
]
NAMED = [
    ("model.attn_implementation=eager", "null", "eager"),
    ("model.trust_remote_code=true", "false", "true"),
    ("lora.lora_dropout=0.1", "0", "0.1"),
    ("lora.init_lora_weights=gaussian", "true", "gaussian"),
    ("training.learning_rate=1e-4", "0.001", "0.0001"),
    ("training.lr_scheduler_type=cosine", "linear", "cosine"),
    ("training.max_steps=9", "4", "9"),
    ("training.num_train_epochs=1.5", "3", "1.5"),
    ("training.weight_decay=0.1", "0", "0.1"),
    ("training.gradient_checkpointing=true", "false", "true"),
    ("training.bf16=true", "null", "true"),
    ("training.save_total_limit=2", "null", "2"),
    ("training.save_strategy=steps", "no", "steps"),
    ("training.report_to=[tensorboard]", "none", "[tensorboard]"),
    ("training.run_name=the second", "null", '"the second"'),
    ("training.ignore_data_skip=true", "false", "true"),
    ("data.seed=3", "42", "3"),
    ("data.on_bad_row=skip", "error", "skip"),
    ("data.train.0.samples=9", "null", "9"),
    (
        f"data.train=[{{path: {ROWS}}}, {{path: rows.jsonl}}]",
        f"[{scalar_text(ROWS)}]",
        f"[{scalar_text(ROWS)}, rows.jsonl]",
    ),
    ("data.eval=[{path: rows.jsonl}]", "null", "[rows.jsonl]"),
    ("data.eval_fraction=0.1", "null", "0.1"),
]


def changed(write_recipe: Write, override: str) -> Recipe:
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    return load_recipe(write_recipe(), [override])


@pytest.mark.parametrize(("override", "was", "now"), REFUSED)
def test_what_the_checkpoint_cannot_go_on_with(
    recipe: Recipe, write_recipe: Write, override: str, was: str, now: str
) -> None:
    after = changed(write_recipe, override)
    key = override.partition("=")[0]
    assert refusal(recipe, after) == f"{key} was {was} and is {now}"
    assert refusal(after, recipe) == f"{key} was {now} and is {was}"


@pytest.mark.parametrize(("override", "was", "now"), NAMED)
def test_what_is_said(recipe: Recipe, write_recipe: Write, override: str, was: str, now: str) -> None:
    after = changed(write_recipe, override)
    key = override.partition("=")[0]
    assert going_on(recipe, after) == [f"{key} {was} -> {now}"]
    assert going_on(after, recipe) == [f"{key} {now} -> {was}"]


@pytest.mark.parametrize("same_rows", [True, False])
def test_what_has_not_changed_is_not_spoken_of(recipe: Recipe, write_recipe: Write, same_rows: bool) -> None:
    """The old recipe as it was written, on the same rows; on others, only these."""
    again = load_recipe(write_recipe())
    if same_rows:
        assert going_on(recipe, again) == []
    else:
        assert refusal(recipe, again, same_rows=False) == OTHER_ROWS


def test_where_it_is_written_and_its_output_do_not_matter(recipe: Recipe, write_recipe: Write) -> None:
    after = write_recipe(
        "other.yaml",
        training={"output_dir": "./run", "resume_from_checkpoint": True, "disable_tqdm": True},
        export={"formats": ["bf16"]},
    )
    assert going_on(recipe, load_recipe(after)) == []


def test_nothing_is_checked_where_no_recipe_was_saved(recipe: Recipe) -> None:
    said: list[str] = []
    check_changes(Path("nowhere/recipe.yaml"), recipe, said.append, same_rows=False, processes=(1, 2))
    assert said == []


# ---------------------------------------------------------------------------------------------------------------
# Every key

BATCH = {"training.per_device_train_batch_size", "training.gradient_accumulation_steps"}
SILENT = {"training.output_dir", "training.resume_from_checkpoint", "training.disable_tqdm"}


@pytest.mark.slow
def test_no_key_changes_in_silence(write_recipe: Write) -> None:
    """Whatever keys upstream has: a change in each is refused or named by its key, but for three."""
    # What PyYAML reads as our own reader does.
    recipe = load_recipe(write_recipe(quantization=NF4, training={"save_strategy": "epoch"}))
    sections = {"model": ModelSection.model_fields, "data": DataSection.model_fields, **upstream_keys()}
    every = {f"{section}.{name}" for section, keys in sections.items() for name in keys}
    every |= {f"data.train.0.{name}" for name in DataSource.model_fields}
    every -= {"data.train", "data.eval"}
    refused: dict[str, str] = {}
    named: set[str] = set()
    saved = yaml.safe_load(recipe.to_yaml())
    for key in every:
        tree = here = copy.deepcopy(saved)
        *above, name = key.split(".")
        for step in above:
            here = here[int(step) if step.isdigit() else step]
        here[name] = 77  # nobody's default
        try:
            said = going_on(yaml.safe_dump(tree), recipe)
        except RunError as error:
            refused[key] = str(error)
        else:
            assert [line.startswith(f"{key} 77 -> ") for line in said] == [True] * (key not in SILENT)
            named |= {key} if said else set()
    assert refused.keys() | named | SILENT == every
    assert [key for key, text in refused.items() if f" {key} was 77 and is " not in text and key not in BATCH] == []
    assert {key for key in refused if key.startswith(("training.", "data."))} == BATCH | {
        *(f"training.{name}" for name in ("seed", "data_seed", "train_sampling_strategy", "shuffle_dataset")),
        *(f"training.{name}" for name in ("dataloader_drop_last", "max_length", "packing", "packing_strategy")),
        *(f"training.{name}" for name in ("accelerator_config", "auto_find_batch_size", "optim", "optim_args")),
    }
    assert {key for key in named if not key.startswith(("training.", "data."))} == {
        "model.attn_implementation",
        "model.trust_remote_code",
        "lora.lora_dropout",
    }


def test_a_default_that_is_written_out_is_no_change(write_recipe: Write) -> None:
    import peft
    import transformers
    import trl
    from transformers.trainer_pt_utils import AcceleratorConfig

    def fields(owner: Any) -> dict[str, Any]:
        made = {field.name: field.default_factory for field in dataclasses.fields(owner)}
        found = {field.name: field.default for field in dataclasses.fields(owner)}
        return {name: made[name]() if callable(made[name]) else found[name] for name in found}

    def written(section: str, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """A section with all defaults in it."""
        keys = upstream_keys()[section]
        return {name: getattr(defaults[name], "value", defaults[name]) for name in keys} | given

    bits = inspect.signature(transformers.BitsAndBytesConfig).parameters
    recipe = load_recipe(write_recipe(quantization=NF4))
    assert recipe.lora is not None
    accelerate = {"accelerator_config": dataclasses.asdict(AcceleratorConfig())}
    full = dataclasses.replace(
        recipe,
        training=written("training", fields(trl.SFTConfig), accelerate | recipe.training),
        lora=written("lora", fields(peft.LoraConfig), recipe.lora),
        quantization=written("quantization", {name: found.default for name, found in bits.items()}, NF4),
    )
    # Left out it is the model's type, and null is float32: no default at all.
    assert full.quantization is not None
    assert full.quantization.pop("bnb_4bit_compute_dtype") is None
    assert len(full.training) > 100
    # As if an older release, which lacked these keys, had written it.
    short = {"model": {"name_or_path": "random:gemma3"}, "data": {"train": [{"path": ROWS}]}}
    short |= {"training": recipe.training, "lora": recipe.lora, "quantization": NF4}
    for old in (recipe, yaml.safe_dump(short)):
        assert going_on(old, full) == []
    assert going_on(full, recipe) == []


def test_another_type_of_the_same_number_is_no_change(write_recipe: Write) -> None:
    one = {"learning_rate": "2e-4", "weight_decay": 0, "num_train_epochs": 3, "warmup_steps": 1, "adam_beta1": 0.90}
    other = {"learning_rate": 0.0002, "weight_decay": 0.0, "num_train_epochs": 3.0, "warmup_steps": 1.0}
    before = load_recipe(write_recipe(training=one))
    after = load_recipe(write_recipe(training=other))
    assert before.training != after.training
    assert going_on(before, after) == []
    assert going_on(after, before) == []
    # A text is not a number, and a number no truth.
    before, after = (
        load_recipe(
            write_recipe(training={"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": value}})
        )
        for value in (1, True)
    )
    assert going_on(before, after) == ["training.lr_scheduler_kwargs.num_cycles 1 -> true"]
    before, after = (load_recipe(write_recipe(training={"run_name": name})) for name in ("1", "1.0"))
    assert going_on(before, after) == ['training.run_name "1" -> "1.0"']


# ---------------------------------------------------------------------------------------------------------------
# The environment


@pytest.mark.slow
def test_what_is_read_from_the_environment(write_recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret is known by the name of its variable; of any other value a digest is kept."""
    monkeypatch.setenv("MY_API_KEY", "open sesame")
    monkeypatch.setenv("OTHER_API_KEY", "momentum=0.5")
    monkeypatch.setenv("NAME", "first")
    monkeypatch.setenv("ROWS_A_STEP", "2")

    def of(**training: Any) -> Recipe:
        written = {"project": "x ${MY_API_KEY} $${y}", "run_name": "${NAME}"}
        return load_recipe(write_recipe(training=written | training))

    before = of()
    assert before.training["project"] == "x open sesame ${y}"
    assert going_on(before, of()) == []
    monkeypatch.setenv("NAME", "second")
    monkeypatch.setenv("MY_API_KEY", "open barley")  # what it was is written down nowhere
    assert "first" not in before.to_yaml() + repr(digests(before))
    assert going_on(before, of()) == ['training.run_name another value in the environment -> "${NAME}"']
    assert going_on(before, of(run_name="first")) == []
    assert going_on(before, of(run_name="first", project="${OTHER_API_KEY}")) == [
        'training.project "x ${MY_API_KEY} $${y}" -> "${OTHER_API_KEY}"'
    ]
    after = of(optim="sgd", optim_args="${OTHER_API_KEY}")
    assert refusal(of(optim="sgd"), after) == 'training.optim_args was null and is "${OTHER_API_KEY}"'
    batch = of(run_name="first", per_device_train_batch_size="${ROWS_A_STEP}")
    assert going_on(batch, of(run_name="first")) == going_on(of(run_name="first"), batch) == []
    assert going_on(of(seed="${ROWS_A_STEP}"), of(seed=2)) == []
    monkeypatch.setenv("ROWS_A_STEP", "3")
    changed = of(run_name="first", per_device_train_batch_size="${ROWS_A_STEP}", seed="${ROWS_A_STEP}")
    with pytest.raises(RunError) as refused:
        going_on(batch, changed)
    assert str(refused.value) == (
        "training.resume_from_checkpoint: training.per_device_train_batch_size had another value in the environment, "
        "with which the checkpoint cannot be resumed; set the variable as it was, or train anew in another "
        "training.output_dir"
    )
    monkeypatch.delenv("MY_API_KEY")  # it need not be there any more
    assert going_on(before, of(run_name="first", project="mine")) == [
        'training.project "x ${MY_API_KEY} $${y}" -> mine'
    ]


# ---------------------------------------------------------------------------------------------------------------
# Several keys at once


def test_all_that_is_refused_is_told_at_once(recipe: Recipe, write_recipe: Write) -> None:
    after = load_recipe(
        write_recipe(lora={"r": 32, "lora_dropout": 0.5}, training={"seed": 1, "per_device_train_batch_size": 1}),
        ["model.dtype=float32", "data.seed=3", "training.learning_rate=1"],
    )
    with pytest.raises(RunError) as caught:
        going_on(recipe, after, same_rows=False)
    assert str(caught.value) == (
        "training.resume_from_checkpoint: model.dtype was auto and is float32; data.seed was 42 and is 3; "
        "training.seed was 42 and is 1; lora.r was 4 and is 32; a step was 2 x 1 x 1 = 2 rows and is 1 "
        "(training.per_device_train_batch_size x training.gradient_accumulation_steps x processes), with which "
        "the checkpoint cannot be resumed; write the old values, or train anew in another training.output_dir"
    )


def test_all_that_is_named_is_one_line(recipe: Recipe, write_recipe: Write) -> None:
    after = write_recipe(training={"learning_rate": 1e-4, "logging_steps": 10}, lora={"lora_dropout": 0.5})
    assert sorted(going_on(recipe, load_recipe(after))) == [
        "lora.lora_dropout 0 -> 0.5",
        "training.learning_rate 0.001 -> 0.0001",
        "training.logging_steps 1 -> 10",
    ]


@pytest.mark.parametrize("section", ["lora", "quantization"])
def test_a_section_that_comes_or_goes(write_recipe: Write, section: str) -> None:
    there = load_recipe(write_recipe(quantization=NF4))
    gone = dataclasses.replace(there, **{section: None})
    assert refusal(there, gone) == f"{section} was given and is absent"
    assert refusal(gone, there) == f"{section} was absent and is given"


def test_other_quantization_is_refused(write_recipe: Write) -> None:
    before = load_recipe(write_recipe(quantization=NF4))
    after = load_recipe(write_recipe(quantization=NF4 | {"bnb_4bit_use_double_quant": True}))
    assert refusal(before, after) == "quantization.bnb_4bit_use_double_quant was false and is true"
    # Where it is left out we give the model's type; null is float32 upstream.
    after = load_recipe(write_recipe(quantization=NF4 | {"bnb_4bit_compute_dtype": None}))
    assert refusal(before, after) == "quantization.bnb_4bit_compute_dtype was model.dtype and is null"


@pytest.mark.parametrize("keeps", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_has_its_rate_from_the_checkpoint(write_recipe: Write, keeps: str) -> None:
    def of(**training: Any) -> Recipe:
        evaluated = {"eval_strategy": "steps", "eval_steps": 1, "max_length": 128}
        return load_recipe(write_recipe(training=evaluated | training), ["data.eval_fraction=0.1"])

    linear, kept = of(), of(lr_scheduler_type=keeps)
    assert refusal(linear, kept) == f"training.lr_scheduler_type was linear and is {keeps}"
    assert refusal(kept, linear) == f"training.lr_scheduler_type was {keeps} and is linear"
    options = {"lr_scheduler_type": keeps, "lr_scheduler_kwargs": {"factor": 0.5}}
    assert refusal(kept, of(**options)) == "training.lr_scheduler_kwargs was null and is {factor: 0.5}"
    slower = of(lr_scheduler_type=keeps, learning_rate=1e-5)
    assert refusal(kept, slower) == "training.learning_rate was 0.001 and is 1e-05"


def test_a_part_of_how_batches_are_made(recipe: Recipe, write_recipe: Write) -> None:
    after = load_recipe(write_recipe(training={"accelerator_config": {"even_batches": False}}))
    assert refusal(recipe, after) == "training.accelerator_config.even_batches was true and is false"


# ---------------------------------------------------------------------------------------------------------------
# The batch, the rows


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ((2, 4, 1), (2, 4, 1), None),
        ((2, 4, 1), (4, 4, 1), "8 rows and is 16"),
        ((2, 4, 1), (2, 1, 1), "8 rows and is 2"),
        ((2, 4, 1), (2, 4, 2), "8 rows and is 16"),
        ((2, 1, 8), (2, 1, 1), "16 rows and is 2"),
        ((2, 4, 1), (4, 2, 1), [("per_device_train_batch_size", 2, 4), ("gradient_accumulation_steps", 4, 2)]),
        ((2, 4, 1), (2, 2, 2), [("gradient_accumulation_steps", 4, 2), ("processes", 1, 2)]),
        ((2, 1, 4), (8, 1, 1), [("per_device_train_batch_size", 2, 8), ("processes", 4, 1)]),
    ],
)
def test_the_rows_of_a_step(
    write_recipe: Write,
    before: tuple[int, int, int],
    after: tuple[int, int, int],
    told: str | list[tuple[str, int, int]] | None,
) -> None:
    """Other factors keep the place among the rows, another product does not."""
    old, new = (
        load_recipe(write_recipe(training={"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}))
        for size, steps, _ in (before, after)
    )
    processes = (before[2], after[2])
    if isinstance(told, str):
        assert refusal(old, new, processes=processes) == (
            f"a step was {' x '.join(map(str, before))} = {told} "
            "(training.per_device_train_batch_size x training.gradient_accumulation_steps x processes)"
        )
        return
    keys = {"processes": "processes"}
    assert sorted(going_on(old, new, processes=processes)) == sorted(
        f"{keys.get(name, f'training.{name}')} {was} -> {now}" for name, was, now in told or []
    )


@pytest.mark.parametrize(("override", "was", "now"), [change for change in NAMED if change[0].startswith("data.")])
def test_on_other_rows_the_keys_that_made_them_so_are_refused(
    recipe: Recipe, write_recipe: Write, override: str, was: str, now: str
) -> None:
    told = f"{override.partition('=')[0]} was {was} and is {now}"
    # Rows that are evaluated on are not trained on; but the files may be others as well.
    told += f"; {OTHER_ROWS}" if override.startswith("data.eval=") else ""
    assert refusal(recipe, changed(write_recipe, override), same_rows=False) == told


@pytest.mark.parametrize(
    ("override", "explained"),
    [
        ("model.chat_template=chatml", True),
        ("training.max_length=64", True),
        ("lora.r=8", False),
        ("training.per_device_train_batch_size=1", False),
    ],
)
def test_other_rows_are_told_beside_what_cannot_have_made_them_so(
    recipe: Recipe, write_recipe: Write, override: str, explained: bool
) -> None:
    after = changed(write_recipe, override)
    assert refusal(recipe, after, same_rows=False).endswith(f"; {OTHER_ROWS}") != explained


def test_what_is_refused_for_its_rows_leaves_other_changes_unsaid(recipe: Recipe, write_recipe: Write) -> None:
    after = load_recipe(write_recipe(), ["data.on_bad_row=skip", "training.learning_rate=1"])
    assert refusal(recipe, after, same_rows=False) == "data.on_bad_row was error and is skip"


# ---------------------------------------------------------------------------------------------------------------
# A recipe that no run wrote


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it lacks one of the sections model, data, training"),
        ("model", "it lacks one of the sections model, data, training"),
        ("[1]", "it lacks one of the sections model, data, training"),
        ("model: {}\ndata: {}\n", "it lacks one of the sections model, data, training"),
        ("model: 1\ndata: {}\ntraining: {}\n", "model is not a map"),
        ("model: {}\ndata: {}\ntraining: {}\n", "data.train is not a list"),
        ("model: {}\ndata: {train: [1]}\ntraining: {}\n", "data.train is not a map"),
        ("model: {}\ndata: {train: []}\ntraining: \n", "training is not a map"),
        ("model: {}\ndata: {train: []}\ntraining: {}\nlora: \n", "lora is not a map"),
        (
            "model: {}\ndata: {train: []}\ntraining: {gradient_accumulation_steps: x}\n",
            "training.per_device_train_batch_size or training.gradient_accumulation_steps is not a number",
        ),
        ("model: [", None),
        ("model: &a [*a]", None),
        ("a: \0", None),
        ("? {a: 1}\n: 1\n", "it lacks one of the sections model, data, training"),
    ],
)
def test_a_damaged_recipe_is_named(recipe: Recipe, text: str, reason: str | None) -> None:
    with pytest.raises(RunError) as caught:
        going_on(text, recipe)
    told = str(caught.value)
    assert "\n" not in told
    assert told.startswith(f"saved.yaml is damaged: {reason or ''}")
    assert told.endswith("; restore the file that the run wrote, or train anew in another training.output_dir")


def test_a_recipe_that_is_no_text(recipe: Recipe) -> None:
    Path("saved.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(RunError, match=r"^saved.yaml is damaged: 'utf-8' codec can't decode"):
        check_changes(Path("saved.yaml"), recipe, print, same_rows=True, processes=(1, 1))
