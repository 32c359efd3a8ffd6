"""Answers in each type, on each kind of device that is here, compiled or not: through the command line."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune.cli.generate
from finetune.cli.commands import main
from finetune.data.chat import Chat
from finetune.model import generate
from finetune.model.generate import Generator, Sampling
from finetune.model.load_generator import LoadOptions, load_generator

Write = Callable[..., Path]
ASKED = [{"role": "user", "content": "What is a fox, and where does it live?"}]


@pytest.mark.parametrize(
    "flags",
    [
        ["--dtype", "float32", "--device", "auto"],
        ["--dtype", "bfloat16"],
        ["--dtype", "float16", "--attn", "eager"],
        ["--quantize", "int8"],
        ["--quantize", "nf4", "--device", "auto"],
    ],
    ids=" ".join,
)
def test_each_way_answers(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "random:gemma2", "--prompt", "Hello", "--max-new-tokens", "4", *flags]) == 0
    assert capsys.readouterr().err.splitlines()[-1:] in ([], ["(did not stop within 4 tokens)"])


def test_spread_over_all_devices_it_says_the_same() -> None:
    one, other = (
        load_generator("random:gemma3", LoadOptions(device=device)).answer_ids(ASKED, Sampling(12))
        for device in ("cpu", "auto")
    )
    assert one == other


@pytest.mark.parametrize("architecture", ["gemma3", "gemma4", "llama"])
@pytest.mark.slow
def test_answers_that_have_ended_leave_the_batch(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the others stay what they are alone, behind prompts of different lengths and beyond the sliding window."""
    generator = load_generator(f"random:{architecture}", LoadOptions(dtype="float32"))
    texts = ["Hi", "What is a fox, and what does it eat in winter, where the snow lies deep? " * 3, "Why?", "日本で"]
    prompts = [generator.prompt_ids([{"role": "user", "content": text}]) for text in texts]
    alone = [generator.answer_ids([{"role": "user", "content": text}], Sampling(40)) for text in texts]
    assert {len(answer) for answer in alone} == {40}
    # The answers end at their fourth, tenth and 21st token, one not at all; or before, where they say these tokens.
    stops = {alone[0][3], alone[1][20], alone[2][9]} - {*alone[3]}
    generator = replace(generator, stop_ids=tuple(stops))
    ends = [next((i + 1 for i, token in enumerate(answer) if token in stops), 40) for answer in alone]
    assert len({*ends}) > 2
    sizes: list[int] = []
    forward = generator.model.forward

    def counted(*arguments: Any, **options: Any) -> Any:
        sizes.append(len(options["input_ids"]))
        return forward(*arguments, **options)

    monkeypatch.setattr(generator.model, "forward", counted)
    assert generator.answers(prompts, 40) == [answer[:end] for answer, end in zip(alone, ends, strict=True)]
    rounds = [-(-end // generate._ROUND) * generate._ROUND for end in ends]
    # The last answer leaves when it ends, not at the end of its round.
    assert sum(sizes) == sum(rounds) - max(rounds) + max(ends)


@pytest.mark.slow
@pytest.mark.skipif(" " in sys.prefix, reason="torch 2.13 gives the compiler paths without quotation marks")
# torch 2.13 warns of what its own compiler does, and of how transformers 5.23 asks for it.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("architecture", "backend"),
    [
        ("gemma3", "eager"),
        pytest.param("gemma3", "inductor", marks=pytest.mark.soak),
        pytest.param("gemma2", "inductor", marks=pytest.mark.soak),
    ],
)
def test_compiled_it_says_the_same(architecture: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is compiled: torch has made graphs of it. Inductor, users' backend, takes over a minute for them."""
    compile_model = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, **options: compile_model(model, **options | {"backend": backend})
    )
    from torch._dynamo.utils import counters

    uncompiled = load_generator(f"random:{architecture}", LoadOptions(device="cpu", dtype="float32"))
    plain = uncompiled.answer_ids(ASKED, Sampling(6))
    torch._dynamo.reset()
    counters.clear()
    compiled = load_generator(f"random:{architecture}", LoadOptions(device="cpu", dtype="float32", compiled=True))
    assert compiled.answer_ids(ASKED, Sampling(6)) == plain
    assert counters["stats"]["unique_graphs"] > 0


def test_what_cannot_be_compiled_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "random:gemma3", "--prompt", "Hi", "--quantize", "int8", "--compile"]
    code = main([*arguments, "--max-new-tokens", "2"])
    said = capsys.readouterr().err
    assert (code, said) == (
        2,
        "error: --compile: random:gemma3 is quantised in a way that torch cannot compile; leave out --compile\n",
    )


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--temperature", "-1"], "argument --temperature: is '-1'; write 0 or more"),
        (["--temperature", "hot"], "argument --temperature: is 'hot'; write a number"),
        (["--temperature", "inf"], "argument --temperature: is 'inf'; write 0 or more"),
        (["--top-p", "0"], "argument --top-p: is '0'; write a number above 0, and 1 at most"),
        (["--top-p", "nan"], "argument --top-p: is 'nan'; write a number above 0, and 1 at most"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_sampling_that_there_is_none_of(flags: list[str], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", "random:gemma3", "--prompt", "Hi", *flags])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"finetune generate: error: {fault}"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["random:gemma3", "--device", "tpu"], "--device: is tpu, which this machine does not have; write cpu, "),
        (
            ["random:gema"],
            "model.name_or_path: is random:gema; write one of random:gemma, random:gemma2, random:gemma3, ",
        ),
    ],
)
def test_what_is_not_there_is_one_line(arguments: list[str], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *arguments, "--prompt", "Hi"]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {fault}")


@pytest.mark.slow
def test_what_a_run_says_and_this_device_has_not_is_told_of_the_run(
    write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not of a flag that nobody wrote."""
    assert main([str(write_recipe()), "--quiet"]) == 0
    saved = Path("run/recipe.yaml")
    text = saved.read_text()
    wanted = text.replace("attn_implementation: null", "attn_implementation: flash_attention_2")
    assert wanted != text
    saved.write_text(wanted)
    capsys.readouterr()
    assert main(["generate", "run", "--prompt", "Hi", "--device", "cpu"]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("error: run: model.attn_implementation: is flash_attention_2, which needs a GPU")
    arguments = ["generate", "run", "--prompt", "Hi", "--device", "cpu", "--max-new-tokens", "1"]
    assert main([*arguments, "--attn", "sdpa"]) == 0


TOOL = {"name": "weather", "description": "The weather at a place.", "parameters": {"type": "object", "properties": {}}}


def test_tools_and_variables_reach_the_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the template renders them; a special token inside the answer is shown, the stop token is not."""
    generator = load_generator("random:gemma4", LoadOptions(device="cpu"))
    chat = generator.chat
    fed: list[str] = []
    call = chat.tokenizer.convert_tokens_to_ids("<start_of_turn>")

    def say_a_call(self: Generator, ids: torch.Tensor, *args: object, streamer: Any, **kwargs: object) -> torch.Tensor:
        fed.append(chat.tokenizer.decode(ids[0]))
        streamer.put(ids)
        answer = [call, *chat.tokenizer("ok", add_special_tokens=False)["input_ids"], self.stop_ids[0]]
        for token in answer:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.tensor([[*ids[0].tolist(), *answer]])

    chat.tokenizer.chat_template = (
        "{{ bos_token }}{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
        "{{ '!' if enable_thinking else '?' }}{{ messages[-1].content }}"
    )
    monkeypatch.setattr(finetune.cli.generate, "load_generator", lambda *args, **kwargs: generator)
    monkeypatch.setattr(Generator, "_generate", say_a_call)
    monkeypatch.chdir(tmp_path)
    Path("tools.json").write_text(json.dumps([TOOL]))
    flags = ["--tools", "tools.json", "--chat-template-kwargs", '{"enable_thinking": true}']
    assert main(["generate", "any", "--prompt", "Hi", *flags]) == 0
    assert fed == ["<bos>weather!Hi"]
    assert capsys.readouterr().out == "<start_of_turn>ok\n"
    chat.tokenizer.chat_template = "{{ bos_token }}{{ messages[-1].content }}"
    generator = replace(generator, chat=Chat(chat.tokenizer))
    assert main(["generate", "any", "--prompt", "Hi", "--tools", "tools.json"]) == 2
    assert capsys.readouterr().err == "error: --tools: the chat template leaves the tools out\n"


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--tools", "none.json"], "--tools: none.json: No such file or directory"),
        (["--tools", "text.json"], "--tools: text.json: its tools are not a list of functions; write "),
        (["--chat-template-kwargs", "true"], "--chat-template-kwargs: is true; write a map in JSON, such as "),
        (["--chat-template-kwargs", "{"], "--chat-template-kwargs: is {; write a map in JSON, such as "),
    ],
    ids=["no file", "no function", "no map", "no JSON"],
)
def test_tools_and_variables_that_cannot_be_read(
    flags: list[str], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.json").write_text('"weather"')
    assert main(["generate", "random:gemma3", "--prompt", "Hi", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {fault}")
