"""The recipe's own sections: their keys, the types of their values, what each key means."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from finetune.recipe.export_formats import FORMATS

_SECTION = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class ModelSection(BaseModel):
    """The base model, and how it is loaded."""

    model_config = _SECTION

    name_or_path: str
    """Hub id, directory, `.gguf` file, `package:MODULE`, or `random:gemma|gemma2|gemma3|llama`."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The type that the weights are loaded in; auto: what the checkpoint and this device allow."""
    attn_implementation: str | None = None
    """As in `from_pretrained`; absent: what is right for the model and this device."""
    chat_template: str | None = None
    """A shipped template's name or a `.jinja` file; absent: the tokenizer's own."""
    system_role: Literal["template", "fold", "turn", "error"] = "template"
    """What becomes of a system message: as the template does, part of the first user turn, a turn, refused."""
    adapter: str | None = None
    """A run, or a folder with a LoRA adapter, to go on training; it brings its own `lora` section and chat template."""
    trust_remote_code: bool = False
    """Whether code from the model's repository may run."""


class DataSource(BaseModel):
    """One place that rows come from."""

    model_config = _SECTION

    path: str
    """A file, a glob, or a dataset on the Hub."""
    config: str | None = None
    """The configuration of a dataset on the Hub."""
    split: str = "train"
    """The split of a dataset on the Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    format: Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"] | None = None
    """How a row is read; absent: found from the columns."""
    columns: dict[str, str] = {}
    """Our field to a column of the source, or to a format string over the row."""
    raw: bool = False
    """Whether prompt_completion rows pass by the chat template."""
    filter: dict[str, str | int | float | bool | list[str | int | float | bool | None] | None] = {}
    """A column to the value, or the list of values, that a row must have to be read."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """How often each row is used: 0.5 half of the rows, 2 each twice. Of streams: the share of the mixture."""
    samples: Annotated[int, Field(gt=0)] | None = None
    """How many rows are used, drawn by `data.seed`; more than there are: some several times."""
    streaming: bool = False
    """Whether rows are read while training, and not before."""


class DataSection(BaseModel):
    """What is trained and evaluated on, and what becomes of rows that do not fit."""

    model_config = _SECTION

    train: Annotated[list[DataSource], Field(min_length=1)]
    """Where the rows to train on come from."""
    eval: list[DataSource] = []
    """Where the rows to evaluate on come from."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The share of the training rows that is set aside to evaluate on, when `eval` is absent."""
    train_on: Literal["assistant", "last_assistant", "completion", "all"] | None = None
    """The tokens that are trained on; absent: assistant, completion or all, as the format says."""
    on_overflow: Literal["truncate_turns", "split", "drop", "error"] = "truncate_turns"
    """What becomes of a row longer than `training.max_length`."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What becomes of a row that can't be read, or whose labels can't be proved."""
    merge_same_role: bool = False
    """Whether messages of one role that follow each other become one."""
    deduplicate: bool = True
    """Whether exact duplicates, and training rows that are also evaluated on, are dropped."""
    seed: int = 42
    """Seed of the split and the mixture."""


class ImatrixDataSection(BaseModel):
    """What an importance matrix is made from."""

    model_config = _SECTION

    path: str | None = None
    """A file of rows or text, or a matrix (`.gguf`, `.dat`); absent: the conversations that the run was trained on."""
    rows: PositiveInt = 256
    """How many rows at most."""
    max_tokens: PositiveInt = 32768
    """How many tokens at most, of all rows together."""


class ExportSection(BaseModel):
    """What `finetune export` writes of a run where its flags do not say otherwise."""

    model_config = _SECTION

    formats: list[Literal[FORMATS]] = []  # type: ignore[valid-type]
    """The formats, each a folder; all GGUF files are in one."""
    base: Literal["original", "dequantised"] = "original"
    """What the adapter of a run on a quantised base is merged into."""
    imatrix: Literal["auto", "always", "never"] = "auto"
    """Whether GGUF files are quantised by an importance matrix; auto keeps the better of both."""
    imatrix_data: ImatrixDataSection | None = None
    """What that matrix is made from; absent: the conversations that the run was trained on."""
    gate: dict[
        Literal["max_kl", "max_kl_p99", "min_top1", "max_perplexity_ratio"], Annotated[float, Field(ge=0)]
    ] = {}
    """Limits that a format must keep."""


class PricesSection(BaseModel):
    """US dollars for a million tokens."""

    model_config = _SECTION

    input: Annotated[float, Field(ge=0)]
    """Of what the judge reads."""
    output: Annotated[float, Field(ge=0)]
    """Of what it writes."""


class JudgeSection(BaseModel):
    """The model that compares answers with a reference's, behind any endpoint that speaks OpenAI's chat protocol."""

    model_config = _SECTION

    base_url: Annotated[str, Field(pattern=r"^https?://")]
    """The endpoint, up to `/v1`; its key is read from OPENAI_API_KEY."""
    model: str
    """The judge's name there."""
    reference: str | None = None
    """A JSONL file with the reference's answers; absent: those of the model given to --compare."""
    language: Literal["en", "ja"] = "en"
    """The language of the judge's instructions."""
    workers: PositiveInt = 8
    """How many requests are under way at a time; 1 for a server that answers one by one."""
    max_tokens: PositiveInt = 2048
    """The length of one reply; a judge that thinks first needs room for it."""
    prices: PricesSection | None = None
    """US dollars for a million tokens, input and output, to show what it costs."""


class LmEvalSection(BaseModel):
    """Tasks of the Language Model Evaluation Harness (`pip install 'finetune[lm-eval]'`)."""

    model_config = _SECTION

    tasks: Annotated[list[str], Field(min_length=1)]
    """Their names there."""


class EvaluateSection(BaseModel):
    """What `finetune evaluate` asks a model."""

    model_config = _SECTION

    prompts: str | None = None
    """A JSONL file of prompts; absent: the prompts of the held-out rows."""
    max_new_tokens: PositiveInt = 512
    """Where an answer is cut off."""
    limit: PositiveInt | None = None
    """How many rows and prompts at most."""
    judge: JudgeSection | None = None
    """Who compares the answers with others; absent: nobody."""
    lm_eval: LmEvalSection | None = None
    """Tasks of the evaluation harness; absent: none."""


class HubSection(BaseModel):
    """Where on the Hub a run is put, at its end and, if asked for, while it goes on."""

    model_config = _SECTION

    repo_id: str | None = None
    """The repository, owner/name, which is made if it is not there; absent: nothing is put on the Hub."""
    private: bool = False
    """Whether a repository that is made is private."""
    base_model: str | None = None
    """The Hub id of a base that `model.name_or_path` finds on this machine."""
    every_n_saves: PositiveInt | None = None
    """After how many checkpoints one is put on the Hub; absent: the finished run alone."""
