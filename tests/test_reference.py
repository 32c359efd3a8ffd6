"""The pages of keys and verbs say what the code takes."""

import importlib.util
from pathlib import Path

import pytest

from finetune.recipe.json_schema import releases

DOCS = Path(__file__).parents[1] / "docs"
spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
assert spec
assert spec.loader
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_page_is_what_the_code_says(name: str) -> None:
    if name.endswith("schema.json") and f'"{releases()}"' not in (DOCS / name).read_text():
        pytest.skip("made for other releases of trl, transformers or peft")
    assert (DOCS / name).read_text() == reference.PAGES[name](), "run python docs/reference.py"
