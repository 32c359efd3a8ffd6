"""Adapters and bases of other tools: merged, loaded and trained further alike, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantised_tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from finetune.cli.commands import main
from finetune.data.chat import Chat
from finetune.evaluate.lm_eval_tasks import fold_description
from finetune.export.adapter import write_adapter
from finetune.hub.card import is_of_peft
from finetune.hub.payload import make_payload
from finetune.merge.run import merge
from finetune.model.adapter_readers import READERS, check_adapter, problems_of
from finetune.model.attach import attach_adapter, without_warnings
from finetune.model.compatibility import all_linear_targets, can_be_dequantised
from finetune.model.load import load_base, load_tokenizer
from finetune.model.load_generator import LoadOptions, load_generator
from finetune.model.locate import Base, locate, read_config
from finetune.recipe.schema import ModelSection
from finetune.system.errors import FinetuneError, RunError
from finetune.system.terminal import quiet

Tensors = dict[str, torch.Tensor]
Change = Callable[[str], str]
IDS = torch.arange(3, 40)[None]
SHAPE: dict[str, Any] = {
    **{"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1},
}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def save_base(folder: Path, kind: str = "llama", **shape: Any) -> Path:
    torch.manual_seed(0)
    with quiet():
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | shape)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(locate("random:llama")).save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, save: dict[str, Any] | None = None, **lora: Any) -> Path:
    """An adapter as PEFT saves it, with no number that is zero, and no tokenizer beside it."""
    with without_warnings():
        model = AutoModelForCausalLM.from_pretrained(base)
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | lora
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, 0, 0.1)
        model.save_pretrained(folder, **(save or {}))
    return folder


def change_file(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits.float()
    return found


def of_peft(base: Path, adapter: Path) -> torch.Tensor:
    with without_warnings():
        return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


def of_merged(folder: Path) -> torch.Tensor:
    with quiet():
        return logits(AutoModelForCausalLM.from_pretrained(folder))


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return save_base(Path("base"))


OTHER_NAMES: dict[str, tuple[Change, str]] = {
    "compiled": (lambda key: key.replace("model.model.model", "model._orig_mod.model"), "_orig_mod.model.layers.0"),
    "of DDP": (lambda key: "module." + key, "module.base_model"),
    "without a head": (lambda key: key.replace("model.model.model", "model.model"), "base_model.model.layers.0"),
    "half of the layers": (lambda key: key.replace("layers.1.", "layers.9."), "layers.9."),
}


@pytest.mark.parametrize(("rename", "shown"), OTHER_NAMES.values(), ids=OTHER_NAMES)
def test_an_adapter_with_other_names_is_refused_by_all(rename: Change, shown: str, base: Path) -> None:
    """PEFT 0.21 only warns, and answers as the base does."""
    adapter = save_adapter(base, Path("adapter"))
    change_file(adapter, lambda tensors: {rename(key): tensor for key, tensor in tensors.items()})
    model = load_base(str(base), torch.float32)
    for use in (
        lambda: merge(adapter, "merged"),
        lambda: load_generator(str(adapter), LoadOptions(dtype="float32")),
        lambda: attach_adapter(model, adapter, trainable=True),
    ):
        with pytest.raises(FinetuneError, match="base") as error:
            use()
        assert shown in str(error.value)
    assert not Path("merged").exists()


@pytest.mark.parametrize(
    ("base_name", "lora"),
    [
        ("random:gemma3", {"trainable_token_indices": [4, 5]}),  # of tied embeddings
        ("random:llama", {"trainable_token_indices": {"embed_tokens": [4, 5], "lm_head": [4, 5]}}),
        ("random:gemma3", {"modules_to_save": ["lm_head"]}),
        ("random:llama", {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
        ("random:llama", {"bias": "lora_only", "lora_bias": True}),
    ],
)
def test_all_parts_of_an_adapter_are_attached(base_name: str, lora: dict[str, Any], tmp_path: Path) -> None:
    on = Path(locate(base_name))
    adapter = save_adapter(on, tmp_path / "adapter", **lora)
    found = logits(load_generator(str(adapter), LoadOptions(dtype="float32")).model)
    torch.testing.assert_close(found, of_peft(on, adapter), rtol=0, atol=1e-5)
    dropped = min(key for key in load_file(adapter / WEIGHTS) if ".base_layer." not in key)
    change_file(adapter, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != dropped})
    with pytest.raises(FinetuneError, match="is of another base, or damaged: it lacks base_model"):
        load_generator(str(adapter), LoadOptions(dtype="float32"))


def default_kept(tensors: Tensors) -> Tensors:
    return {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}


def expert_by_expert(path: str, names: dict[str, tuple[int, int]]) -> Callable[[Tensors], Tensors]:
    """Adds adapters of single experts, as transformers 4 has them."""

    def add(tensors: Tensors) -> Tensors:
        draw = torch.Generator().manual_seed(5)
        for place in (f"layers.{layer}.{path}.experts.{expert}" for layer in range(2) for expert in range(4)):
            for name, (width, height) in names.items():
                key = f"base_model.model.model.{place}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(4, width, generator=draw) * 0.1
                tensors[f"{key}.lora_B.weight"] = torch.randn(height, 4, generator=draw) * 0.1
        return tensors

    return add


EXPERTS = {"w1": (64, 96), "w3": (64, 96), "w2": (96, 64)}
LAYOUTS: dict[str, tuple[str, dict[str, Any], Callable[[Tensors], Tensors], dict[str, Any]]] = {
    "default kept": ("llama", {}, default_kept, {}),
    "experts one by one": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        expert_by_expert("block_sparse_moe", EXPERTS),
        {"target_modules": ["q_proj", "v_proj", *EXPERTS]},
    ),
}


@pytest.mark.parametrize(("kind", "shape", "change", "config"), LAYOUTS.values(), ids=LAYOUTS)
def test_names_that_peft_takes_are_merged_as_peft_loads_them(
    kind: str, shape: dict[str, Any], change: Callable[[Tensors], Tensors], config: dict[str, Any], base: Path
) -> None:
    on = save_base(Path("on"), kind, **shape)
    adapter = save_adapter(on, Path("adapter"))
    change_file(adapter, change)
    change_config(adapter, **config)
    expected = of_peft(on, adapter)
    assert not torch.allclose(expected, of_merged(on), atol=0.1)
    merge(adapter, "merged")
    torch.testing.assert_close(of_merged(Path("merged")), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        logits(load_generator(str(adapter), LoadOptions(dtype="float32")).model), expected, rtol=0, atol=1e-5
    )
    assert not [path for path in Path("merged").iterdir() if path.name.startswith(".")]
    record = json.loads(Path("merged/merge.json").read_text())
    assert [item["path"] for item in record["adapters"]] == ["adapter"]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embeddings_that_were_saved_with_an_adapter_replace_the_bases(tied: bool, base: Path) -> None:
    on = save_base(Path("on"), tie_word_embeddings=tied)
    adapter = save_adapter(on, Path("adapter"), save={"save_embedding_layers": True})
    key = "base_model.model.model.embed_tokens.weight"
    change_file(adapter, lambda tensors: tensors | {key: tensors[key] + 0.1})
    if tied:
        change_file(adapter, lambda t: {k: v for k, v in t.items() if "lm_head" not in k})
    merge(adapter, "merged")
    torch.testing.assert_close(of_merged(Path("merged")), of_peft(on, adapter), rtol=0, atol=1e-5)
    assert json.loads(Path("merged/config.json").read_text())["tie_word_embeddings"] is tied


@pytest.mark.parametrize(
    "lora", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [1024, 1025]}, {}]
)
def test_a_vocabulary_that_grew_needs_the_base_that_was_grown(lora: dict[str, Any], base: Path) -> None:
    grown = Path("grown")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(1026, mean_resizing=False)
        model.save_pretrained(grown)
        AutoTokenizer.from_pretrained(base).save_pretrained(grown)
    adapter = save_adapter(grown, Path("adapter"), save={"save_embedding_layers": True}, **lora)
    change_config(adapter, base_model_name_or_path="base")
    with pytest.raises(FinetuneError, match="1,024: the vocabulary was grown before the training; give the model"):
        merge(adapter, "merged")
    merge(adapter, "merged", base="grown")
    torch.testing.assert_close(of_merged(Path("merged")), of_peft(grown, adapter), rtol=0, atol=1e-5)


def in_several_files(adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model-00001-of-00002.safetensors")
    (adapter / "adapter_model-00002-of-00002.safetensors").write_bytes(b"")


def of_mlx(adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapters.safetensors")
    (adapter / CONFIG).write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 4}}))


def in_a_folder_of_its_name(adapter: Path) -> None:
    shutil.move(adapter, "moved")
    adapter.mkdir()
    shutil.move("moved", adapter / "polite")


OTHER_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "of mlx-lm": (of_mlx, "adapter is an adapter of mlx-lm, not of PEFT; merge it there with mlx_lm.fuse --dequantize"),
    "several files": (in_several_files, "adapter holds the adapter in 2 files, which PEFT does not read; save"),
    "named": (in_a_folder_of_its_name, "its adapter is in adapter/polite, write that"),
    "a later PEFT": (
        lambda adapter: change_config(adapter, use_quantum=True, off_in_ours=False),
        "adapter/adapter_config.json: use_quantum is true, an option that the installed PEFT does not know",
    ),
    "a pointer": (
        lambda adapter: (adapter / WEIGHTS).write_text(POINTER),
        "adapter/adapter_model.safetensors is a pointer of Git LFS; run git lfs pull beside it",
    ),
    "the base a pointer": (
        lambda adapter: Path("base/model.safetensors").write_text(POINTER),
        "model.name_or_path: base/model.safetensors is a pointer of Git LFS; run git lfs pull beside it",
    ),
    "a base of MLX": (
        lambda adapter: Path("base/config.json").write_text('{"quantization_config": {"group_size": 32, "bits": 4}}'),
        "model.name_or_path: the weights of base are quantised by MLX, which only MLX reads; name the model",
    ),
    "the base elsewhere": (
        lambda adapter: change_config(adapter, base_model_name_or_path="/data/models/other"),
        "adapter/adapter_config.json: its base /data/models/other is not on this machine; write --base with its path",
    ),
    "the base on Windows": (
        lambda adapter: change_config(adapter, base_model_name_or_path="C:\\models\\other"),
        "adapter/adapter_config.json: its base C:\\models\\other is not on this machine; write --base with its path",
    ),
    "no base": (
        lambda adapter: change_config(adapter, base_model_name_or_path=None),
        "adapter/adapter_config.json names no base (base_model_name_or_path); write --base with its path or id",
    ),
}


@pytest.mark.parametrize(("damage", "line"), OTHER_FILES.values(), ids=OTHER_FILES)
def test_what_is_no_adapter_of_peft_is_named_alike_by_all_verbs(
    damage: Callable[[Path], Any], line: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(save_adapter(base, Path("adapter")))
    for verb in (["merge", "adapter", "--output", "out"], ["generate", "adapter", "--prompt", "Hi"]):
        assert main(verb) == 2
        said = capsys.readouterr().err
        assert line in said
        assert said.count("\n") == 1


def test_a_pointer_is_not_pushed(base: Path) -> None:
    adapter = save_adapter(base, Path("adapter"))
    (adapter / WEIGHTS).write_text(POINTER)
    with pytest.raises(FinetuneError, match="is a pointer of Git LFS; run git lfs pull beside it"):
        make_payload(adapter, "you/polite", "tiny/llama", ask=False)


def test_base_names_the_base_of_an_adapter_from_elsewhere(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a tokenizer beside it, too: then it is the base's."""
    adapter = save_adapter(base, Path("adapter"))
    change_config(adapter, base_model_name_or_path="/data/models/other")
    assert main(["merge", "adapter", "--output", "merged", "--base", "base"]) == 0
    torch.testing.assert_close(of_merged(Path("merged")), of_peft(base, adapter), rtol=0, atol=1e-5)
    assert main(["generate", "adapter", "--base", "base", "--prompt", "Hi", "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    assert main(["generate", "base", "--base", "base", "--prompt", "Hi"]) == 2
    assert capsys.readouterr().err == "error: --base base: base is no run, but a whole model; leave out --base\n"


@pytest.mark.slow
def test_a_base_that_is_stored_quantised_is_decided_before_training(
    write_recipe: Callable[..., Path], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with quiet():
        from transformers import BitsAndBytesConfig

        options = BitsAndBytesConfig(load_in_4bit=True)
        AutoModelForCausalLM.from_pretrained(base, quantization_config=options).save_pretrained("small")
        AutoTokenizer.from_pretrained(base).save_pretrained("small")
    recipe = str(write_recipe(model={"name_or_path": "small", "dtype": "float32"}, training={"max_steps": 1}))
    full = str(write_recipe("full.yaml", model={"name_or_path": "small"}, lora=None))
    twice = str(write_recipe("twice.yaml", model={"name_or_path": "small"}, quantization=NF4))
    for file, line in (
        (full, "only an adapter on them can be trained"),
        (twice, "stored quantised already (bitsandbytes)"),
    ):
        assert main(["train", file]) == 2
        assert line in capsys.readouterr().err
    assert main(["train", recipe]) == 0
    told = capsys.readouterr().err
    assert "small is stored quantised (bitsandbytes), and the adapter is trained on the rounded weights" in told
    assert "take --base dequantised, or the model that they were made from: --base PATH_OR_ID\n" in told
    again = write_recipe("again.yaml", model={"name_or_path": str(base)}, quantization=NF4, training={"max_steps": 1})
    assert main(["train", str(again), "training.output_dir=again"]) == 0
    assert "stored quantised" not in capsys.readouterr().err
    assert main(["merge", "run", "--output", "merged"]) == 2
    assert (
        "is needed: write its path or id with --base; or merge into the rounded weights, with --base dequantised"
        in capsys.readouterr().err
    )
    assert main(["merge", "run", "--output", "rounded", "--base", "dequantised"]) == 0
    trained = logits(load_generator("run", LoadOptions(dtype="float32")).model)
    torch.testing.assert_close(of_merged(Path("rounded")), trained, rtol=0, atol=1e-4)
    assert main(["merge", "run", "--output", "merged", "--base", "base"]) == 0
    torch.testing.assert_close(of_merged(Path("merged")), of_peft(base, Path("run")), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", quantised_tiny.FORMS)
@pytest.mark.slow
def test_an_adapter_is_trained_on_the_values_of_a_quantised_file(
    form: str, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT finds no weights in packed layers, and transformers 5.23 leaves norms in the type of the file."""
    quantised_tiny.save(form, Path("small"), Path("exact"))
    changed = {"max_steps": 1, "learning_rate": 0.1}
    recipe = write_recipe(
        model={"name_or_path": "small", "dtype": "float32"}, lora={"target_modules": ["q_proj"]}, training=changed
    )
    assert main(["train", str(recipe)]) == 0
    told = f"small is stored quantised ({form}), and the adapter is trained on the rounded weights; merge and export"
    assert told in capsys.readouterr().err
    expected = of_peft(Path("exact"), Path("run"))
    assert not torch.allclose(expected, of_merged(Path("exact")), atol=0.1)
    torch.testing.assert_close(
        logits(load_generator("run", LoadOptions(dtype="float32")).model), expected, rtol=0, atol=1e-4
    )
    assert main(["merge", "run", "--output", "rounded", "--base", "dequantised"]) == 0
    # The copy of the base is in bfloat16, as the file's other weights.
    torch.testing.assert_close(of_merged(Path("rounded")), expected, rtol=0, atol=0.05)
    assert main(["merge", "run", "--output", "merged", "--base", "exact"]) == 0
    torch.testing.assert_close(of_merged(Path("merged")), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_quantised_files_that_transformers_reads_wrongly_are_refused(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.23 says nothing: see findings/."""
    quantised_tiny.save("compressed-tensors", Path("mixed"), Path("exact"))
    config = json.loads(Path("mixed/config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = groups["group_0"] | {"targets": ["re:.*down_proj"]}
    Path("mixed/config.json").write_text(json.dumps(config))
    small = quantised_tiny.SHAPE | {"intermediate_size": 192, "num_hidden_layers": 1}
    monkeypatch.setattr(quantised_tiny, "SHAPE", small)
    quantised_tiny.save("fp8", Path("uneven"), Path("exact2"))
    for name, line in (
        ("mixed", "mixed: its weights are stored quantised in several schemes (config_groups), which transformers"),
        (
            "uneven",
            "uneven: layers.0.mlp.gate_proj.weight is stored in fp8 in blocks of 128 by 128, which do not divide",
        ),
    ):
        assert main(["train", str(write_recipe(model={"name_or_path": name, "dtype": "float32"}))]) == 2
        assert f"error: {line}" in capsys.readouterr().err
        adapter = save_adapter(Path("exact" if name == "mixed" else "exact2"), Path(f"adapter-{name}"))
        assert main(["merge", str(adapter), "--output", "out", "--base", name]) == 2
        assert "its weights are stored quantised" in capsys.readouterr().err
        with pytest.raises(FinetuneError, match="name the model that"):
            Base.of(ModelSection(name_or_path=name)).dequantised()


def test_all_linear_takes_the_layers_of_gptqmodel() -> None:
    model = load_base(str(locate("random:llama")), torch.float32)
    expected = all_linear_targets(model)
    for layer in model.model.layers:
        packed = torch.nn.Module()
        packed.register_buffer("qweight", torch.zeros(1, dtype=torch.int32))
        layer.self_attn.q_proj = packed
    assert all_linear_targets(model) == expected


@pytest.mark.parametrize(("form", "package"), [("gptq", "optimum"), ("awq", "gptqmodel")])
def test_a_base_whose_reader_is_not_installed_is_a_fault_of_the_recipe(
    form: str, package: str, base: Path, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": form, "bits": 4, "group_size": 128}
    (base / "config.json").write_text(json.dumps(config))
    assert main(["train", str(write_recipe(model={"name_or_path": str(base)}))]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: model.name_or_path: base cannot be loaded: Loading a")
    assert not can_be_dequantised(read_config("base"))
    assert f"quantized model requires {package}" in error
    adapter = save_adapter(save_base(Path("exact")), Path("adapter"))
    assert main(["merge", str(adapter), "--output", "out", "--base", "base"]) == 2
    assert capsys.readouterr().err.endswith("is needed: write its path or id with --base\n")


def test_pefts_own_card_is_known_and_an_edited_one_is_not(base: Path) -> None:
    page = (save_adapter(base, Path("adapter")) / "README.md").read_text()
    assert is_of_peft(page)
    assert not is_of_peft(page.replace("[More Information Needed]", "It writes letters.", 1))
    assert not is_of_peft("# A page of mine\n- PEFT 0.21\n")


def test_a_tasks_description_goes_before_the_question_where_a_template_takes_no_system_message() -> None:
    chat = [{"role": "system", "content": "Answer with a number."}, {"role": "user", "content": "1+1?"}]
    llama, gemma = (Chat(load_tokenizer(ModelSection(name_or_path=f"random:{name}"))) for name in ("llama", "gemma"))
    assert fold_description(llama.render, chat) == chat
    assert fold_description(gemma.render, chat) == [{"role": "user", "content": "Answer with a number.\n\n1+1?"}]


def test_an_adapter_on_the_output_layer_is_a_fault_of_the_recipe(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(lora={"target_modules": ["q_proj", "lm_head"]})
    assert main(["check", str(recipe)]) == 2
    assert (
        "lora.target_modules: names lm_head, whose adapter trl would never train; remove it" in capsys.readouterr().err
    )


READ: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "plain, vllm": ({}, "vllm", []),
    "plain, sglang": ({}, "sglang", []),
    "plain, llama.cpp": ({}, "llama.cpp", []),
    "plain, peft": ({}, "peft==0.17.1", []),
    "plain, old peft": ({}, "peft==0.13.2", ["refuses it: adapter_config.json"]),
    "rows, vllm": ({"trainable_token_indices": [4, 5]}, "vllm", ["vLLM 0.33.0 refuses it: token rows"]),
    "rows, sglang": ({"trainable_token_indices": [4, 5]}, "sglang", ["ignores it without a message: token rows"]),
    "rows, llama.cpp": ({"trainable_token_indices": [4, 5]}, "llama.cpp", ["refuses it: token rows"]),
    "rows, peft": ({"trainable_token_indices": [4, 5]}, "peft==0.17.1", []),
    "rows, older peft": (
        {"trainable_token_indices": [4, 5]},
        "peft==0.14.0",
        ["ignores it without a message: token rows: 0.15 is the first release that has it"],
    ),
    "rslora, vllm": ({"use_rslora": True}, "vllm", []),
    "rslora, sglang": ({"use_rslora": True}, "sglang", ["computes it wrongly, without a message: rsLoRA"]),
    "patterns": ({"alpha_pattern": {"q_proj": 3}}, "llama.cpp", ["without a message: alpha_pattern"]),
    "patterns of the default": ({"alpha_pattern": {"q_proj": 8}, "rank_pattern": {"q_proj": 4}}, "sglang", []),
    "dora": ({"use_dora": True}, "vllm", ["refuses it: DoRA"]),
    "one of two": ({"target_modules": ["q_proj"]}, "sglang", ["refuses it: q_proj without v_proj"]),
    "rank": ({"r": 600}, "vllm", ["refuses it: rank 600: 512 is the largest"]),
}


@pytest.mark.parametrize(("lora", "program", "problems"), READ.values(), ids=READ)
def test_what_a_program_makes_of_an_adapter(
    lora: dict[str, Any], program: str, problems: list[str], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(base, Path("adapter"), **lora)
    capsys.readouterr()
    assert main(["check-adapter", "adapter", "--for", program]) == (3 if problems else 0)
    said = capsys.readouterr().out.splitlines()
    for line, expected in zip(said, problems or [" takes it"], strict=False):
        assert expected in line
    assert len(said) == (len(problems) + 2 if problems else 3 if program == "vllm" else 2)
    assert said[-1].startswith("by its source: ")
    if program == "vllm" and not problems:
        assert said[1] == "start it with --enable-lora --max-lora-rank 8"


def test_old_peft_and_gemma_3s_token_rows(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a scaled embedding beneath them all logits are others (PEFT 0.17.1)."""
    save_adapter(Path(locate("random:gemma3")), Path("adapter"), trainable_token_indices=[4, 5])
    for release, problems in (("0.17.1", 1), ("0.18.0", 0)):
        assert main(["check-adapter", "adapter", "--for", f"peft=={release}"]) == (3 if problems else 0)
        assert ("Gemma 3's embedding is not scaled" in capsys.readouterr().out) is bool(problems)
    assert main(["check-adapter", "adapter", "--for", "ollama"]) == 2
    assert capsys.readouterr().err == "error: --for ollama: write one of vllm, sglang, llama.cpp or peft==RELEASE\n"
    assert main(["check-adapter", "base", "--for", "vllm"]) == 2
    assert capsys.readouterr().err == "error: base holds no adapter (adapter_config.json)\n"


def test_a_plain_adapter_is_the_same_and_all_programs_take_it(base: Path) -> None:
    """Each layer has another scaling and rank, by rsLoRA and patterns."""
    patterns = {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"layers.1.self_attn.v_proj": 6}}
    adapter = save_adapter(base, Path("adapter"), use_rslora=True, **patterns)
    assert [len(check_adapter(adapter, name).problems) for name in ("vllm", "sglang", "llama.cpp")] == [0, 3, 2]
    Path("plain").mkdir()
    write_adapter(adapter, Path("plain"))
    assert [check_adapter(Path("plain"), name).problems for name in READERS] == [[], [], []]
    torch.testing.assert_close(of_peft(base, Path("plain")), of_peft(base, adapter), rtol=0, atol=1e-5)
    config = json.loads(Path("plain", CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (6, 6, "base")
    assert {tuple(t.shape) for t in load_file(Path("plain", WEIGHTS)).values()} == {(6, 64), (64, 6), (32, 6)}
    assert {path.name for path in Path("plain").iterdir()} == {
        *(WEIGHTS, CONFIG),
        *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
    }


@pytest.mark.parametrize(
    ("lora", "part"),
    [
        ({"trainable_token_indices": [4]}, "token rows (model.embed_tokens.weight)"),
        ({"modules_to_save": ["lm_head"]}, "a tensor trained whole (lm_head.weight)"),
        ({"use_dora": True}, "DoRA (model.layers.0.self_attn.q_proj.weight)"),
        ({"target_modules": ["embed_tokens"]}, "LoRA of embedding (model.embed_tokens.weight)"),
    ],
)
def test_what_no_server_takes_is_not_written_as_a_plain_adapter(lora: dict[str, Any], part: str, base: Path) -> None:
    adapter = save_adapter(base, Path("adapter"), **lora)
    Path("plain").mkdir()
    with pytest.raises(FinetuneError) as error:
        write_adapter(adapter, Path("plain"))
    assert str(error.value).startswith(f"--format adapter: adapter holds {part}, which servers do not take")


def test_a_plain_adapter_of_a_whole_model_is_refused(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "base", "--output", "out", "--format", "adapter"]) == 2
    assert "--format adapter: base is a whole model; export the run that it was merged from" in capsys.readouterr().err


def test_a_config_with_values_of_other_types_is_damaged() -> None:
    with pytest.raises(RunError, match=r"^adapter_config\.json is damaged: "):
        problems_of(READERS["vllm"], {"peft_type": "LORA", "rank_pattern": 3})
