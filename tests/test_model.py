"""Where bases come from, what is refused, and PEFT's trainable tokens made light."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from finetune.cli.commands import main
from finetune.data.chat import Chat
from finetune.data.template import load_template
from finetune.model.load import load_base, load_tokenizer
from finetune.model.locate import load_errors, locate, read_config
from finetune.model.token_rows import lighten_trainable_tokens, trainable_token_indices, unlearned_tokens
from finetune.recipe.checks import RANDOM_ARCHITECTURES
from finetune.recipe.schema import ModelSection
from finetune.system.errors import ModelError
from finetune.train.loss import use_token_head


def tiny(architecture: str = "gemma3", **arguments: Any) -> Any:
    return load_base(locate(f"random:{architecture}"), torch.float32, **arguments)


@pytest.mark.parametrize("architecture", RANDOM_ARCHITECTURES)
def test_random_models_are_made_once_and_load(architecture: str) -> None:
    path = Path(locate(f"random:{architecture}"))
    before = (path / "model.safetensors").stat()
    assert locate(f"random:{architecture}") == str(path)
    assert (path / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []  # nothing half made
    model = tiny(architecture)
    chat = Chat(load_tokenizer(ModelSection(name_or_path=f"random:{architecture}")))
    ids = chat.encode([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "やあ"}]).input_ids.tolist()
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()
    assert model.config.vocab_size == len(chat.tokenizer) == 1024


def test_a_random_model_is_made_anew_for_another_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached one would have the template of the release that made it."""
    before = locate("random:llama")
    monkeypatch.setattr("finetune.model.tiny.load_template", lambda name: load_template(name) + "{# changed #}")
    after = locate("random:llama")
    assert after != before
    assert AutoTokenizer.from_pretrained(after).chat_template.endswith("{# changed #}")
    monkeypatch.undo()
    assert locate("random:llama") == before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no weights; weights must be .safetensors"),
        (
            {"pytorch_model.bin": b"x"},
            "holds only pytorch_model.bin, a pickle, which can run code when it is read; weights must be .safetensors",
        ),
    ],
    ids=["no weights", "pickle only"],
)
def test_directories_without_safe_weights_are_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError) as error:
        locate(str(tmp_path))
    assert str(error.value) == f"model.name_or_path: {tmp_path} {message}"


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    source = Path(locate("random:llama"))
    for path in source.iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[:-100] if path.suffix == ".safetensors" else content)
    with pytest.raises(ModelError, match="a weight file is damaged"):
        load_base(str(tmp_path), torch.float32)


def test_a_package_without_a_model_is_refused() -> None:
    with pytest.raises(ModelError) as error:
        locate("package:json")
    assert str(error.value) == "model.name_or_path: the package json holds no GGUF model (no function `assemble`)"
    with pytest.raises(ModelError, match="the package not_there is not installed; run pip install "):
        locate("package:not_there")


def test_unlearned_tokens_are_those_that_are_alike_or_near_zero() -> None:
    model = tiny()
    weight = model.get_input_embeddings().weight.data
    assert unlearned_tokens(model, list(range(1, 20))) == []  # row 0 is <pad>'s: zeros
    common = torch.randn(64, generator=torch.Generator().manual_seed(0)) * weight.norm(dim=1).mean() / 8
    for token in (4, 5, 900, 901, 902):
        weight[token] = common + 0.001 * torch.randn(64, generator=torch.Generator().manual_seed(token))
    weight[7] = 0
    assert unlearned_tokens(model, [3, 4, 5, 6, 7, 8]) == [4, 5, 7]


def with_token_rows(tied: bool = True) -> Any:
    torch.manual_seed(0)
    model = tiny("gemma2") if tied else tiny("llama")
    assert model.config.tie_word_embeddings is tied
    indices = trainable_token_indices(model, [4, 5])
    assert indices == ([4, 5] if tied else {"embed_tokens": [4, 5], "lm_head": [4, 5]})
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", trainable_token_indices=indices)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            parameter.data.normal_(0, 0.2)
    return model


def losses_and_gradients(model: Any, fused: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.tensor([[2, 4, 9, 30, 5, 4, 77, 5], [2, 4, 5, 5, 8, 100, 200, 4]])
    out = model(input_ids=ids, labels=ids.masked_fill(ids == 9, -100), **({"fused_lm_head": True} if fused else {}))
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.loss.detach(), grads


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_light_token_rows_give_pefts_numbers(tied: bool) -> None:
    """PEFT's own forward is the referee, for loss and every gradient; then the token head on top of the light rows."""
    from trl.trainer.utils import add_fused_lm_head

    model = with_token_rows(tied)
    wanted, wanted_gradients = losses_and_gradients(model, fused=False)
    assert sum("trainable_tokens_delta" in name for name in wanted_gradients) == (1 if tied else 2)

    lighten_trainable_tokens(model)
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    assert use_token_head(model.get_base_model())
    for fused in (False, True):
        loss, gradients = losses_and_gradients(model, fused)
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
        assert gradients.keys() == wanted_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-4, atol=1e-5)
    with torch.no_grad(), model.disable_adapter():
        base = model(torch.tensor([[2, 4, 5]])).logits
    plain = tiny("gemma2" if tied else "llama")(torch.tensor([[2, 4, 5]])).logits
    torch.testing.assert_close(base, plain, rtol=1e-6, atol=1e-6)


def test_token_rows_are_saved_as_rows(tmp_path: Path) -> None:
    model = with_token_rows()
    lighten_trainable_tokens(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    rows = {name: t.shape for name, t in tensors.items() if "lora" not in name}
    assert rows == {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 64)}
    ids = torch.tensor([[2, 4, 9, 5]])
    again = peft.PeftModel.from_pretrained(tiny("gemma2"), tmp_path)
    lighten_trainable_tokens(again)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.skipif(
    "avx512_bf16" not in Path("/proc/cpuinfo").read_text(), reason="a CPU without AVX512-BF16 never repacks"
)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "upstream alone"])
def test_4bit_weights_survive_an_evaluation(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream alone repacks the weights at the first forward without gradients; if that half fails, it is mended."""
    if not kept:
        monkeypatch.setattr("finetune.model.load.keep_4bit_weights", lambda model: None)
    # Wide enough for the repacking kernel; the tiny models are not.
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 64}
    config = AutoConfig.for_model("llama", **shape, num_attention_heads=4, num_key_value_heads=4)
    folder = Path(locate("random:llama")).parent / "wide"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    model = load_base(str(folder), torch.bfloat16, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.data.clone()
    model.eval()
    with torch.no_grad():
        model(torch.arange(32).reshape(1, 32))
    survived = layer.weight.data.shape == before.shape and torch.equal(layer.weight.data, before)
    assert survived is kept


def test_full_weights_round_trip(tmp_path: Path) -> None:
    model = tiny("gemma")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gemma"
    for name, tensor in load_base(str(tmp_path), torch.float32).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


_NAME = "model.name_or_path: model"
_CONFIG, _SETTINGS = f"{_NAME}: the %s of its config.json is %s; write %s", f"{_NAME}: the %s of its generation config "
DAMAGED: list[tuple[str, str, Any, str]] = [
    ("generation_config.json", "eos_token_id", "\u202enan", _SETTINGS + "is '\\u202enan'; write the id of a token"),
    (
        *("generation_config.json", "repetition_penalty", 0),
        _SETTINGS + "cannot be used: `penalty` has to be a strictly positive float, but is 0",
    ),
    (
        *("generation_config.json", "bad_words_ids", [[10**6]]),
        _SETTINGS + "cannot be used: The model vocabulary size is 1024, but the following tokens were being biased: "
        "[1000000]",
    ),
    (
        *("generation_config.json", "no_repeat_ngram_size", True),
        _SETTINGS + "cannot be used: unfold(): argument 'size' must be int, not bool",
    ),
    (*("generation_config.json", "suppress_tokens", "a"), _SETTINGS + "cannot be used: too many dimensions 'str'"),
    (
        *("config.json", "num_attention_heads", [[]]),
        f"{_NAME} cannot be loaded; is a file of it damaged? StrictDataclassFieldValidationError: Validation error for "
        "field 'num_attention_heads': TypeError: Field 'num_attention_heads' expected int, got list (value: [[]])",
    ),
    ("config.json", "sliding_window", None, _CONFIG % ("%s", "null", "a number of tokens above 0")),
    ("config.json", "sliding_window", -(10**15), _CONFIG % ("%s", "-1000000000000000", "a number of tokens above 0")),
    ("config.json", "query_pre_attn_scalar", -1, _CONFIG % ("%s", "-1", "a number above 0")),
    ("config.json", "output_hidden_states", 0.5, _CONFIG % ("%s", "0.5", "true or false")),
    (
        *("config.json", "is_encoder_decoder", True),
        "model: an answer fails: ValueError: You must specify exactly one of input_ids or inputs_embeds; is a value of "
        "its config.json wrong? (--traceback shows where)",
    ),
    ("config.json", "return_dict", False, _CONFIG % ("%s", "false", "true")),
    (
        *("config.json", "intermediate_size", 10**8),
        f"{_NAME}: its config.json describes 76,800,181,440 weights, and its files hold 181,440 of them; is the config "
        "that of another model?",
    ),
    (
        *("tokenizer_config.json", "bos_token", 3),
        f"{_NAME} cannot be loaded; is a file of it damaged? TypeError: Special token bos_token has to be either str "
        "or AddedToken but got: <class 'int'>",
    ),
]


@pytest.mark.parametrize(
    ("name", "key", "value", "line"), DAMAGED, ids=[f"{key} {value}" for _, key, value, _ in DAMAGED]
)
def test_a_damaged_file_of_a_model_is_one_line(
    name: str,
    key: str,
    value: Any,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(locate("random:gemma3"), "model")
    file = Path("model", name)
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | {key: value}))
    assert main(["generate", "model", "--prompt", "Hi", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == f"error: {line % key if '%s' in line else line}\n"


def test_a_model_with_a_million_layers_is_not_built(tmp_path: Path) -> None:
    config = json.loads(Path(locate("random:llama"), "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**6}))
    with pytest.raises(ModelError) as caught:
        read_config(str(tmp_path))
    fault = "the num_hidden_layers of its config.json is 1000000; write a number of at most 2,000"
    assert str(caught.value) == f"model.name_or_path: {tmp_path}: {fault}"


@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGUF" + b"\xff" * 60, b"GGUF\3\0\0\0" + b"\0" * 16], ids=range(4))
def test_a_damaged_gguf_file_is_one_line(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.gguf").write_bytes(data)
    assert main(["generate", "x.gguf", "--prompt", "Hi", "--device", "cpu"]) == 2
    [*_, line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: model.name_or_path: x.gguf cannot be loaded")


def test_a_lack_of_memory_is_no_damage() -> None:
    with pytest.raises(MemoryError), load_errors("x"):
        raise MemoryError
    with pytest.raises(torch.OutOfMemoryError), load_errors("x"):
        raise torch.OutOfMemoryError("CUDA out of memory")
