"""Prompts that a server answers: what it is sent, and how its failures are told."""

import json
from typing import Any

import pytest
from judge_server import Answer, Request, error, says, serve

from finetune.evaluate import endpoint
from finetune.evaluate.prompts import Prompt
from finetune.evaluate.served import ServedModel
from finetune.recipe.schema import ServerSection
from finetune.system.errors import EvaluateError

TOOL: Any = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}
ASKED: Any = ({"role": "user", "content": "Hi"},)


def tokens_of(text: str) -> list[int]:
    return list(text.encode())


def served(url: str, model: str | None = "tiny", key: str = "", run: str = "runs/mine", **keys: Any) -> ServedModel:
    return ServedModel(ServerSection(base_url=url, model=model, **keys), key, run, 7, lambda line: None)


def echo(request: Request) -> Answer:
    return says(f"to {request.body['messages'][-1]['content']}", tokens=(5, 3))


def test_the_next_question_follows_the_servers_own_answer() -> None:
    prompts = [Prompt("a", ASKED, ("And then?",)), Prompt("b", ({"role": "user", "content": "Bye"},))]
    counts: list[int] = []
    with serve(echo) as server:
        answers = served(server.url).answers(prompts, tokens_of, counts.append)
    assert [answer.text for answer in answers] == ["to Hi", "to And then?", "to Bye"]
    assert [answer.tokens for answer in answers] == [3, 3, 3]
    assert [answer.prompt.name for answer in answers] == ["a", "a", "b"]
    assert all(answer.stopped for answer in answers)
    assert sum(counts) == 3
    followed = next(r.body for r in server.requests if len(r.body["messages"]) == 3)
    assert followed == {
        "model": "tiny",
        "messages": [*ASKED, {"role": "assistant", "content": "to Hi"}, {"role": "user", "content": "And then?"}],
        "temperature": 0,
        "max_tokens": 7,
    }
    assert not any("authorization" in request.headers for request in server.requests)


def test_a_row_of_calls_is_sent_as_the_api_takes_it_and_a_call_is_an_answer() -> None:
    call = {"type": "function", "function": {"name": "tide", "arguments": {"port": "Brest"}}}
    messages: Any = (
        *ASKED,
        {"role": "assistant", "content": "", "tool_calls": [call, call | {"id": "own"}]},
        {"role": "tool", "content": "4 m", "name": "tide"},
        {"role": "tool", "content": "5 m", "tool_call_id": "own"},
    )
    reply = says(None, tokens=None)
    reply.body["choices"][0]["message"]["tool_calls"] = [{"id": "x", "function": {"name": "tide", "arguments": "{}"}}]
    prompt = Prompt("a", messages, variables={"enable_thinking": False}, tools=[TOOL])
    with serve(lambda request: reply) as server:
        (answer,) = served(server.url, key="a-key-of-a-test").answers([prompt], tokens_of)
    text = '[{"name": "tide", "arguments": "{}"}]'
    assert (answer.text, answer.calls, answer.tokens) == (text, ["tide"], len(text))
    (request,) = server.requests
    assert request.headers["authorization"] == "Bearer a-key-of-a-test"
    assert request.body["tools"] == [TOOL]
    assert request.body["chat_template_kwargs"] == {"enable_thinking": False}
    sent = request.body["messages"]
    assert [c["id"] for c in sent[1]["tool_calls"]] == ["call_1_0", "own"]
    assert [json.loads(c["function"]["arguments"]) for c in sent[1]["tool_calls"]] == [{"port": "Brest"}] * 2
    assert [m["tool_call_id"] for m in sent[2:]] == ["call_1_0", "own"]


def test_an_answer_that_the_limit_cuts_says_so() -> None:
    with serve(lambda request: says("one one one one one one", finish="length")) as server:
        (answer,) = served(server.url).answers([Prompt("a", ASKED)], lambda text: [1] * 6)
    assert not answer.stopped
    assert answer.repetition == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("models", "run", "name"),
    [(["gemma.gguf"], "runs/mine", "gemma.gguf"), (["base", "mine"], "runs/mine", "mine"), (["a", "b"], "b", "b")],
)
def test_the_model_is_the_only_one_or_the_one_named_as_the_run(models: list[str], run: str, name: str) -> None:
    with serve(echo, models=[{"id": model} for model in models]) as server:
        model = served(server.url, model=None, run=run)
        assert model.name == f"{name} at {server.url}"
        model.answers([Prompt("a", ASKED)], tokens_of)
    assert server.requests[0].body["model"] == name


def test_several_models_none_of_which_is_the_run() -> None:
    with serve(echo, models=[{"id": "a"}, {"id": "b"}]) as server, pytest.raises(EvaluateError) as caught:
        served(server.url, model=None)
    assert str(caught.value) == f"evaluate.server.model: {server.url} serves 2 models; write one of a, b"


@pytest.mark.parametrize("models", [[], None, [{}], 3])
def test_a_list_without_models(models: Any) -> None:
    with serve(echo, models=models) as server, pytest.raises(EvaluateError) as caught:
        served(server.url, model=None)
    wanted = f"{server.url}/models lists no models (HTTP 200); write evaluate.server.model"
    assert str(caught.value) == f"evaluate.server.base_url: {wanted}"


def test_nobody_there_is_told_before_anything_is_loaded() -> None:
    with pytest.raises(
        EvaluateError, match=r"^evaluate\.server\.base_url: http://127\.0\.0\.1:1/v1 cannot be reached: "
    ):
        served("http://127.0.0.1:1/v1", model=None)


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        (error(400, "too long"), "evaluate.server: prompt a: the endpoint refused it: HTTP 400 too long"),
        (
            error(401),
            "evaluate.server.base_url: {} needs a key (HTTP 401); put one from its provider into the environment "
            "variable FINETUNE_SERVER_KEY",
        ),
        (error(500), "evaluate.server.base_url: {} failed 6 times: HTTP 500 no; run it again later"),
    ],
)
def test_a_server_that_fails(reply: Answer, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_wait", lambda stop, seconds: stop.is_set())
    prompts = [Prompt("a", ASKED), *(Prompt(f"b{n}", ({"role": "user", "content": f"b{n}"},)) for n in range(50))]
    with serve(lambda request: reply if request.question == "Hi" else echo(request)) as server:
        with pytest.raises(EvaluateError) as caught:
            served(server.url, workers=1).answers(prompts, tokens_of)
        assert str(caught.value) == line.format(server.url)
    # What has not begun is not asked.
    assert len(server.requests) < 20
