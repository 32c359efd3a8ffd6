"""Which rows are trained and evaluated on: weights, duplicates, leaks, streams, mending; and what is kept on disk."""

import copy
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.commands import main
from finetune.data import cache as data_cache
from finetune.data.chat import Chat
from finetune.data.language import language
from finetune.data.ledger import Ledger
from finetune.data.mixture import Prepared, build_datasets
from finetune.data.prepare import prepare
from finetune.data.row_result import RowResult
from finetune.data.template import set_system_role
from finetune.model.load import load_tokenizer
from finetune.recipe.schema import DataSection, ModelSection
from finetune.system.cache import cache_dir
from finetune.system.errors import DataError, TemplateError


@cache
def chat(template: str = "gemma3", system_role: str = "template") -> Chat:
    model = {"name_or_path": "random:gemma3", "chat_template": template, "system_role": system_role}
    return Chat(load_tokenizer(ModelSection.model_validate(model)))


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def talk(*said: str, system: str | None = None) -> dict[str, Any]:
    roles = ("user", "assistant")
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": first + [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]}


def jsonl(name: str, *rows: Any) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def numbered(name: str, count: int, first: int = 0) -> str:
    return jsonl(name, *(talk(f"{name} {n}", f"answer {n}") for n in range(first, first + count)))


def section(*train: Any, **keys: Any) -> DataSection:
    sources = [{"path": source} if isinstance(source, str) else source for source in train]
    return DataSection.model_validate({"train": sources, **keys})


def names(prepared: Prepared) -> list[str]:
    return [] if prepared.dataset is None else [row["row"] for row in prepared.dataset]


def texts(prepared: Prepared, own: Chat) -> list[str]:
    assert prepared.dataset is not None
    return [own.tokenizer.decode(row["input_ids"]) for row in prepared.dataset]


def fault(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------
# Mixtures


@pytest.mark.slow
def test_weights_and_samples() -> None:
    a, b, c = numbered("a.jsonl", 10), numbered("b.jsonl", 4), numbered("c.jsonl", 5)
    mixture = section({"path": a, "weight": 0.3}, {"path": b, "weight": 2.5}, {"path": c, "samples": 7})
    train, _ = build_datasets(mixture, chat(), None)
    count = Counter(name.split(":")[0] for name in names(train))
    assert count == {"a.jsonl": 3, "b.jsonl": 10, "c.jsonl": 7}
    of_b, of_c = (Counter(name for name in names(train) if name.startswith(source)) for source in (b, c))
    assert sorted(of_b.values()) == [2, 2, 3, 3]
    assert sorted(of_c.values()) == [1, 1, 1, 2, 2]
    ledger = train.ledger
    assert (ledger.read, ledger.kept, ledger.repeated) == (19, 20, 8)
    assert ledger.dropped == {"not drawn (weight or samples)": 7}
    assert {name: account["rows"] for name, account in ledger.sources.items()} == count
    # The same rows in the same order each time; another seed draws others.
    assert names(build_datasets(mixture, chat(), None)[0]) == names(train)
    assert names(build_datasets(mixture.model_copy(update={"seed": 1}), chat(), None)[0]) != names(train)


def test_the_draw_is_the_same_everywhere() -> None:
    """The very rows, as any machine must draw them."""
    path = numbered("a.jsonl", 10)
    assert names(build_datasets(section({"path": path, "samples": 3}), chat(), None)[0]) == [
        "a.jsonl:2",
        "a.jsonl:7",
        "a.jsonl:8",
    ]


def test_two_equal_sources_draw_different_rows() -> None:
    source = {"path": numbered("a.jsonl", 10), "samples": 3}
    got = names(build_datasets(section(source, source, deduplicate=False), chat(), None)[0])
    assert got[:3] == ["a.jsonl:2", "a.jsonl:7", "a.jsonl:8"]
    assert got[3:] != got[:3]
    other = {"path": numbered("b.jsonl", 4)}
    held_out = [build_datasets(section(other, eval=[source] * n), chat(), None)[1] for n in (1, 2)]
    assert names(held_out[1])[:3] == names(held_out[0])
    assert names(held_out[1])[3:] != names(held_out[0])


def test_samples_of_evaluation_rows() -> None:
    held = {"path": numbered("held.jsonl", 9), "samples": 4}
    train, evaluation = build_datasets(section(numbered("a.jsonl", 3), eval=[held]), chat(), None)
    assert (len(names(train)), len(names(evaluation))) == (3, 4)


def test_filter() -> None:
    rows = [talk(str(n), "x") | {"lang": lang} for n, lang in enumerate(["ja", "en", None, "ja", "de"])]
    source = {"path": jsonl("a.jsonl", *rows), "filter": {"lang": ["ja", "de"]}}
    train, _ = build_datasets(section(source), chat(), None)
    assert names(train) == ["a.jsonl:1", "a.jsonl:4", "a.jsonl:5"]
    assert train.ledger.dropped == {"left out by filter": 2}
    source["filter"] = {"language": "ja"}
    assert fault(lambda: build_datasets(section(source), chat(), None)).startswith("a.jsonl: filter: ")


# ---------------------------------------------------------------------------------------------------------------
# Duplicates and leaks


def test_duplicates() -> None:
    a = jsonl("a.jsonl", talk("a", "b"), talk("a", "b "), talk("a", "c"))
    b = jsonl("b.jsonl", talk("a", "c"), talk("d", "e"))
    train, _ = build_datasets(section(a, b), chat(), None)
    # Gemma trims, so the second row is the first to the model.
    assert names(train) == ["a.jsonl:1", "a.jsonl:3", "b.jsonl:2"]
    assert train.ledger.dropped == {"exact duplicates": 2}
    assert len(names(build_datasets(section(a, b, deduplicate=False), chat(), None)[0])) == 5


def test_what_is_trained_on_is_part_of_a_row() -> None:
    silent = talk("a", "b", "c", "d")
    silent["messages"][1]["train"] = False
    path = jsonl("a.jsonl", silent, talk("a", "b", "c", "d"))
    assert len(names(build_datasets(section(path), chat(), None)[0])) == 2


def test_rows_that_are_also_evaluated_on() -> None:
    a, held = numbered("a.jsonl", 4), jsonl("held.jsonl", talk("a.jsonl 2", "answer 2"), talk("other", "row"))
    train, evaluation = build_datasets(section(a, eval=[{"path": held}]), chat(), None)
    assert names(train) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4"]
    assert train.ledger.dropped == {"also in the evaluation rows": 1}
    assert len(names(evaluation)) == 2
    assert fault(lambda: build_datasets(section(a, eval=[{"path": held}], deduplicate=False), chat(), None)) == (
        "a.jsonl:3: this row is also in the evaluation rows; take it out, or write data.deduplicate: true"
    )


@pytest.mark.parametrize("deduplicate", [True, False])
def test_a_row_and_its_copies_are_held_out_together(deduplicate: bool) -> None:
    rows = [talk(str(n % 10), "x") for n in range(40)]
    own = section(jsonl("a.jsonl", *rows), eval_fraction=0.3, deduplicate=deduplicate)
    train, evaluation = build_datasets(own, chat(), None)
    kept, held = set(texts(train, chat())), set(texts(evaluation, chat()))
    assert (len(kept), len(held), kept & held) == (7, 3, set())
    assert train.ledger.read + evaluation.ledger.read == 40
    assert (train.ledger.kept, evaluation.ledger.kept) == ((7, 3) if deduplicate else (28, 12))


def test_the_same_text_with_other_labels_is_a_leak() -> None:
    a = jsonl("a.jsonl", talk("a", "b", "c", "d"), talk("e", "f"))
    held = jsonl("held.jsonl", {"prompt": talk("a", "b", "c")["messages"], "completion": "d"})
    train, evaluation = build_datasets(section(a, eval=[{"path": held}]), chat(), None)
    assert (names(train), train.ledger.dropped) == (["a.jsonl:2"], {"also in the evaluation rows": 1})
    assert evaluation.ledger.trained_tokens < 5


def test_columns_are_meant_to_be_read() -> None:
    row = {"instruction": "Say hi", "input": "", "output": "Hi", "style": "formal"}
    columns = {"prompt": "[{style}] {instruction}", "completion": "output"}
    train, _ = build_datasets(section({"path": jsonl("a.jsonl", row), "columns": columns}), chat(), None)
    assert texts(train, chat())[0].startswith("<bos><start_of_turn>user\n[formal] Say hi<end_of_turn>")


# ---------------------------------------------------------------------------------------------------------------
# Mending


def said(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def test_an_opening_and_a_closing() -> None:
    rows = [
        said(("assistant", "Welcome"), ("user", "a"), ("assistant", "b")),
        said(("system", "s"), ("assistant", "Welcome"), ("user", "a"), ("assistant", "c"), ("user", "Thanks")),
        said(("user", "a"), ("assistant", "d"), ("user", "e"), ("user", "f")),
    ]
    train, _ = build_datasets(section(jsonl("a.jsonl", *rows)), chat("chatml"), None)
    assert train.ledger.mended == {
        "rows whose opening assistant message was removed": 2,
        "rows whose messages after the last assistant turn were removed": 2,
    }
    ask, end = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"
    assert texts(train, chat("chatml")) == [
        f"<bos>{ask}b{end}",
        f"<bos><|im_start|>system\ns<|im_end|>\n{ask}c{end}",
        f"<bos>{ask}d{end}",
    ]
    # Where everything is trained on, what follows the last answer is, too.
    train, _ = build_datasets(section("a.jsonl", train_on="all"), chat("chatml"), None)
    assert train.ledger.mended == {"rows whose opening assistant message was removed": 2}
    assert texts(train, chat("chatml"))[1].endswith("<|im_start|>user\nThanks<|im_end|>\n")


def test_messages_of_one_role() -> None:
    row = said(("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"))
    path = jsonl("a.jsonl", row)
    assert "roles must alternate" in fault(lambda: build_datasets(section(path), chat(), None))
    train, _ = build_datasets(section(path, merge_same_role=True), chat(), None)
    assert texts(train, chat()) == [
        "<bos><start_of_turn>user\na\n\nb<end_of_turn>\n<start_of_turn>model\nc\n\nd<end_of_turn>\n"
    ]
    assert train.ledger.mended == {"rows with messages of one role merged": 1}
    # What is not text stays what it is: no text.
    jsonl("b.jsonl", {"messages": [{"role": "user", "content": None}, *said(("user", "b"))["messages"]]})
    assert "its content is NoneType" in fault(
        lambda: build_datasets(section("b.jsonl", merge_same_role=True), chat(), None)
    )
    # One that is trained on and one that is not stay two.
    row["messages"][2]["train"] = False
    jsonl("a.jsonl", row)
    assert "roles must alternate" in fault(lambda: build_datasets(section(path, merge_same_role=True), chat(), None))


HIDES = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_each_exchange_alone_where_earlier_thinking_is_hidden() -> None:
    own = copy.deepcopy(chat("chatml").tokenizer)
    own.chat_template = HIDES
    row = talk("a", "b", "c", "d", "e", "f")
    for i in (1, 3, 5):
        row["messages"][i]["reasoning_content"] = f"think {i}"
    row["messages"][3]["train"] = False
    path = jsonl("a.jsonl", row)
    train, _ = build_datasets(section(path), Chat(own), None)
    assert train.dataset is not None
    labelled = [own.decode([i for i in piece["labels"] if i >= 0]) for piece in train.dataset]
    assert labelled == ["<think>think 1</think>b<|im_end|>", "<think>think 5</think>f<|im_end|>"]
    for piece, end in zip(train.dataset, (2, 6), strict=True):
        assert piece["input_ids"] == own.apply_chat_template(row["messages"][:end], return_dict=False)
    assert (train.ledger.read, train.ledger.kept, train.ledger.split) == (1, 2, 1)
    assert [why.partition(",")[0] for why in train.ledger.mended] == ["rows split into one row per exchange"]
    last, _ = build_datasets(section(path, train_on="last_assistant"), Chat(own), None)
    assert (last.ledger.kept, last.ledger.mended) == (1, {})
    # One exchange that does not fit is lost, not the others.
    room = len(train.dataset[0]["input_ids"])
    cut, _ = build_datasets(section(path), Chat(own), room)
    assert (cut.ledger.kept, cut.ledger.lost_tokens) == (1, sum(i >= 0 for i in train.dataset[1]["labels"]))
    with pytest.raises(DataError, match=r"leaves out its thinking; data\.train_on: last_assistant"):
        build_datasets(section(path, train_on="all"), Chat(own), None)


CALL = [{"name": "look", "arguments": {"at": "it"}}]
TOOLS = [{"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}]


def test_tools() -> None:
    row = said(("user", "a"), ("assistant", ""), ("tool", "seen"), ("assistant", "b"))
    row["messages"][1]["tool_calls"] = CALL
    path = jsonl("a.jsonl", row | {"tools": json.dumps(TOOLS)})
    train, _ = build_datasets(section(path), chat("chatml"), None)
    assert train.dataset is not None
    labels = [label for label in train.dataset[0]["labels"] if label >= 0]
    assert chat("chatml").tokenizer.decode(labels) == (
        '<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call><|im_end|>b<|im_end|>'
    )
    [text] = texts(train, chat("chatml"))
    assert '"description": "Looks."' in text
    assert "<|im_start|>tool\nseen<|im_end|>" in text
    assert not train.ledger.mended
    # Gemma has no place for them.
    path = jsonl("a.jsonl", talk("a", "b") | {"tools": TOOLS})
    train, _ = build_datasets(section(path), chat(), None)
    assert train.ledger.mended == {"rows whose tools the chat template leaves out": 1}


SYSTEM = talk("Hi", "Yo", system=" Be brief. ")
TURN = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\nYo<end_of_turn>\n"


@pytest.mark.parametrize(
    ("template", "system_role", "text"),
    [
        ("gemma3", "template", "<bos>" + TURN.format(" Be brief. \n\nHi")),
        ("gemma3", "fold", "<bos>" + TURN.format("Be brief.\n\nHi")),
        ("gemma", "fold", "<bos>" + TURN.format("Be brief.\n\nHi")),
        ("gemma", "turn", "<bos><start_of_turn>system\nBe brief.<end_of_turn>\n" + TURN.format("Hi")),
        ("gemma3", "turn", "<bos><start_of_turn>system\nBe brief.<end_of_turn>\n" + TURN.format("Hi")),
        ("chatml", "fold", "<bos><|im_start|>user\nBe brief.\n\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"),
    ],
)
def test_system_roles(template: str, system_role: str, text: str) -> None:
    own = chat(template, system_role)
    train, _ = build_datasets(section(jsonl("a.jsonl", SYSTEM)), own, None)
    assert texts(train, own) == [text]
    assert own.tokenizer.decode(own.encode(SYSTEM["messages"]).input_ids) == text
    # Without a system message the choice changes nothing.
    plain = talk("Hi", "Yo")["messages"]
    assert own.render(plain) == chat(template).render(plain)


def test_a_system_text_in_parts() -> None:
    parts = [{"role": "system", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": " brief."}]}]
    for role, text in (("fold", "user\nBe brief.\n\nHi"), ("turn", "system\nBe brief.<end_of_turn>\n")):
        tokenizer = chat("gemma", role).tokenizer
        rendered = tokenizer.apply_chat_template([*parts, *talk("Hi", "Yo")["messages"]], tokenize=False)
        assert f"<start_of_turn>{text}" in rendered


def test_more_than_a_header_before_the_first_turn() -> None:
    """A default system text would be written twice."""
    own = copy.deepcopy(chat("chatml").tokenizer)
    own.chat_template = "<|im_start|>system\nI help.<|im_end|>\n" + own.chat_template.replace("{{- bos_token -}}", "")
    with pytest.raises(TemplateError, match="system_role: turn cannot be given"):
        set_system_role(own, "turn")


def test_a_template_that_begins_with_a_line_break() -> None:
    own = copy.deepcopy(chat("chatml").tokenizer)
    own.chat_template = "\n  {{ 'x' }}" + own.chat_template
    plain = own.apply_chat_template(talk("a", "b")["messages"], tokenize=False)
    set_system_role(own, "fold")
    assert own.apply_chat_template(talk("a", "b")["messages"], tokenize=False) == plain


def test_a_system_text_can_be_refused() -> None:
    jsonl("a.jsonl", SYSTEM)
    assert fault(lambda: build_datasets(section("a.jsonl"), chat("gemma3", "error"), None)) == (
        "a.jsonl:1: the chat template refuses it: there is a system message, and model.system_role is error; "
        "mend the row, or write data.on_bad_row: skip"
    )


@pytest.mark.slow
def test_the_saved_model_renders_as_it_was_trained(write_recipe: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    path = write_recipe(
        model={"name_or_path": "random:gemma", "chat_template": "gemma", "system_role": "turn"},
        data={"train": [{"path": jsonl("a.jsonl", SYSTEM)}]},
        training={"max_steps": 1},
    )
    assert main(["train", "--quiet", str(path)]) == 0
    saved = AutoTokenizer.from_pretrained("run")
    assert saved.apply_chat_template(SYSTEM["messages"], tokenize=False) == (
        "<bos><start_of_turn>system\nBe brief.<end_of_turn>\n" + TURN.format("Hi")
    )


# ---------------------------------------------------------------------------------------------------------------
# On disk


def folders() -> list[Path]:
    return sorted(path for path in (cache_dir() / "data").iterdir() if path.is_dir())


def test_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    path = numbered("a.jsonl", 5)
    first, _ = build_datasets(section(path), chat(), 100)
    monkeypatch.setattr(data_cache, "prepare", None)  # from now on there is nothing to prepare with
    again, _ = build_datasets(section(path, seed=7, deduplicate=False), chat(), 100)
    assert first.dataset is not None
    assert again.dataset is not None
    assert first.dataset.to_list() == again.dataset.to_list()
    assert first.ledger == again.ledger
    assert len(folders()) == 1


def test_whatever_decides_the_tokens_prepares_anew() -> None:
    a = numbered("a.jsonl", 5)
    seen = []

    def prepared(max_length: int | None = 100, own: Chat | None = None, **keys: Any) -> None:
        build_datasets(section(a, **keys), own or chat(), max_length)
        seen.append(len(folders()))

    prepared()
    prepared(max_length=99)
    prepared(train_on="last_assistant")
    prepared(on_overflow="split")
    prepared(on_bad_row="skip")
    prepared(merge_same_role=True)
    prepared(own=chat("gemma"))
    prepared(own=chat("gemma3", "fold"))
    numbered("a.jsonl", 6)
    prepared()
    prepared()
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]


def test_a_changed_template_never_meets_old_tokens(workdir: Path) -> None:
    text = chat().tokenizer.chat_template
    path = numbered("a.jsonl", 1)
    for name in ("model", "assistant"):
        (workdir / "own.jinja").write_text(
            text.replace("<start_of_turn>model", f"<start_of_turn>{name}").replace("'model'", f"'{name}'"),
            encoding="utf-8",
        )
        own = Chat(load_tokenizer(ModelSection(name_or_path="random:gemma3", chat_template="own.jinja")))
        assert f"<start_of_turn>{name}\n" in texts(build_datasets(section(path), own, None)[0], own)[0]


def test_only_code_of_this_package_prepares_anew(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = workdir / "finetune"
    shutil.copytree(Path(data_cache.__file__).parents[1], package)
    monkeypatch.setattr(data_cache, "__file__", str(package / "data" / "cache.py"))
    path = numbered("a.jsonl", 2)
    seen = []
    for changed in (None, "hub/card.py", "system/pages.py", "data/chat.py", "data/turns.py"):
        if changed:
            (package / changed).write_text("# changed\n", encoding="utf-8")
        build_datasets(section(path), chat(), None)
        seen.append(len(folders()))
    assert seen == [1, 1, 1, 2, 3]


def test_a_fault_leaves_nothing_behind() -> None:
    path = jsonl("a.jsonl", talk("a", "b"), {"messages": []})
    for _ in range(2):
        assert fault(lambda: build_datasets(section(path), chat(), None)).startswith("a.jsonl:2: it has no messages")
    assert folders() == []


def test_a_process_that_died_is_no_hindrance() -> None:
    path = numbered("a.jsonl", 3)
    build_datasets(section(path), chat(), None)
    [folder] = folders()
    folder.rename(folder.with_name(f".{folder.name}.part"))
    assert len(names(build_datasets(section(path), chat(), None)[0])) == 3
    assert folders() == [folder]


def test_one_prepares_and_the_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    path = numbered("a.jsonl", 5)
    chat()  # made before, not by both at once
    begun: list[str] = []

    def slow(*args: Any) -> Iterator[RowResult]:
        begun.append(str(args[1].path))
        time.sleep(0.5)
        yield from prepare(*args)

    monkeypatch.setattr(data_cache, "prepare", slow)
    with ThreadPoolExecutor(3) as pool:
        built = list(pool.map(lambda _: names(build_datasets(section(path), chat(), None)[0]), range(3)))
    assert begun == ["a.jsonl"]
    assert built == [[f"a.jsonl:{n}" for n in range(1, 6)]] * 3


# ---------------------------------------------------------------------------------------------------------------
# Streams


def test_a_stream_has_the_rows_of_its_source() -> None:
    path = jsonl("a.jsonl", *(talk(f"q {n}", f"a {n}") for n in range(30)), talk("q 3", "a 3"), {"messages": []})
    whole, _ = build_datasets(section(path, on_bad_row="skip"), chat(), 100)
    stream, _ = build_datasets(section({"path": path, "streaming": True}, on_bad_row="skip"), chat(), 100)
    assert whole.dataset is not None
    assert stream.dataset is not None
    assert stream.ledger == Ledger()
    rows = list(stream.dataset)
    assert sorted(rows, key=lambda row: int(row["row"].split(":")[1])) == whole.dataset.to_list()
    assert stream.ledger == whole.ledger
    assert list(stream.dataset) == rows  # the same order each time, and not that of the file
    order = [int(row["row"].split(":")[1]) for row in rows]
    assert order not in (sorted(order), sorted(order)[::-1])
    assert stream.ledger.kept == 60


def test_a_stream_counts_what_leaves_it() -> None:
    path = numbered("a.jsonl", 50)
    stream, _ = build_datasets(section({"path": path, "streaming": True}), chat(), None)
    assert stream.dataset is not None
    rows = iter(stream.dataset)
    seen = [next(rows) for _ in range(8)]
    # One more may be on its way.
    assert 8 <= stream.ledger.kept <= 9
    assert len({row["row"] for row in seen}) == 8


@pytest.mark.slow
def test_a_share_is_one_of_kept_rows() -> None:
    a = numbered("a.jsonl", 3000)
    rows = [talk(f"c {n}", "x") | {"use": n % 2 == 0} for n in range(3000)]
    sources = [{"path": a, "streaming": True}, {"path": jsonl("c.jsonl", *rows), "filter": {"use": True}}]
    stream, _ = build_datasets(section(*sources), chat(), None)
    assert stream.dataset is not None
    first = [row["row"][0] for row, _ in zip(stream.dataset, range(200), strict=False)]
    assert 70 < first.count("c") < 130


@pytest.mark.slow
def test_streams_are_mixed_by_weight() -> None:
    a, b = numbered("a.jsonl", 300), numbered("b.jsonl", 300)
    stream, _ = build_datasets(
        section({"path": a, "streaming": True, "weight": 3}, {"path": b, "samples": 20}), chat(), None
    )
    rows = names(stream)
    assert len(rows) == 320
    assert sum(name.startswith("b") for name in rows) == 20


def test_a_stream_keeps_clear_of_evaluation_rows() -> None:
    a = {"path": numbered("a.jsonl", 4), "streaming": True}
    held = jsonl("held.jsonl", talk("a.jsonl 2", "answer 2"))
    stream, _ = build_datasets(section(a, eval=[{"path": held}]), chat(), None)
    assert sorted(names(stream)) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4"]
    assert stream.ledger.dropped == {"also in the evaluation rows": 1}


def test_a_stream_without_rows_does_not_start() -> None:
    path = jsonl("a.jsonl", {"messages": []})
    assert fault(
        lambda: build_datasets(section({"path": path, "streaming": True}, on_bad_row="skip"), chat(), None)
    ) == ("no row is left to train on: 0 of 1 rows, 0 tokens, 0 trained on (0%), longest 0; 1 it has no messages")


@pytest.mark.slow
def test_training_on_a_stream(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(
        data={"train": [{"path": numbered("a.jsonl", 12), "streaming": True}]}, training={"max_steps": 8}
    )
    assert main(["train", str(path)]) == 0
    ledger = json.loads(Path("run/ledger.json").read_text(encoding="utf-8"))["train"]
    # Eight steps of two rows: once round, and on.
    assert ledger["rows"]["kept"] >= 16
    assert ledger["sources"]["a.jsonl"]["rows"] == ledger["rows"]["kept"]
    assert "data: read while training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps=null", "training.max_steps: is null"),
        ("data.eval_fraction=0.1", "data.eval_fraction: is given, with a source that is streamed; write data.eval"),
        ("training.packing=true", "training.packing: is true, with a source that is streamed; remove one of the two"),
        ("data.eval=[{path: b.jsonl, streaming: true}]", "streaming: is for rows to train on; remove it"),
        ("data.eval=[{path: b.jsonl, weight: 2}]", "weight: is for rows to train on; remove it"),
        ("data.train=[{path: a.jsonl, weight: 2, samples: 3}]", "samples: is given, and so is weight; keep one"),
    ],
)
def test_recipes_that_contradict_themselves(
    override: str, message: str, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    numbered("b.jsonl", 1)
    path = write_recipe(data={"train": [{"path": numbered("a.jsonl", 3), "streaming": True}]})
    assert main(["check", str(path), override]) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------
# The ledger's words


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Plain words.", "English"),
        ("A naïve café: " + "one word after the other, and " * 4, "English"),
        ("日本でいちばん高い山は富士山です。", "Japanese"),
        ("The word 富士山 と your name, よろしく", "Japanese"),
        ("中国最高的山是什么", "other"),
        ("Où est la bibliothèque, s'il vous plaît, à côté?", "other"),
        ("Il gatto dorme sul tavolo della cucina. " * 3, "other"),
        ("De kat slaapt op de tafel van de keuken, en de hond is buiten — hij wacht. " * 2, "other"),
        ("The cat sleeps on a table in its kitchen. " * 3, "English"),
        ("", "other"),
    ],
)
def test_language(text: str, name: str) -> None:
    assert language(text) == name


def test_much_is_lost() -> None:
    path = jsonl("a.jsonl", talk("Hi", "one", "Hi", "two " * 60), talk("Hi", "three"))
    train, _ = build_datasets(section(path), chat(), 40)
    lost = train.ledger.lost_tokens / (train.ledger.lost_tokens + train.ledger.trained_tokens)
    assert lost > 0.8
    assert f"{lost:.0%} of the tokens to train on are lost to training.max_length" in train.ledger.summary()
    whole, _ = build_datasets(section(path), chat(), None)
    assert whole.ledger.trained_tokens == train.ledger.trained_tokens + train.ledger.lost_tokens
    assert "lost" not in whole.ledger.summary()
