"""The safetensors format as we read and write it, beside the library's own reader and writer."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from finetune.model import shards
from finetune.model.locate import locate
from finetune.model.shard_writer import ShardWriter
from finetune.model.shards import read_header, read_headers, read_tensor
from finetune.system.errors import ModelError
from finetune.system.files import WEIGHTS_INDEX

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def numbers() -> dict[str, torch.Tensor]:
    """One tensor of each type, of odd sizes, and the shapes that are easily forgotten."""
    torch.manual_seed(0)
    found = {str(dtype): (torch.randn(3, 5) * 4).to(dtype) for dtype in DTYPES}
    return found | {
        "scalar": torch.tensor(7.0),
        "empty": torch.empty(0, 4),
        "ends in a byte": torch.arange(9).to(torch.uint8),
        'gewählt "名前"': torch.randn(2, 3, 4),
    }


def write(folder: Path, tensors: dict[str, torch.Tensor], max_bytes: int = 10**9, room: int = 4000) -> None:
    folder.mkdir()
    writer = ShardWriter(folder, max_bytes, room)
    for name, tensor in tensors.items():
        writer.add(name, tensor.dtype, tensor.shape, [tensor])
    writer.close()


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def header_of(path: Path) -> tuple[int, dict[str, dict[str, object]]]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return length, json.loads(data[8 : 8 + length])


def test_the_library_reads_every_type_that_is_written(tmp_path: Path) -> None:
    write(tmp_path / "out", numbers())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert_same(load_file(tmp_path / "out/model.safetensors"), numbers())
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file that does not say so


def test_every_type_that_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(numbers(), tmp_path / "model.safetensors")
    descriptor = os.open(tmp_path / "model.safetensors", os.O_RDONLY)
    found = {name: read_tensor(descriptor, stored) for name, stored in read_headers(tmp_path).items()}
    stored = read_headers(tmp_path)["torch.bfloat16"]
    middle = read_tensor(descriptor, stored, 4, 9)
    os.close(descriptor)
    assert_same(found, numbers())
    assert bits(middle) == bits(numbers()["torch.bfloat16"].flatten()[4:9])


def test_the_header_is_padded_with_spaces_to_eight_bytes_and_every_tensor_is_aligned(tmp_path: Path) -> None:
    write(tmp_path / "out", numbers(), room=4001)
    path = tmp_path / "out/model.safetensors"
    length, header = header_of(path)
    text = path.read_bytes()[8 : 8 + length]
    assert (8 + length) % 8 == 0
    assert text.rstrip(b" ").endswith(b"}")
    assert text.startswith(b'{"__metadata__"')
    for name, tensor in numbers().items():
        begin = header[name]["data_offsets"][0]
        assert begin % tensor.element_size() == 0, name


def test_tensors_are_spread_over_shards_with_an_index(tmp_path: Path) -> None:
    tensors = {f"layer.{n}": torch.randn(16, 16) for n in range(7)} | {"large": torch.randn(64, 64)}
    write(tmp_path / "out", tensors, max_bytes=2 * 16 * 16 * 4)
    names = [f"model-{n:05}-of-00005.safetensors" for n in range(1, 6)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [*names, WEIGHTS_INDEX]
    spread = [load_file(tmp_path / "out" / name) for name in names]
    # Two of a kilobyte each; what is larger than a shard may be has one for itself.
    assert [len(part) for part in spread] == [2, 2, 2, 1, 1]
    assert_same({name: tensor for part in spread for name, tensor in part.items()}, tensors)
    index = json.loads((tmp_path / "out" / WEIGHTS_INDEX).read_text())
    assert index["metadata"] == {"total_size": 7 * 1024 + 16384}
    assert index["weight_map"] == {n: names[i] for i, part in enumerate(spread) for n in part}


def test_a_copied_tensor_is_the_same_bytes(tmp_path: Path) -> None:
    save_file(numbers(), tmp_path / "model.safetensors")
    descriptor = os.open(tmp_path / "model.safetensors", os.O_RDONLY)
    (tmp_path / "out").mkdir()
    writer = ShardWriter(tmp_path / "out", 10**9, 4000)
    for name, stored in read_headers(tmp_path).items():
        writer.copy(name, descriptor, stored)
    writer.close()
    os.close(descriptor)
    assert_same(load_file(tmp_path / "out/model.safetensors"), numbers())


def test_a_tensor_written_in_pieces_is_whole(tmp_path: Path) -> None:
    whole = torch.randn(10, 6)
    (tmp_path / "out").mkdir()
    writer = ShardWriter(tmp_path / "out", 10**9, 4000)
    asked: list[int] = []

    def pieces() -> Iterator[torch.Tensor]:
        for start in range(0, 10, 4):
            # What came before is on its way to the disk: no two pieces need be in memory.
            assert writer._file.tell() == writer.room + start * 6 * 4
            asked.append(start)
            yield whole[start : start + 4]

    writer.add("whole", whole.dtype, whole.shape, pieces())
    writer.close()
    assert asked == [0, 4, 8]
    assert_same(load_file(tmp_path / "out/model.safetensors"), {"whole": whole})


def test_slices_cover_every_row_once_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SLICE", 1000)
    found = list(shards.row_ranges(23, 100))  # 400 bytes a row
    assert found == [(start, min(start + 2, 23)) for start in range(0, 23, 2)]
    assert list(shards.row_ranges(3, 1000)) == [(0, 1), (1, 2), (2, 3)]  # a row is never cut
    assert list(shards.row_ranges(0, 5)) == []


GOOD = {"a": torch.ones(4, 4), "b": torch.ones(2)}


TOO_FEW_BYTES = "model.safetensors is damaged: a does not have the bytes that its shape needs"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:5], "{path} is damaged: it ends within its header"),
        (lambda data: data[:60], "{path} is damaged: it ends within its header"),
        (lambda data: data[:-3], "{path} is damaged: it has {short} bytes where its header says {whole}"),
        (lambda data: data + b"xy", "{path} is damaged: it has {long} bytes where its header says {whole}"),
        (lambda data: data.replace(b"[4,4]", b"[4,5]"), TOO_FEW_BYTES),
        (lambda data: data.replace(b'"F32"', b'"X32"', 1), "model.safetensors: a is of type X32, which cannot be read "
         "here"),
    ],
    ids=["no header", "half a header", "cut off", "too long", "another shape", "unknown type"],
)  # fmt: skip
def test_a_damaged_file_is_named(damage: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(GOOD, path)
    whole = len(path.read_bytes())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError) as error:
        read_header(path)
    assert str(error.value) == message.format(path=path, whole=whole, short=whole - 3, long=whole + 2)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        b'{"a": {"dtype": "F32"}}',
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-16, -8]}}',
    ],
)
def test_whatever_the_header_holds_the_file_is_called_damaged(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        read_header(path)


def entry(begin: object, end: object, shape: object = (2,)) -> dict[str, object]:
    return {"dtype": "F32", "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


ONE = json.dumps(entry(0, 8))
NO_WHOLE_NUMBER = "model.safetensors is damaged: a has a shape or an offset that is no whole number from 0"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "model.safetensors is damaged: b overlaps the tensor before it"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, "model.safetensors is damaged: b overlaps the tensor before it"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, "model.safetensors is damaged: b comes after bytes of no tensor"),
        ({"a": entry(4, 12)}, "model.safetensors is damaged: a comes after bytes of no tensor"),
        ({"a": entry(8, 0)}, TOO_FEW_BYTES),
        ({"a": entry(0, 8, (3,))}, TOO_FEW_BYTES),
        ({"a": entry(0, 8, (2**40, 2**40))}, TOO_FEW_BYTES),
        ({"a": entry(-8, 0)}, NO_WHOLE_NUMBER),
        ({"a": entry(0.0, 8.0)}, NO_WHOLE_NUMBER),
        ({"a": entry(False, 8)}, NO_WHOLE_NUMBER),
        ({"a": entry("0", "8")}, NO_WHOLE_NUMBER),
        ({"a": entry(0, 8, (-1, -2))}, NO_WHOLE_NUMBER),
        ({"a": entry(0, 8, (2.0,))}, NO_WHOLE_NUMBER),
        ({"a": entry(0, 8, "2")}, NO_WHOLE_NUMBER),
        ({"a": entry(0, 8), "__metadata__": {"x": 1}}, "model.safetensors is damaged: its __metadata__ is no map of "
         "texts"),
        ({"a": entry(0, 8), "__metadata__": "x"}, "model.safetensors is damaged: its __metadata__ is no map of texts"),
        (f'{{"a": {ONE}, "a": {ONE}}}', "{path} is damaged, or no safetensors file: a is written twice in its header"),
        (f'{{"a": {ONE[:-1]}, "shape": [2]}}}}', "{path} is damaged, or no safetensors file: shape is written twice in "
         "its header"),
        (f' {{"a": {ONE}}}', "{path} is damaged, or no safetensors file: its header does not begin with {{"),
        (f'{{"a": {ONE}, "b": NaN}}', "{path} is damaged, or no safetensors file: NaN stands in its header"),
        ('{"a":' + "[" * 100_000, "{path} is damaged: its header is nested too deeply"),
    ],
)  # fmt: skip
def test_a_header_that_breaks_a_rule_of_the_format_is_refused_as_the_library_refuses_it(
    header: dict[str, object] | str, message: str, tmp_path: Path
) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(20))
    with pytest.raises(ModelError) as error:
        read_header(path)
    assert str(error.value) == message.format(path=path)
    with pytest.raises(SafetensorError):
        load_file(path)


def test_tensors_may_be_named_in_any_order(tmp_path: Path) -> None:
    text = json.dumps({"b": entry(8, 16), "empty": entry(8, 8, (0, 3)), "a": entry(0, 8)}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    assert list(read_header(path)) == ["a", "empty", "b"]
    assert load_file(path).keys() == {"a", "b", "empty"}


def test_a_header_beyond_the_librarys_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file(GOOD, path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    monkeypatch.setattr(shards, "_MAX_HEADER", length - 1)
    with pytest.raises(ModelError) as error:
        read_header(path)
    assert str(error.value) == f"{path} is damaged: its header has {length} bytes, and {length - 1} are allowed"


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/hostname", "sub/a.safetensors", "..\\a.safetensors", "."]
)
def test_an_index_names_files_of_its_own_folder_only(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(GOOD, tmp_path / "other.safetensors")
    save_file(GOOD, folder / "model-00001-of-00001.safetensors")
    (folder / WEIGHTS_INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    line = f"{folder / WEIGHTS_INDEX} is damaged: it names {name}, and weights lie in the folder of their index"
    with pytest.raises(ModelError) as error:
        read_headers(folder)
    assert str(error.value) == line
    with pytest.raises(ModelError) as error:
        locate(str(folder))  # transformers follows such a name
    assert str(error.value) == line


def test_missing_shards_and_damaged_indexes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        read_headers(tmp_path)
    assert str(error.value) == f"{tmp_path} holds no .safetensors weights"
    save_file(GOOD, tmp_path / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"}}
    (tmp_path / WEIGHTS_INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError) as error:
        read_headers(tmp_path)
    missing = tmp_path / "model-00002-of-00002.safetensors"
    assert str(error.value) == f"{missing} is missing, though {WEIGHTS_INDEX} names it"
    (tmp_path / WEIGHTS_INDEX).write_text("{")
    with pytest.raises(ModelError, match=r"index\.json is damaged"):
        read_headers(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(GOOD, path)
    header = read_header(path)
    os.truncate(path, header["a"].end - 4)
    descriptor = os.open(path, os.O_RDONLY)
    (tmp_path / "out").mkdir()
    writer = ShardWriter(tmp_path / "out", 10**9, 4000)
    for reads in (lambda: read_tensor(descriptor, header["a"]), lambda: writer.copy("a", descriptor, header["a"])):
        with pytest.raises(ModelError) as error:
            reads()
        assert str(error.value) == "model.safetensors is damaged: it ends within a tensor"
    writer.abort()
    os.close(descriptor)


def test_the_fingerprint_is_of_the_weights_and_not_of_their_files(tmp_path: Path) -> None:
    tensors = {f"layer.{n}": torch.randn(32, 32) for n in range(4)}
    write(tmp_path / "one", tensors)
    write(tmp_path / "many", tensors, max_bytes=4096)
    write(tmp_path / "turned", dict(reversed(tensors.items())))
    known = shards.fingerprint(tmp_path / "one")
    assert len(list((tmp_path / "many").iterdir())) == 5
    assert shards.fingerprint(tmp_path / "many") == shards.fingerprint(tmp_path / "turned") == known
    for place in ((0, 0), (16, 0), (31, 31)):
        other = {name: tensor.clone() for name, tensor in tensors.items()}
        other["layer.2"][place] += 1
        write(tmp_path / f"other{place[0]}", other)
        assert shards.fingerprint(tmp_path / f"other{place[0]}") != known
    renamed = {name.replace("3", "4"): tensor for name, tensor in tensors.items()}
    write(tmp_path / "renamed", renamed)
    assert shards.fingerprint(tmp_path / "renamed") != known
