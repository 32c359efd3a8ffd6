"""Files and the Hub to rows, rows to messages."""

import csv
import gzip
import io
import json
import math
import os
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import examples
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from finetune.data import hub_rows, json_rows, readers
from finetune.data.formats import FORMATS, detect_format, map_columns, matches_filter
from finetune.data.readers import fingerprint, is_file, read_rows
from finetune.recipe.schema import DataSource
from finetune.system.errors import DataError, LabelError

REAL = os.environ.get("FINETUNE_REAL_DATA")
EXAMPLES = 100
QUICK = settings(max_examples=examples(EXAMPLES), deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def raw(data: bytes, name: str = "rows.jsonl") -> str:
    Path(name).write_bytes(data)
    return name


def read(path: str, data: bytes | None = None, piece: int = 1 << 20) -> list[tuple[str, Any]]:
    """Names and rows; what could not be read as `! ` and the reason, what ended the reading as `!! ` and the reason."""
    if data is not None:
        raw(data, path)
    return told(read_rows(DataSource(path=path)), piece)


def told(source: Iterator[tuple[str, Any]], piece: int) -> list[tuple[str, Any]]:
    got: list[tuple[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_PIECE", piece)
        try:
            for name, row in source:
                got.append((name, f"! {row}" if isinstance(row, LabelError) else row))
        except DataError as error:
            got.append(("", f"!! {error}"))
    return got


def parsed(data: bytes, piece: int) -> list[tuple[str, Any]]:
    """As `read`, of a JSON file that need not be written."""
    return told(json_rows.read_json("rows.json", io.BytesIO(data)), piece)


def fault(call: Callable[[], object], kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------
# JSON Lines


def test_jsonl() -> None:
    assert read("rows.jsonl", '\ufeff{"text": "一"}\r\n\r\n  \n{"text": "二\\n"}'.encode()) == [
        ("rows.jsonl:1", {"text": "一"}),
        ("rows.jsonl:4", {"text": "二\n"}),
    ]


def test_jsonl_with_faults() -> None:
    lines = [
        b'{"text": "a"}',
        b'{"text": "\xff"}',
        b"[1]",
        b"null",
        b"{,}",
        b'{"text": "a',
        b"[" * 200_000,
        b"9" * 5000,
        b'{"text": "cut of',
    ]
    got = read("rows.jsonl", b"\n".join(lines))
    assert [name for name, _ in got] == [f"rows.jsonl:{i}" for i in range(1, 10)]
    assert [row for _, row in got[:6]] == [
        {"text": "a"},
        "! not UTF-8: byte 0xff at place 11 of the line",
        "! a list where a row (a map) belongs",
        "! a NoneType where a row (a map) belongs",
        "! not JSON: Expecting property name enclosed in double quotes at column 2",
        "! not JSON: Invalid control character at column 12",
    ]
    assert got[6][1].startswith("! not JSON that can be read: maximum recursion depth exceeded")
    assert got[7][1].startswith("! not JSON that can be read: Exceeds the limit (4300 digits)")
    offset = len(b"\n".join(lines[:-1])) + 1
    assert got[8][1] == (
        f"! the file ends in the middle of a row, inside a string; the row starts at line 9, byte offset {offset}"
    )


TWICE = [
    ('{"a": 1, "a": 1}', "a"),
    ('{"a": {"b": 1, "c": 2, "b": 3}}', "b"),
    ('{"a": [{"x": 1}, {"é": 1, "\\u00e9": 2}], "b": "{\\"y\\": 1}"}', "é"),
    ('{"a": "\\":", "": 0, "": 1}', ""),
]


def test_a_key_twice_among_very_many_is_found_at_once() -> None:
    """Keys were counted one by one: 20,000 took 9 seconds, and a row may have millions."""
    keys = [*map(str, range(400_000)), "399999"]
    text = "{" + ",".join(f'"{key}":0' for key in keys) + "}"
    with pytest.raises(LabelError, match="the key '399999' is written twice in one object"):
        json_rows.decode_json(text)


@pytest.mark.parametrize(("row", "key"), TWICE)
@pytest.mark.parametrize("piece", [1, 5, 1 << 20])
def test_a_key_twice_makes_a_bad_row(row: str, key: str, piece: int) -> None:
    reason = f"! the key {key!r} is written twice in one object"
    lines = ['{"n": 1}', row, '{"n": 2, "m": {"n": 2}}']
    assert [got for _, got in read("rows.jsonl", "\n".join(lines).encode())] == [
        {"n": 1},
        reason,
        {"n": 2, "m": {"n": 2}},
    ]
    data = f"[{','.join(lines)}]".encode()
    assert [got for _, got in read("rows.json", data, piece)] == [{"n": 1}, reason, {"n": 2, "m": {"n": 2}}]
    # A file that ends in such a row is cut off all the same.
    assert read("rows.jsonl", row.encode()[:-1])[0][1].startswith("! the file ends in the middle of a row")


def test_jsonl_that_is_cut_off_anywhere() -> None:
    whole = b'{"a": "x"}\r\n'
    last = '{"b": [1.5e-3, -Infinity, true, "\\u00e9\\\\日"]}'.encode()
    for n in range(1, len(last)):
        (_, row), (name, reason) = read("rows.jsonl", whole + last[:n])
        assert (row, name) == ({"a": "x"}, "rows.jsonl:2")
        # Of a character's three bytes, the last ones may be gone.
        inside = ", inside a string" * in_string(last[:n].decode(errors="ignore"))
        assert reason == (f"! the file ends in the middle of a row{inside}; the row starts at line 2, byte offset 12")
    # What no further text could mend is not a file that was cut off.
    for line, reason in (
        (b'{"a" 1}', "Expecting ':' delimiter at column 6"),
        (b'{"a": "\\u12x', "Invalid \\uXXXX escape at column 9"),
    ):
        assert read("rows.jsonl", line) == [("rows.jsonl:1", f"! not JSON: {reason}")]


def in_string(text: str) -> bool:
    inside = False
    characters = iter(text)
    for character in characters:
        if inside and character == "\\":
            next(characters, "")
        elif character == '"':
            inside = not inside
    return inside


# ---------------------------------------------------------------------------------------------------------------
# JSON


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 20])
def test_json(piece: int) -> None:
    data = '\ufeff [{"text": "一"},\n 7, {"text": "二"} ] \n'.encode()
    for path, content in (("rows.json", data), ("rows.json.gz", gzip.compress(data))):
        assert read(path, content, piece) == [
            (f"{path}[0]", {"text": "一"}),
            (f"{path}[1]", "! a int where a map belongs"),
            (f"{path}[2]", {"text": "二"}),
        ]
    assert read("rows.json", b" [ ] ", piece) == read("rows.json", b" \n", piece) == []


@pytest.mark.parametrize("piece", [1, 2, 5, 1 << 20])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"text": "a"}', "!! rows.json: it begins with '{', not with the [ of a list of rows; {hint}"),
        (b'\n"a"', "!! rows.json: it begins with '\"', not with the [ of a list of rows; {hint}"),
        ('["日",\n"'.encode() + b'\xff"]', "!! rows.json:2: not UTF-8: byte 0xff at byte offset 9"),
        (b"[1]\xe3", "!! rows.json:1: not JSON: Extra data at column 4, byte offset 3, behind the list"),
        (b"[1]\n [2]", "!! rows.json:2: not JSON: Extra data at column 2, byte offset 5, behind the list"),
        (
            '["日"\n  {"a": 2}]'.encode(),
            "!! rows.json:2: not JSON: Expecting ',' delimiter at column 3, byte offset 9, before row [1]",
        ),
        (
            '["日", {"a": \n "\n"}]'.encode(),
            "!! rows.json:2: not JSON: Invalid control character at column 3, byte offset 17, in row [1]",
        ),
        (b"[1,]", "!! rows.json:1: not JSON: Expecting value at column 4, byte offset 3, in row [1]"),
        (b"[tru]", "!! rows.json:1: not JSON: Expecting value at column 2, byte offset 1, in row [0]"),
    ],
)
def test_json_with_faults(data: bytes, reason: str, piece: int) -> None:
    hint = "if it holds a row a line, name it .jsonl"
    assert read("rows.json", data, piece)[-1] == ("", reason.replace("{hint}", hint))


@pytest.mark.parametrize("data", [b"[7," + b"[" * 200_000, b"[7," + b"9" * 5000 + b"]"])
def test_json_that_python_cannot_hold(data: bytes) -> None:
    got = read("rows.json", data)
    assert got[0] == ("rows.json[0]", "! a int where a map belongs")
    assert got[1][1].startswith("!! rows.json[1]: not JSON that can be read: ")


TEXTS = st.text('ab"\\/\n\té日😀{}[]:, u', max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
DUMPS = st.builds(
    lambda *how: lambda value: json.dumps(value, indent=how[0], ensure_ascii=how[1], separators=how[2]).encode(),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.sampled_from([None, (",", ":"), (" ,\n", " :\t")]),
)


def expected(value: Any) -> Any:
    return value if isinstance(value, dict) else f"! a {type(value).__name__} where a map belongs"


@QUICK
@given(values=st.lists(st.dictionaries(TEXTS, VALUES, max_size=3) | VALUES, max_size=5), dumps=DUMPS)
@example(values=[1.5e-300, -math.inf, {"a": 12}, 12, "12"], dumps=lambda value: json.dumps(value).encode())
def test_json_in_tiny_pieces_is_what_json_loads_gives(values: list[Any], dumps: Any) -> None:
    data = b"\xef\xbb\xbf" * (len(values) % 2) + dumps(values)
    # Their texts, because NaN is not equal to itself.
    want = repr([(f"rows.json[{i}]", expected(v)) for i, v in enumerate(values)])
    assert [repr(parsed(data, piece)) for piece in (1, 2, 3, 5, 64)] == [want] * 5


@QUICK
@given(text=st.text('[]{}",:\\u1e-.trNaI \n日', max_size=25).map(lambda text: "[" + text))
@example("[1.")
@example('[{"a": 1}, 1e')
@example("[\\u")
def test_any_text_is_read_alike_in_all_pieces(text: str) -> None:
    """The result does not depend on where a piece ends, and is a fault just where `json.loads` finds one."""
    got = parsed(text.encode(), 1000)
    assert all(repr(parsed(text.encode(), piece)) == repr(got) for piece in (1, 2, 3))
    try:
        values = json.loads(text)
    except ValueError:
        # Whole rows first, then one reason.
        assert got[-1][1].startswith(("! the file ends", "!! rows.json:"))
        assert [name for name, _ in got[:-1]] == [f"rows.json[{i}]" for i in range(len(got) - 1)]
    else:
        twice = "is written twice in one object"
        assert all(
            str(row).endswith(twice) or repr(row) == repr(expected(value))
            for (_, row), value in zip(got, values, strict=True)
        )


@QUICK
@given(values=st.lists(st.dictionaries(TEXTS, VALUES, max_size=3) | VALUES, min_size=1, max_size=4), dumps=DUMPS)
@pytest.mark.slow
def test_json_cut_off_at_every_byte_gives_the_whole_rows_before(values: list[Any], dumps: Any) -> None:
    data = dumps(values)
    text, spans, at = data.decode(), [], data.decode().index("[") + 1
    for value in values:
        at += len(text[at:]) - len(text[at:].lstrip(" \n\t,"))
        end = json.JSONDecoder().raw_decode(text, at)[1]
        # A number ends where something else begins.
        if type(value) in (int, float):
            end += len(text[end:]) - len(text[end:].lstrip(" \n\t")) + 1
        spans.append((len(text[:at].encode()), len(text[:end].encode())))
        at = json.JSONDecoder().raw_decode(text, at)[1]
    for n in range(1, len(data)):
        whole = sum(end <= n for _, end in spans)
        *before, (name, reason) = parsed(data[:n], piece=3)
        assert repr([row for _, row in before]) == repr([expected(value) for value in values[:whole]])
        assert name == f"rows.json[{whole}]"
        if whole < len(values) and spans[whole][0] < n:
            start = spans[whole][0]
            inside = ", inside a string" * in_string(data[start:n].decode(errors="ignore"))
            line = data.count(b"\n", 0, start) + 1
            assert reason == (
                f"! the file ends in the middle of a row{inside}; the row starts at line {line}, byte offset {start}"
            )
        else:
            line = data.count(b"\n", 0, n) + 1
            assert reason == (
                f"! the file ends before its list is closed; a row or ] belongs at line {line}, byte offset {n}"
            )


@pytest.mark.slow
def test_a_long_json_needs_little_memory() -> None:
    count, text = 6000, "日" + "x" * 9_997
    row = json.dumps({"text": text}, ensure_ascii=False).encode()
    raw(b"[" + b",\n".join([row] * count) + b"]", "rows.json")
    assert Path("rows.json").stat().st_size > 60_000_000
    tracemalloc.start()
    try:
        total = sum(len(row["text"]) for _, row in read_rows(DataSource(path="rows.json")))  # type: ignore[index, call-overload]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == count * len(text)
    assert peak < 20_000_000


def test_a_long_row_is_parsed_a_few_times() -> None:
    class File(io.BytesIO):
        reads = 0

        def read(self, size: int | None = -1) -> bytes:
            File.reads += 1
            return super().read(size)

    values = [{"text": "x" * 1_000_000}, {"text": "y"}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_PIECE", 64)
        got = [row for _, row in json_rows.read_json("rows.json", File(json.dumps(values).encode()))]
    assert got == values
    assert File.reads < 20


# ---------------------------------------------------------------------------------------------------------------
# CSV, Parquet, gzip


def test_csv() -> None:
    # The first column without a name is the index that pandas writes.
    assert read("rows.csv", '\ufeff,text,n\r\n0,"一, ""二""\r\n三",7\r\n\r\n1,b,8\r\n'.encode()) == [
        ("rows.csv:2", {"": "0", "text": '一, "二"\r\n三', "n": "7"}),
        ("rows.csv:5", {"": "1", "text": "b", "n": "8"}),
    ]


def test_csv_with_long_cells() -> None:
    before = csv.field_size_limit(1000)
    raw(f"text\n{'x' * 200_000}\ny\n".encode(), "rows.csv")
    try:
        for _, row in read_rows(DataSource(path="rows.csv")):
            assert row in ({"text": "x" * 200_000}, {"text": "y"})
            assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)


def test_csv_with_faults() -> None:
    assert read("rows.csv", b"a,b\n1,2\n3\n4,5,6\n7,8") == [
        ("rows.csv:2", {"a": "1", "b": "2"}),
        ("rows.csv:3", "! the number of cells differs from the header's"),
        ("rows.csv:4", "! the number of cells differs from the header's"),
        ("rows.csv:5", {"a": "7", "b": "8"}),
    ]
    reason = "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"
    assert read("rows.csv", b'text\n"a\nb\n\xff\n')[-1] == ("", f"!! rows.csv:4: not a CSV of UTF-8 text: {reason}")
    assert read("rows.csv", b'text\na\n"b"c')[1:] == [
        ("", "!! rows.csv:3: not a CSV of UTF-8 text: ',' expected after '\"'")
    ]
    assert read("rows.csv", b"text\n") == []


@pytest.mark.parametrize(
    ("data", "inside"),
    [
        ('a,b\n1,2\n"三\n四,'.encode(), ", inside a quoted cell"),
        ('a,b\n1,2\n"三\n四'.encode()[:-1], ", inside a quoted cell"),
        (b'a,b\n1,2\n"x\n', ", inside a quoted cell"),
        (b"a,b\n1,2\n34", ""),
        ("a,b\n1,2\n3,日".encode()[:-1], ""),
    ],
)
def test_csv_that_is_cut_off(data: bytes, inside: str) -> None:
    assert read("rows.csv", data) == [
        ("rows.csv:2", {"a": "1", "b": "2"}),
        ("rows.csv:3", f"! the file ends in the middle of a row{inside}; the row starts at line 3, byte offset 8"),
    ]


def test_parquet() -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    said = [{"a": [{"x": 1}, {"y": [None, {"x": 2}]}], "b": None}, {"a": [], "b": {"x": "", "y": False, "z": None}}]
    parquet.write_table(pa.Table.from_pylist(said), "rows.parquet")
    Path("rows.parquet.gz").write_bytes(gzip.compress(Path("rows.parquet").read_bytes()))
    for name in ("rows.parquet", "rows.parquet.gz"):
        assert read(name) == [(f"{name}[0]", said[0]), (f"{name}[1]", {"a": [], "b": {"x": "", "y": False}})]
    data = Path("rows.parquet").read_bytes()
    assert read("rows.parquet", data[:-20])[0][1].startswith("!! rows.parquet: not a whole Parquet file: ")


LONG = b"x" * (8 << 20)
LARGE_ROWS = {
    "rows.jsonl": (b'{"text": "a"}\n{"text": "' + LONG + b'"}\n', "rows.jsonl:2"),
    "rows.jsonl.gz": (b'{"text": "a"}\n{"text": "' + LONG + b'"}\n', "rows.jsonl.gz:2"),
    "rows.json.gz": (b'[{"text": "a"}, {"text": "' + LONG + b'"}]', "rows.json.gz[1]"),
    "rows.csv.gz": (b"text\na\n" + LONG + b"\n", "rows.csv.gz:3"),
    "cell.csv.gz": (b'text\na\n"' + b"x\n" * (4 << 20) + b'"\n', "cell.csv.gz:3"),
}


@pytest.mark.parametrize(("name", "data", "where"), [(k, *v) for k, v in LARGE_ROWS.items()], ids=LARGE_ROWS)
def test_a_large_row_is_named_before_it_is_in_memory(
    name: str, data: bytes, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 1 << 16)
    monkeypatch.setattr(json_rows, "_PIECE", 1 << 12)
    raw(gzip.compress(data, 1) if name.endswith(".gz") else data, name)
    tracemalloc.start()
    rows = told(read_rows(DataSource(path=name)), 1 << 12)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    line = f"!! {where}: the row is larger than 65,536 bytes, the most that is read; divide it"
    assert rows[-1] == ("", line)
    assert [row["text"] for _, row in rows[:-1]] == ["a"]
    assert peak < 3 << 20


def test_a_large_row_of_a_parquet_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 1 << 16)
    parquet.write_table(pa.table({"text": ["ab" * (1 << 17)]}), "rows.parquet")
    assert read("rows.parquet") == [
        ("", "!! rows.parquet: the row is larger than 65,536 bytes, the most that is read; divide it")
    ]
    parquet.write_table(pa.table({"text": ["ab" * (1 << 13)] * 9}), "rows.parquet")
    assert len(read("rows.parquet")) == 9


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/null", path)], ids=["pipe", "device"])
def test_rows_are_read_from_regular_files_alone(make: Callable[[str], object]) -> None:
    make("rows.jsonl")
    line = "rows.jsonl: the file cannot be read: it is a device or a pipe, not a file"
    assert read("rows.jsonl") == [("", f"!! {line}")]
    assert fault(lambda: fingerprint(DataSource(path="rows.jsonl"))) == line


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_gzip_cut_off_at_every_byte(kind: str) -> None:
    texts = [f"{i} {math.sin(i)}" for i in range(8)]
    maps = [json.dumps({"text": text}) for text in texts]
    data = {"jsonl": "\n".join(maps), "json": f"[{','.join(maps)}]", "csv": "\n".join(["text", *texts, ""])}[kind]
    packed, name = gzip.compress(data.encode()), f"rows.{kind}.gz"
    assert [row["text"] for _, row in read(name, packed)] == texts
    kept = Counter[int]()
    for n in range(2, len(packed)):
        *before, (last, reason) = read(name, packed[:n])
        assert [row["text"] for _, row in before] == texts[: len(before)]
        if reason == "! the compressed file is cut off behind its last whole row":
            assert last == name
        else:
            number = len(before) + (kind == "jsonl") + 2 * (kind == "csv")
            assert last == (f"{name}[{number}]" if kind == "json" else f"{name}:{number}")
            assert reason.startswith("! the file ends ")
        kept[len(before)] += 1
    assert len(kept) > 5


def test_gzip_that_is_none() -> None:
    assert read("rows.jsonl.gz", b'{"text": "a"}')[0][1].startswith(
        "!! rows.jsonl.gz: the file cannot be read: Not a gzipped file"
    )
    assert read("rows.jsonl.gz", gzip.compress(b"")) == []
    data = bytearray(gzip.compress(b'{"text": "a"}\n' * 100))
    data[20] ^= 0xFF
    assert read("rows.jsonl.gz", bytes(data))[-1][1].startswith("!! rows.jsonl.gz: the file cannot be read: ")


# ---------------------------------------------------------------------------------------------------------------
# Sources


def test_globs() -> None:
    Path("b/c").mkdir(parents=True)
    for name in ("b/2.jsonl", "b/1.jsonl", "b/c/3.jsonl", "b[1].jsonl"):
        raw(b"{}", name)
    assert [name for name, _ in read("b/*.jsonl")] == ["b/1.jsonl:1", "b/2.jsonl:1"]
    assert [name for name, _ in read("b/**/*.jsonl")] == ["b/1.jsonl:1", "b/2.jsonl:1", "b/c/3.jsonl:1"]
    # A file whose name looks like a pattern is that file.
    assert [name for name, _ in read("b[1].jsonl")] == ["b[1].jsonl:1"]
    assert read("x/*.jsonl") == [("", "!! x/*.jsonl: there is no such file")]


def test_files_that_are_none() -> None:
    Path("folder").mkdir()
    Path("folder.jsonl").mkdir()
    raw(b"a", "rows.txt")
    must = "not a file of rows by its name, which must end in .jsonl, .json, .csv, .parquet or these and .gz"
    assert read("rows.jsonl", b"") == [("", "!! rows.jsonl: the file is empty")]
    assert read("rows.jsonl", b"\n \n") == []
    assert read("no.jsonl") == [("", "!! no.jsonl: there is no such file")]
    assert read("rows.txt") == [("", f"!! rows.txt: {must}")]
    assert read("folder") == [("", f"!! folder: {must}")]
    assert read("folder.jsonl") == [("", "!! folder.jsonl: the file cannot be read: Is a directory")]


def test_is_file() -> None:
    Path("here").mkdir()
    files = ["a.jsonl", "a/b.json.gz", "x.parquet", "*.x", "/abs", "./x", "~/x", "here"]
    assert [path for path in files if not is_file(path)] == []
    assert not is_file("HuggingFaceH4/ultrachat_200k")


def test_fingerprint_of_files() -> None:
    for folder in ("a", "b"):
        Path(folder).mkdir()
        raw(b'{"n": 1}', f"{folder}/1.jsonl")
        raw(b'{"n": 2}', f"{folder}/2.jsonl")
    first = fingerprint(DataSource(path="a/*.jsonl"))
    # Neither the folder nor the pattern counts, nor how the rows are used.
    assert fingerprint(DataSource(path="b/[12].jsonl", columns={"text": "n"})) == first
    assert len({first, fingerprint(DataSource(path="a/1.jsonl")), fingerprint(DataSource(path="a/2.jsonl"))}) == 3
    raw(b'{"n": 3}', "b/2.jsonl")
    assert fingerprint(DataSource(path="b/*.jsonl")) != first
    Path("a/2.jsonl").rename("a/3.jsonl")
    assert fingerprint(DataSource(path="a/*.jsonl")) != first
    assert fault(lambda: fingerprint(DataSource(path="c.jsonl"))) == "c.jsonl: there is no such file"
    Path("c.jsonl").mkdir()
    assert fault(lambda: fingerprint(DataSource(path="c.jsonl"))) == (
        "c.jsonl: the file cannot be read: Is a directory"
    )


@pytest.fixture
def hub(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """`owner/name`, read by `datasets` from a folder, as it would be from the Hub; gives the calls of its loader."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workdir / "cache")
    monkeypatch.setattr(readers, "is_file", lambda path: False)
    calls, load = [], datasets.load_dataset

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return load(*args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", counted)
    Path("owner/name").mkdir(parents=True)
    raw(b'{"a": {"x": 1, "z": null}}\n{"a": {"y": 2}}\n', "owner/name/train.jsonl")
    hub_rows._load_hub.cache_clear()
    return calls


@pytest.mark.parametrize("streaming", [False, True])
def test_hub(hub: list[dict[str, Any]], streaming: bool) -> None:
    source = DataSource(path="owner/name", streaming=streaming)
    assert list(read_rows(source)) == [
        # JSON has its nulls from whoever wrote it.
        ("owner/name[train]:0", {"a": {"x": 1, "z": None}}),
        ("owner/name[train]:1", {"a": {"y": 2}}),
    ]
    assert len(fingerprint(source)) == 32
    assert hub == [{"split": "train", "revision": None, "streaming": streaming}]
    nope = DataSource(path="owner/name", split="nope", streaming=streaming)
    assert fault(lambda: list(read_rows(nope))).startswith("owner/name: the Hub dataset cannot be loaded: ")


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_of_the_hub(hub: list[dict[str, Any]], streaming: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    Path("owner/name/train.jsonl").unlink()
    said = [{"a": {"x": 1}, "b": None}, {"a": {"y": 2}, "b": "b"}]
    parquet.write_table(pa.Table.from_pylist(said), "owner/name/train.parquet")
    source = DataSource(path="owner/name", streaming=streaming)
    assert [row for _, row in read_rows(source)] == said


HELD = [{"x": 1}, "42", "[1, 2]", "null", '{"city":"Brest"}', "plain", '"quoted"', None, 7]
MIXED = [{"a": value, "n": i} for i, value in enumerate(HELD)]
DATES = [{"m": [{"content": day}], "day": day} for day in ("2024-05-01", "2024-05-02T00:00:00")]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.jsonl.gz"])
@pytest.mark.parametrize("rows", [MIXED, DATES])
def test_the_hub_gives_the_texts_of_its_files(
    hub: list[dict[str, Any]], rows: list[dict[str, Any]], name: str, streaming: bool
) -> None:
    Path("owner/name/train.jsonl").unlink()
    lines = "\n".join(map(json.dumps, rows)).encode()
    raw(gzip.compress(lines) if name.endswith("gz") else lines, f"owner/name/{name}")
    assert [row for _, row in read_rows(DataSource(path="owner/name", streaming=streaming))] == rows


def test_parts_of_a_split_of_the_hub_and_lists(hub: list[dict[str, Any]]) -> None:
    Path("owner/name/train.jsonl").unlink()
    raw(json.dumps(MIXED[:4]).encode(), "owner/name/train-1.json")
    raw(json.dumps([{"a": "7", "n": 9}, {"a": {"b": None}}]).encode(), "owner/name/train-2.json")
    every = [*MIXED[:4], {"a": "7", "n": 9}, {"a": {"b": None}, "n": None}]
    for split, rows in (
        ("train", every),
        ("train[1:3]", every[1:3]),
        ("train[-2:]", every[-2:]),
        ("train[:1]+train[4:5]", [every[0], every[4]]),
    ):
        got = list(read_rows(DataSource(path="owner/name", split=split)))
        assert got == [(f"owner/name[{split}]:{i}", row) for i, row in enumerate(rows)]


def test_a_key_twice_on_the_hub(hub: list[dict[str, Any]]) -> None:
    raw(b'{"a": {"x": 1}}\n{"a": "42"}\n{"a": "b", "a": "c"}\n', "owner/name/train.jsonl")
    assert [row for _, row in read("owner/name")] == [
        {"a": {"x": 1}},
        {"a": "42"},
        "! the key 'a' is written twice in one object",
    ]


def test_a_hub_dataset_of_decoded_texts_whose_files_are_not_there(
    hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [{"m": [{"content": value, "arguments": value}]} for value in ({"x": 1}, "plain", '{"x": 1}', None)]
    raw("\n".join(map(json.dumps, said)).encode(), "owner/name/train.jsonl")
    monkeypatch.setattr(hub_rows, "_rows_of_files", lambda *_: None)
    decoded = (
        "! the column 'm' was read as JSON by datasets, so a text and a map cannot be told apart; "
        "download the file and write its path"
    )
    assert [row for _, row in read("owner/name")] == [
        decoded,
        {"m": [{"content": "plain", "arguments": "plain"}]},
        decoded,
        {"m": [{"content": None, "arguments": None}]},
    ]


def test_dates_are_no_text() -> None:
    import datetime

    day = datetime.datetime(2024, 5, 1)
    called = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": [day]}}]}
    assert fault(lambda: FORMATS["messages"]({"messages": [called]}), LabelError) == (
        "a tool call's arguments hold a datetime, which JSON does not have; write it as text"
    )
    said = {"messages": [{"role": "tool", "content": {"day": day}}]}
    assert fault(lambda: FORMATS["messages"](said), LabelError) == (
        "a tool's answers hold a datetime, which JSON does not have; write it as text"
    )
    tools = [TOOL | {"since": day}]
    assert fault(lambda: FORMATS["messages"]({"messages": [{}], "tools": tools}), LabelError) == (
        "its tools hold a datetime, which JSON does not have; write it as text"
    )


def test_parquet_with_two_columns_of_one_name() -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), "rows.parquet")
    assert read("rows.parquet") == [("", "!! rows.parquet: two columns have one name: text, text")]


def test_fingerprint_of_the_hub(hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint(DataSource(path="owner/name"))
    assert fingerprint(DataSource(path="owner/name", split="train[:1]")) != first
    hub_rows._load_hub.cache_clear()
    assert fingerprint(DataSource(path="owner/name")) == first
    raw(b'{"a": {"x": 1}}\n', "owner/name/train.jsonl")
    hub_rows._load_hub.cache_clear()
    assert fingerprint(DataSource(path="owner/name")) != first
    # A stream is known by its commit.
    got = []
    for commit in ("c0ffee", "c0ffee", "decaf"):
        monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, hash=commit, **__: SimpleNamespace(hash=hash))
        hub_rows._load_hub.cache_clear()
        got.append(fingerprint(DataSource(path="owner/name", streaming=True)))
    assert got[0] == got[1] != got[2]


def test_a_stream_that_breaks_off(hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        features = None

        def __iter__(self) -> Iterator[dict[str, Any]]:
            yield {"a": 1}
            raise RuntimeError("the line is dead\nand more")

    monkeypatch.setattr(hub_rows, "_load_hub", lambda *_: (Stream(), ""))
    assert read("owner/name") == [
        ("owner/name[train]:0", {"a": 1}),
        ("", "!! owner/name: the Hub dataset cannot be read: the line is dead"),
    ]


# ---------------------------------------------------------------------------------------------------------------
# Formats

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def message(**keys: Any) -> dict[str, Any]:
    """The message that one assistant message becomes."""
    (got,) = FORMATS["messages"]({"messages": [{"role": "assistant", "content": "a", **keys}]})["messages"]
    return {key: value for key, value in got.items() if (key, value) != ("content", "a")}


def test_known_format_and_columns() -> None:
    source = DataSource(path="x", columns={"messages": "said", "text": "{n}: {said}"})
    assert map_columns(source, {"said": "a", "n": 1}) == {"said": "a", "n": 1, "messages": "a", "text": "1: a"}
    assert detect_format(source, {"messages": [], "text": ""}) == "messages"
    # What `columns` fills in is meant to be read, whatever else is there.
    row = {"instruction": "", "output": "", "text": "", "prompt": "", "completion": "", "messages": []}
    for columns, form in (
        (["text"], "text"),
        (["prompt", "completion"], "prompt_completion"),
        (["completion"], "prompt_completion"),
        (["output"], "alpaca"),
        (["system"], "messages"),
    ):
        assert detect_format(DataSource(path="x", columns=dict.fromkeys(columns, "n")), row) == form


@pytest.mark.parametrize(
    ("keys", "got"),
    [
        ({"reasoning_content": "t"}, {"reasoning_content": "t"}),
        ({"thinking": "t"}, {"reasoning_content": "t"}),
        ({"reasoning": "t", "thinking": None, "reasoning_content": ""}, {"reasoning_content": "t"}),
        ({"reasoning": "t", "thinking": "t"}, {"reasoning_content": "t"}),
        ({"reasoning": "", "thinking": None}, {}),
        ({"name": "f", "tool_call_id": "7", "refusal": None}, {"name": "f", "tool_call_id": "7"}),
        ({"name": "", "tool_call_id": None, "tool_calls": []}, {}),
        ({"tool_calls": None}, {}),
        ({"tool_calls": [CALL]}, {"tool_calls": [CALL]}),
        ({"tool_calls": [{"name": "f", "arguments": {"x": 1}}]}, {"tool_calls": [CALL]}),
        (
            {"tool_calls": [{"id": "7", "function": {"name": "f", "arguments": '{"x": 1}'}}], "content": None},
            {"content": "", "tool_calls": [{"id": "7", **CALL}]},
        ),
        ({"tool_calls": json.dumps([CALL, CALL])}, {"tool_calls": [CALL, CALL]}),
        *(
            (
                {"tool_calls": [{"name": "f", "arguments": nothing}]},
                {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
            )
            for nothing in (None, "", "{}", {})
        ),
        ({"loss_weight": 0}, {"train": False}),
        ({"loss_weight": 0.0}, {"train": False}),
        ({"weight": 0}, {"train": False}),
        ({"weight": 1.0}, {"train": True}),
        ({"training": False, "weight": 1}, {"train": False}),
        ({"train": True, "training": False}, {"train": True}),
        ({"role": "user", "weight": 1}, {}),
        ({"role": "user", "weight": 0.5}, {}),
    ],
)
def test_messages(keys: dict[str, Any], got: dict[str, Any]) -> None:
    assert message(**keys) == {"role": keys.get("role", "assistant"), **got}


def test_roles() -> None:
    assert message(role="developer") == {"role": "developer"}
    assert message(role="Developer") == {"role": "Developer"}
    turns = [{"from": role, "value": ""} for role in ("developer", "human", "gpt", "observation", "tool", "Human")]
    roles = [m["role"] for m in FORMATS["sharegpt"]({"conversations": turns})["messages"]]
    assert roles == ["developer", "user", "assistant", "tool", "tool", "Human"]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"reasoning": "a", "thinking": "b"}, "a message's reasoning_content, thinking and reasoning differ; keep one"),
        ({"thinking": ["a"]}, "a message's reasoning_content is list, not text"),
        ({"name": 7}, "a message's name is int, not text"),
        ({"tool_call_id": 7}, "a message's tool_call_id is int, not text"),
        ({"train": 1}, "a message's train is 1; write true or false"),
        ({"training": "no"}, "a message's training is 'no'; write true or false"),
        ({"weight": 0.5}, "a message's weight is 0.5; write 0 or 1"),
        ({"loss_weight": [0]}, "a message's loss_weight is [0]; write 0 or 1"),
        *(
            ({"tool_calls": calls}, 'a message\'s tool_calls are not calls; write [{"name": ..., "arguments": {...}}]')
            for calls in ("f", 7, ["f"], [{}], [{"name": ""}], [{"function": {"arguments": {}}}])
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": "x = 1"}]},
            "a tool call's arguments are not a map; those of f are 'x = 1'",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": "[1]"}]},
            "a tool call's arguments are not a map; those of f are [1]",
        ),
    ],
)
def test_messages_that_cannot_be_read(keys: dict[str, Any], reason: str) -> None:
    assert fault(lambda: message(**keys), LabelError) == reason


@pytest.mark.parametrize("form", ["messages", "sharegpt", "alpaca", "prompt_completion"])
def test_tools(form: str) -> None:
    row = {
        "messages": [{"role": "user", "content": "a"}],
        "conversations": [{"from": "human", "value": "a"}],
        "instruction": "a",
        "output": "b",
        "prompt": "a",
        "completion": "b",
    }
    flat = TOOL["function"]
    for tools in ([TOOL], [flat], [{"function": flat}], [{"type": "function", **flat}], json.dumps([flat])):  # type: ignore[dict-item]
        assert FORMATS[form](row | {"tools": tools})["tools"] == [TOOL]
    for none in (None, "", [], "[]", "null"):
        assert "tools" not in FORMATS[form](row | {"tools": none})
    for strange in ("a hammer", "{}x", flat, ["f"], [{"parameters": {}}], [flat, {"type": "web_search"}], 7):
        assert fault(lambda strange=strange: FORMATS[form](row | {"tools": strange}), LabelError) == (
            'its tools are not a list of functions; write [{"name": ..., "description": ..., "parameters": {...}}], '
            "or that as a JSON string"
        )


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ('{"name": "f", "arguments": {"x": 1}}', {"content": "", "tool_calls": [CALL]}),
        ('{"name": "f", "arguments": "{\\"x\\": 1}"}', {"content": "", "tool_calls": [CALL]}),
        (json.dumps([{"name": "f", "arguments": {"x": 1}}] * 2), {"content": "", "tool_calls": [CALL] * 2}),
        *((text, {"content": text}) for text in ("f(x=1)", '{"name": "f"}', "[]", "7", '["f"]', "")),
    ],
)
def test_sharegpt_calls(value: str, got: dict[str, Any]) -> None:
    turn = {"from": "function_call", "value": value, "train": False}
    assert FORMATS["sharegpt"]({"conversations": [turn]}) == {
        "messages": [{"role": "assistant", "train": False, **got}]
    }


def test_alpaca_history() -> None:
    row = {"instruction": "c", "input": "d", "output": "e", "system": "s", "history": [["a", "b"]]}
    said = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c\n\nd"), ("assistant", "e")]
    assert FORMATS["alpaca"](row) == {"messages": [{"role": role, "content": content} for role, content in said]}
    assert len(FORMATS["alpaca"](row | {"history": None})["messages"]) == 3
    for history in ("a", ["a", "b"], [["a"]], [["a", "b", "c"]]):
        assert fault(lambda history=history: FORMATS["alpaca"](row | {"history": history}), LabelError) == (
            'its history is not a list of exchanges; write [["question", "answer"], ...]'
        )


@pytest.mark.parametrize(
    ("source_filter", "kept"),
    [
        ({}, True),
        ({"lang": "en"}, True),
        ({"lang": "de"}, False),
        ({"lang": ["de", "en"]}, True),
        ({"lang": []}, False),
        ({"lang": "en", "score": 1}, True),
        ({"lang": "en", "score": 2}, False),
        ({"score": 1.0}, True),
        ({"score": True}, False),
        ({"good": True}, True),
        ({"good": 1}, False),
        ({"gone": None}, True),
        ({"gone": [None, "x"]}, True),
        ({"tags": "b"}, True),
        ({"tags": ["c", "a"]}, True),
        ({"tags": "c"}, False),
        ({"none": "a"}, False),
    ],
)
def test_filter(source_filter: dict[str, Any], kept: bool) -> None:
    row = {"lang": "en", "score": 1, "good": True, "gone": None, "tags": ["a", "b"], "none": []}
    assert matches_filter(source_filter, row) is kept
    # A column that is not there is told whatever the others hold.
    assert fault(lambda: matches_filter(source_filter | {"land": "x"}, row), LabelError) == (
        "filter: there is no column 'land'; there are lang, score, good, gone, tags, none"
    )


# ---------------------------------------------------------------------------------------------------------------
# Rows that other people published

needs_real = pytest.mark.skipif(REAL is None, reason="FINETUNE_REAL_DATA is not set")


def real(name: str, form: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows as `json` reads them, which must be as we read them, and what a format makes of them."""
    path = Path(str(REAL)) / name
    text = path.read_text(encoding="utf-8")
    want = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_PIECE", 1000)
        got = [row for _, row in read_rows(DataSource(path=str(path)))]
    assert got == want
    assert {detect_format(DataSource(path=name), row) for row in want} == {form}
    return want, [FORMATS[form](row) for row in want]


@needs_real
def test_real_tool_calls() -> None:
    said, got = real("sharegpt_toolcall_demo.json", "sharegpt")
    roles, calls, tools = Counter[str](), 0, 0
    for row, converted in zip(said, got, strict=True):
        for turn, message in zip(row["conversations"], converted["messages"], strict=True):
            roles[message["role"]] += 1
            if turn["from"] == "function_call":
                call = json.loads(turn["value"])
                assert message == {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": call}],
                }
                calls += 1
            else:
                assert message["content"] == turn["value"]
        wrapped = [{"type": "function", "function": tool} for tool in json.loads(row["tools"])]
        assert converted.get("tools", []) == wrapped
        tools += len(wrapped)
    assert (len(got), calls, tools) == (300, 211, 219)
    assert roles == {"user": 746, "assistant": 746 + 211, "tool": 211}


@needs_real
def test_real_content_parts_and_weights() -> None:
    said, got = real("content_parts_demo.jsonl", "messages")
    assert len(got) == 500
    for row, converted in zip(said, got, strict=True):
        question, answer = ["".join(part["value"] for part in m["content"]) for m in row["messages"]]
        assert converted["messages"] == [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, "train": True},
        ]


@needs_real
@pytest.mark.parametrize(("name", "count"), [("alpaca_en_demo.json", 999), ("identity_placeholders.json", 91)])
def test_real_alpaca(name: str, count: int) -> None:
    said, got = real(name, "alpaca")
    assert len(got) == count
    for row, converted in zip(said, got, strict=True):
        prompt = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
        assert [m["content"] for m in converted["messages"]] == [prompt, row["output"]]
    assert any("{{name}}" in row["output"] for row in said) == (count == 91)


@needs_real
def test_real_sharegpt() -> None:
    said, got = real("sharegpt_dummy.json", "sharegpt")
    assert len(got) == 500
    names = {"human": "user", "gpt": "assistant"}
    for row, converted in zip(said, got, strict=True):
        turns = [{"role": names[t["from"]], "content": t["value"]} for t in row["conversations"]]
        assert converted == {"messages": turns}
