"""The files for `accelerate launch`: what accelerate makes of each, and that docs/distributed.md says what is there."""

import argparse
import copy
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, _filter_args
from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from torch.distributed import run as torchrun
from torch.distributed.fsdp import OffloadPolicy, StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoModelForCausalLM

from finetune.model.locate import locate
from finetune.recipe.load import load_recipe

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
FAMILIES = {
    "gemma": "GemmaDecoderLayer",
    "gemma2": "Gemma2DecoderLayer",
    "gemma3": "Gemma3DecoderLayer",
    "llama": "LlamaDecoderLayer",
}

pytestmark = pytest.mark.filterwarnings("ignore:Port `29500` is already in use")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables from outside, none left behind; the port that accelerate asks for is free."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "CUDA_VISIBLE", "MASTER_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)


def written_command(path: Path) -> list[str]:
    """The command in the first line of a file, as a shell splits it."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    return shlex.split(first[first.index("accelerate launch") :])


def launch(path: Path, *flags: str) -> tuple[argparse.Namespace, dict[str, str]]:
    """torchrun's arguments (none for one process) and the variables that `accelerate launch` would set."""
    command = ["--config_file", str(path), *flags, "-m", "finetune", "recipe.yaml"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert {args.tpu, args.use_deepspeed, args.use_megatron_lm} == {False}
    several = args.use_fsdp or args.multi_gpu
    if several:
        environment = prepare_multi_gpu_env(args)
        given = ["--training_script", args.training_script, "--training_script_args", *args.training_script_args]
        args = _filter_args(args, torchrun.get_args_parser(), given)
    else:
        command, environment = prepare_simple_launcher_cmd_env(args)
        assert command[1:] == ["-m", "finetune", "recipe.yaml"]
        args = argparse.Namespace()
    return args, {name: value for name, value in environment.items() if os.environ.get(name) != value}


SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    # Not in the files; FSDP 2 reads none of them.
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_USE_ORIG_PARAMS": "true",
}
ONE_PROCESS: dict[str, Any] = {}
EXPECTED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "cpu": (
        ONE_PROCESS,
        {"ACCELERATE_USE_CPU": "True", "KMP_AFFINITY": "granularity=fine,compact,1,0", "KMP_BLOCKTIME": "1"},
    ),
    "single_gpu": (ONE_PROCESS, {"ACCELERATE_USE_CPU": "False", "CUDA_VISIBLE_DEVICES": "0"}),
    "tpu": (ONE_PROCESS, {"ACCELERATE_USE_CPU": "False"}),
    "ddp": ({"nproc_per_node": "8", "nnodes": "1:1"}, {}),
    "fsdp": ({"nproc_per_node": "8", "nnodes": "1:1"}, SHARDED),
    "fsdp_qlora": ({"nproc_per_node": "2", "nnodes": "1:1"}, SHARDED),
    "fsdp_multinode": (
        {"nproc_per_node": "8", "nnodes": "2", "node_rank": 1, "rdzv_endpoint": "10.0.0.1:29500"},
        SHARDED,
    ),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_accelerate_makes_of_each(path: Path) -> None:
    meeting = ["--machine_rank", "1", "--main_process_ip", "10.0.0.1"] if path.stem == "fsdp_multinode" else []
    args, environment = launch(path, *meeting)
    arguments, variables = EXPECTED[path.stem]
    assert {name: getattr(args, name) for name in arguments} == arguments
    assert bool(vars(args)) == bool(arguments)
    dynamo = {name for name in environment if name.startswith("ACCELERATE_DYNAMO_")}
    assert {environment[name] for name in dynamo} <= {"no", "NO", "default", "False"}
    rest = {name: value for name, value in environment.items() if name not in dynamo | {"OMP_NUM_THREADS"}}
    # What decides the type of weights and computation is the recipe.
    assert rest == variables | {"ACCELERATE_MIXED_PRECISION": "no"}


def test_every_file_has_its_expectation() -> None:
    assert {path.stem for path in CONFIGS} == EXPECTED.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_first_line_is_the_command(path: Path) -> None:
    command = written_command(path)
    assert command[2:4] == ["--config_file", f"accelerate_configs/{path.name}"]
    args = launch_command_parser().parse_args(command[2:])
    assert (args.module, args.training_script, args.training_script_args[0]) == (True, "finetune", "RECIPE")
    load_config_from_file(str(ROOT / args.config_file))
    # A recipe's overrides in the line are lawful.
    recipe = ROOT / "recipes" / "cpu_smoke.yaml"
    load_recipe(
        recipe,
        [
            *args.training_script_args[1:],
            f"data.train.0.path={ROOT}/data/chat_sample.jsonl",
            "training.gradient_checkpointing=false",
        ],
    )


def outcome(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """All that a file decides; for FSDP, what the processes will read from the environment."""
    try:
        args, environment = launch(path, "--main_process_ip", "10.0.0.1")
        plugin = None
        if "ACCELERATE_USE_FSDP" in environment:
            with monkeypatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                plugin = {name: str(value) for name, value in vars(FullyShardedDataParallelPlugin()).items()}
            environment = {name: value for name, value in environment.items() if not name.startswith("FSDP_")}
    except (AssertionError, AttributeError, KeyError, ValueError, RuntimeError) as error:
        return repr(error)
    return vars(args), environment, {k: re.sub(" at 0x.*", "", v) for k, v in (plugin or {}).items()}


OTHER = {
    "NO": "MULTI_GPU",
    "MULTI_GPU": "NO",
    "FSDP": "MULTI_GPU",
    "LOCAL_MACHINE": "AMAZON_SAGEMAKER",
    "no": "bf16",
    "0": "1",
    "TRANSFORMER_BASED_WRAP": "NO_WRAP",
    "SHARDED_STATE_DICT": "FULL_STATE_DICT",
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_is_read(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, before = yaml.safe_load(path.read_text(encoding="utf-8")), outcome(path, monkeypatch)
    assert isinstance(before, tuple)
    places: list[tuple[str, ...]] = [(key,) for key in config if key != "fsdp_config"]
    places += [("fsdp_config", key) for key in config.get("fsdp_config", {})]
    changed = tmp_path / "changed.yaml"
    for *above, key in places:
        other = copy.deepcopy(config)
        section = other[above[0]] if above else other
        value = section[key]
        section[key] = not value if isinstance(value, bool) else 2 * value if isinstance(value, int) else OTHER[value]
        changed.write_text(yaml.safe_dump(other), encoding="utf-8")
        assert outcome(changed, monkeypatch) != before, key


@pytest.mark.parametrize("key", ["same_network: true", "rdzv_backend: c10d"])
def test_keys_that_accelerate_does_not_read(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "accelerate_configs" / "fsdp_multinode.yaml"
    changed = tmp_path / "changed.yaml"
    changed.write_text(path.read_text(encoding="utf-8") + key + "\n", encoding="utf-8")
    assert outcome(changed, monkeypatch) == outcome(path, monkeypatch)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FullyShardedDataParallelPlugin]:
    """The plugin that accelerate makes of one of the sharded files, in a process that it has launched."""

    def make(stem: str = "fsdp", **variables: str) -> FullyShardedDataParallelPlugin:
        _, environment = launch(ROOT / "accelerate_configs" / f"{stem}.yaml", "--main_process_ip", "10.0.0.1")
        for name, value in (environment | variables).items():
            monkeypatch.setenv(name, value)
        return FullyShardedDataParallelPlugin()

    return make


@pytest.mark.parametrize("stem", ["fsdp", "fsdp_qlora", "fsdp_multinode"])
def test_the_plugin_of_the_sharded_files(stem: str, plugin: Callable[..., FullyShardedDataParallelPlugin]) -> None:
    made = plugin(stem)
    assert (made.fsdp_version, made.reshard_after_forward) == (2, True)
    assert made.auto_wrap_policy is transformer_auto_wrap_policy
    assert made.transformer_cls_names_to_wrap is None
    assert made.state_dict_type is StateDictType.SHARDED_STATE_DICT
    assert type(made.cpu_offload) is OffloadPolicy
    assert made.mixed_precision_policy is None
    assert (made.activation_checkpointing, made.cpu_ram_efficient_loading) == (False, False)


def tiny(family: str, lora: bool, dropout: float = 0.0) -> Any:
    model = AutoModelForCausalLM.from_pretrained(locate(f"random:{family}"))
    if lora:
        torch.manual_seed(0)
        options = {"r": 4, "target_modules": "all-linear", "lora_dropout": dropout, "init_lora_weights": False}
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    return model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_layers_are_the_units(
    family: str, lora: bool, plugin: Callable[..., FullyShardedDataParallelPlugin]
) -> None:
    model, made = tiny(family, lora), plugin()
    is_unit = fsdp2_prepare_auto_wrap_policy(made, model)
    units = [module for module in model.modules() if is_unit(module)]
    base = model.get_base_model() if lora else model
    assert units == list(base.model.layers)
    assert {type(unit).__name__ for unit in units} == {FAMILIES[family]}
    made.set_auto_wrap_policy(model)  # which accelerate does first, and which must find every class that it is told
    assert made.transformer_cls_names_to_wrap == [FAMILIES[family]]


def gradients(model: Any) -> torch.Tensor:
    ids = torch.arange(10, 42).reshape(2, 16)
    model.train()
    torch.manual_seed(1)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_dropout_is_the_same_when_a_layer_is_computed_again(
    plugin: Callable[..., FullyShardedDataParallelPlugin],
) -> None:
    whole = gradients(tiny("gemma", lora=True, dropout=0.3))
    own = tiny("gemma", lora=True, dropout=0.3)
    own.enable_input_require_grads()
    own.get_base_model().activation_checkpointing_enable()
    assert torch.equal(gradients(own), whole)
    # Why `fsdp_activation_checkpointing` is false; when this no longer holds, it may be true.
    made = plugin(FSDP_ACTIVATION_CHECKPOINTING="true")
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=made))
    theirs = gradients(fsdp2_apply_ac(accelerator, tiny("gemma", lora=True, dropout=0.3)))
    assert (theirs - whole).norm() > 0.5 * whole.norm()


# ---------------------------------------------------------------------------------------------------------------
# docs/distributed.md


def test_the_page_names_what_is_there() -> None:
    named = set(re.findall(r"(?:accelerate_configs|recipes)/\w+\.yaml", PAGE))
    assert [name for name in named if not (ROOT / name).is_file()] == []
    assert {f"accelerate_configs/{path.name}" for path in CONFIGS} <= named
    assert {"recipes/fsdp_sft.yaml", "recipes/fsdp_qlora.yaml"} <= named
    alone = set(re.findall(r"`(\w+\.yaml)`", PAGE))
    assert alone <= {path.name for path in CONFIGS} | {"recipe.yaml"}


@pytest.mark.parametrize("name", ["fsdp_sft", "fsdp_qlora"])
def test_the_recipes_for_sharding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(f"recipes/{name}.yaml")
    training, quantization = recipe.training, recipe.quantization
    processes = load_config_from_file(f"accelerate_configs/{'fsdp' if name == 'fsdp_sft' else name}.yaml").num_processes
    rows = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * processes
    assert rows == 32
    assert training["optim"] == "adamw_torch_fused"
    if quantization is None:
        assert recipe.lora is None
        assert (recipe.model.dtype, training["bf16"]) == ("float32", True)
    else:
        assert quantization["bnb_4bit_quant_storage"] == recipe.model.dtype == "bfloat16"


def shapes(hidden: int, layers: int, heads: int, groups: int, head: int, inner: int, norms: int) -> dict[str, int]:
    """The letters of the page's tables: parameters, embedding, layer, in 4 bit, adapter; and the largest matrix."""
    matrices = [(hidden, heads * head), (heads * head, hidden), *[(hidden, groups * head)] * 2, *[(hidden, inner)] * 3]
    embedding, linear = 256_000 * hidden, sum(a * b for a, b in matrices)
    layer = linear + norms * hidden
    adapter = 16 * sum(a + b for a, b in matrices) * layers
    whole = embedding + layers * layer + hidden
    return {"P": whole, "E": embedding, "L": layer, "Q": layers * linear, "A": adapter, "M": hidden * inner}


MODELS = {
    "gemma-7b": shapes(3072, 28, 16, 16, 256, 24576, 2),
    "gemma-2-9b": shapes(3584, 42, 16, 8, 256, 14336, 4),
    "gemma-2-27b": shapes(4608, 46, 32, 16, 128, 36864, 4),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_memory_table_is_its_formula(name: str) -> None:
    p, e, layer, q, a, matrix = (MODELS[name][letter] for letter in "PELQAM")
    ways = {
        "full": (16 * p, 2 * (e + 2 * layer) + 2 * (e + layer)),
        "lora": (2 * p + 16 * a, 2 * (e + 2 * layer)),
        "qlora": (q / 2 + 2 * (p - q) + 16 * a, 2 * e + layer + q / 63 + 2 * matrix),
    }
    cells = [" / ".join(f"{(parts / gpus + whole) / 1e9:.1f}" for gpus in (2, 4, 8)) for parts, whole in ways.values()]
    loading = f"{(q / 2 + q / 63 + 2 * (p - q)) / 1e9:.1f}"
    assert f"| {name} | {p / 1e9:.2f}e9 | {' | '.join(cells)} | {loading} |" in PAGE


def test_the_letters_are_those_of_the_models() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, GemmaConfig, GemmaForCausalLM

    nine = {"hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8}
    nine |= {"head_dim": 256, "intermediate_size": 14336, "vocab_size": 256_000}
    with torch.device("meta"):
        models = {"gemma-7b": GemmaForCausalLM(GemmaConfig()), "gemma-2-9b": Gemma2ForCausalLM(Gemma2Config(**nine))}
    for name, model in models.items():
        linear = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
        found = {
            "P": sum(p.numel() for p in model.parameters()),
            "E": model.get_input_embeddings().weight.numel(),
            "L": sum(p.numel() for p in model.model.layers[0].parameters()),
            "Q": sum(m.weight.numel() for m in linear),
            "A": 16 * sum(m.in_features + m.out_features for m in linear),
            "M": max(m.weight.numel() for m in linear),
        }
        assert found == MODELS[name]


SBATCH = re.search(r"```bash\n(#!/bin/bash\n.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(
    ("ends", "signalled", "code", "calls"),
    [
        ("exit 0", False, 0, ["srun"]),
        ("exit 1", False, 1, ["srun"]),
        ("sleep 20", True, 1, ["srun", "scancel --signal=TERM 7.0", "scontrol requeue 7"]),
    ],
    ids=["trained", "failed", "at the time limit"],
)
def test_the_job_goes_back_into_the_queue_when_it_was_stopped(
    ends: str, signalled: bool, code: int, calls: list[str], tmp_path: Path
) -> None:
    assert SBATCH
    script, log = tmp_path / "job.sh", tmp_path / "log"
    script.write_text(SBATCH[1], encoding="utf-8")
    commands = {
        # A step that ends with 1 on SIGTERM, as a launcher does when its processes have saved.
        "srun": f'trap "kill %1; exit 1" TERM; echo srun >> "{log}"; echo $$ > "{tmp_path}/pid"\n'
        f'printf "%s\\n" "$@" > "{tmp_path}/step"; ({ends}) & wait $!',
        "scancel": f'echo "scancel $*" >> "{log}"; kill -TERM $(cat "{tmp_path}/pid")',
        "scontrol": f'[ "$1" = show ] && printf "one\\ntwo\\n" || echo "scontrol $*" >> "{log}"',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "64"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen(["/bin/bash", str(script)], env=environment)
    try:
        if signalled:
            while not (tmp_path / "step").exists() and job.poll() is None:
                time.sleep(0.02)
            job.terminate()
        assert job.wait(20) == code
    finally:
        job.kill()
    assert log.read_text().splitlines() == calls
    # What each machine runs, with its own number in.
    step = (tmp_path / "step").read_text()
    assert step.startswith("--cpus-per-task=64\nbash\n-c\nexec accelerate launch ")
    line = subprocess.run(
        ["/bin/bash", "-c", f'set -- {step.split("exec ", 1)[1]}\nprintf "%s\\n" "$@"'],
        env=environment | {"SLURM_NODEID": "1", "MAIN": "one"},
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout.split("\n")[2:-1]
    args = launch_command_parser().parse_args(line)
    found = (args.num_machines, args.num_processes, args.machine_rank, args.main_process_ip, args.training_script)
    assert found == (2, 16, 1, "one", "finetune")
    assert (ROOT / args.config_file).is_file()
    recipe, *overrides = args.training_script_args
    assert load_recipe(ROOT / recipe, overrides).training["resume_from_checkpoint"] is True
