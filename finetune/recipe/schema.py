"""The sections of a recipe that are ours: keys, types, defaults, and a sentence about each key."""

import os
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from finetune.recipe.export_formats import FORMATS

# trl's default of `training.max_length` (1.16), known without importing trl.
DEFAULT_MAX_LENGTH = 1024

Method = Literal["sft", "dpo", "kto", "orpo"]
# Each method, and the class whose parameters are the keys of `training`.
CONFIGS: dict[str, str] = {
    "sft": "trl.SFTConfig",
    "dpo": "trl.DPOConfig",
    "kto": "trl.KTOConfig",
    "orpo": "trl.experimental.orpo.ORPOConfig",
}

# The columns that the formats of rows read.
Column = Literal[
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "history",
    "prompt",
    "completion",
    "question",
    "chosen",
    "rejected",
    "label",
    "text",
    "system",
    "system_prompt",
    "tools",
    "functions",
    "chat_template_kwargs",
]

_SECTION = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class ModelSection(BaseModel):
    """The base model and how it is loaded."""

    model_config = _SECTION

    name_or_path: str
    """Hub id, directory, `.gguf` file, `package:MODULE`, or `random:NAME`, a tiny model with random
    weights (gemma, gemma2, gemma3, gemma3n, gemma4, gemma4_moe, llama)."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of the loaded weights; auto: bfloat16 on GPUs that compute in it, else float16; float32 on a CPU."""
    attn_implementation: str | None = None
    """As in `from_pretrained`; absent: chosen for the model and this device."""
    chat_template: str | None = None
    """A shipped template's name or a `.jinja` file; absent: the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template (`enable_thinking`, ...) and their values, which become its saved defaults."""
    system_role: Literal["template", "fold", "turn", "error"] = "template"
    """How a system message is rendered: by the template, in the first user turn, as its own turn, or refused."""
    resize_embeddings: bool = False
    """Grows the embeddings if the tokenizer has more tokens than they have rows; the new rows are trained."""
    adapter: str | None = None
    """A run, or a folder with a LoRA adapter, to continue training; its `lora` settings and chat template are used."""
    trust_remote_code: bool = False
    """Allows code from the model's repository to run."""


class DataSource(BaseModel):
    """One source of rows."""

    model_config = _SECTION

    path: str
    """A file, a glob, or a dataset on the Hub."""
    config: str | None = None
    """The configuration of a dataset on the Hub."""
    split: str = "train"
    """The split of a dataset on the Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    format: Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "rated"] | None = None
    """The format of the rows; absent: detected from the columns."""
    columns: dict[Column, str] = {}
    """Fields of the format to columns of the source, or to format strings over the row."""
    raw: bool = False
    """Trains on prompt_completion rows as plain text, without the chat template."""
    special_tokens: bool = False
    """Lets text without a chat template spell special tokens, as rendered prompts and fill-in-the-middle do."""
    filter: dict[str, str | int | float | bool | list[str | int | float | bool | None] | None] = {}
    """Columns to the value, or list of values, that a row must have; other rows are left out."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """How often each row is used: 0.5 for half of the rows, 2 for each twice. For streams: the share of the mixture."""
    samples: Annotated[int, Field(gt=0)] | None = None
    """The number of rows, drawn by `data.seed`; if there are fewer, rows are repeated."""
    streaming: bool = False
    """Reads rows while training, not before."""
    _template: str = ""

    @property
    def name(self) -> str:
        """The path as the recipe has it, with `${NAME}`: what is shown and saved."""
        return self._template or self.path

    @property
    def place(self) -> tuple[object, ...]:
        """Where its rows come from: two sources with one place have the same rows, if they have one revision."""
        path = os.path.realpath(self.path) if os.path.exists(self.path) else self.path
        return path, self.config, self.split, self.filter

    def shown(self, text: str) -> str:
        """A text with the path or a file of the source, in which `${NAME}` stands for its value."""
        for variable in re.findall(r"\$\{(\w+)\}", self._template):
            if value := os.environ.get(variable):
                text = text.replace(value, f"${{{variable}}}")
        return text


class DataSection(BaseModel):
    """The rows to train and evaluate on, and what happens to rows that do not fit."""

    model_config = _SECTION

    train: Annotated[list[DataSource], Field(min_length=1)]
    """The sources of the training rows."""
    eval: list[DataSource] = []
    """The sources of the evaluation rows."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The share of the training rows that is held out for evaluation, where `eval` is absent."""
    train_on: Literal["assistant", "last_assistant", "completion", "all"] | None = None
    """The tokens that are trained on; absent: assistant, completion or all, by the format."""
    train_on_thinking: bool = True
    """Trains on the text of an assistant's thinking (`reasoning_content`); false: it is only fed."""
    on_overflow: Literal["truncate_turns", "split", "drop", "error"] = "truncate_turns"
    """For a row longer than `training.max_length`: keep the turns that fit, make several rows, drop it (the default of
    dpo, kto and orpo), or stop."""
    on_bad_row: Literal["error", "skip"] = "error"
    """For a row that cannot be read or whose labels cannot be proved: stop, or count it and go on."""
    merge_same_role: bool = False
    """Merges consecutive messages of one role."""
    deduplicate: bool = True
    """Drops exact duplicates and training rows that are also evaluation rows."""
    seed: int = 42
    """The seed of the held-out split and of the mixture."""


class EarlyStoppingSection(BaseModel):
    """Ends the training once its evaluations (`training.eval_strategy`) improve no more; absent: it runs to its end."""

    model_config = _SECTION

    patience: PositiveInt = 3
    """The number of evaluations in a row without an improvement after which the training ends."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """An evaluation is an improvement if its loss (or `training.metric_for_best_model`) is better than the best one so
    far by more than this."""


class ImatrixDataSection(BaseModel):
    """The text that an importance matrix is computed from."""

    model_config = _SECTION

    path: str | None = None
    """A file of rows or text, or a finished matrix (`.gguf`, `.dat`); absent: the run's training rows."""
    rows: PositiveInt = 256
    """The most rows."""
    max_tokens: PositiveInt = 32768
    """The most tokens of all rows together."""


class ExportSection(BaseModel):
    """The files that `finetune export` writes; its flags override these keys."""

    model_config = _SECTION

    formats: list[Literal[FORMATS]] = []  # type: ignore[valid-type]
    """The formats, each in its own folder; all GGUF files share one."""
    base: Literal["original", "dequantised"] = "original"
    """The base that the adapter of a QLoRA run is merged into."""
    imatrix: Literal["auto", "always", "never"] = "auto"
    """Quantises GGUF files and w4a16 with an importance matrix; auto: both ways, and the better one is kept."""
    imatrix_data: ImatrixDataSection | None = None
    """The text that the matrix is computed from; absent: the run's training rows."""
    gate: dict[Literal["max_kl", "max_kl_p99", "min_top1", "max_perplexity_ratio"], Annotated[float, Field(ge=0)]] = {}
    """Limits that each format must meet."""


class PricesSection(BaseModel):
    """US dollars per million tokens."""

    model_config = _SECTION

    input: Annotated[float, Field(ge=0)]
    """Price of the prompt."""
    output: Annotated[float, Field(ge=0)]
    """Price of the reply."""


class JudgeSection(BaseModel):
    """The model that compares answers with a reference's, behind an endpoint with OpenAI's chat API."""

    model_config = _SECTION

    base_url: Annotated[str, Field(pattern=r"^https?://")]
    """The endpoint up to `/v1`; its key is read from OPENAI_API_KEY."""
    model: str
    """The name of the judge's model there."""
    reference: str | None = None
    """A JSONL file with the reference answers; absent: the answers of the model given to --compare."""
    language: Literal["en", "ja"] = "en"
    """The language of the judge's instructions."""
    workers: PositiveInt = 8
    """The number of requests at a time; 1 for a server that answers one by one."""
    max_tokens: PositiveInt = 2048
    """The most tokens of a reply; a reasoning model needs more."""
    prices: PricesSection | None = None
    """US dollars per million tokens, to show the cost."""


class ServerSection(BaseModel):
    """A server with OpenAI's chat API that serves the evaluated model: vLLM, SGLang, llama.cpp's, Ollama."""

    model_config = _SECTION

    base_url: Annotated[str, Field(pattern=r"^https?://")]
    """The server up to `/v1`; its key is read from FINETUNE_SERVER_KEY."""
    model: str | None = None
    """The name of the model there; absent: the only one, or the one named as the run."""
    workers: PositiveInt = 8
    """The number of requests at a time; 1 for a server that answers one by one."""


class LmEvalSection(BaseModel):
    """Tasks of the Language Model Evaluation Harness (the package `lm-eval`)."""

    model_config = _SECTION

    tasks: Annotated[list[str], Field(min_length=1)]
    """The names of the tasks."""


class EvaluateSection(BaseModel):
    """The answers and tasks that `finetune evaluate` measures, beside perplexity."""

    model_config = _SECTION

    prompts: str | None = None
    """A JSONL file of prompts; absent: the prompts of the evaluation rows."""
    max_new_tokens: PositiveInt = 512
    """The most tokens of an answer."""
    limit: PositiveInt | None = None
    """The most rows and prompts."""
    judge: JudgeSection | None = None
    """The judge that compares the answers with a reference's; absent: none."""
    server: ServerSection | None = None
    """A server that answers the prompts as well; absent: none."""
    lm_eval: LmEvalSection | None = None
    """Tasks of lm-evaluation-harness; absent: none."""


class HubSection(BaseModel):
    """The Hub repository that a run is pushed to, at its end and, on request, while it trains."""

    model_config = _SECTION

    repo_id: str | None = None
    """The repository, owner/name, created where it does not exist; absent: nothing is pushed."""
    private: bool = False
    """Makes a created repository private."""
    base_model: str | None = None
    """The Hub id of the base, where `model.name_or_path` is local."""
    every_n_saves: PositiveInt | None = None
    """Pushes every N-th checkpoint; absent: only the finished run."""
