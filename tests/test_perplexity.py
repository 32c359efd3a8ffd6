"""Losses and distances beside plain torch: every token that is predicted counts once, and nothing else does."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from finetune.data.encoded import IGNORE
from finetune.data.samples import LabelledRow
from finetune.evaluate import perplexity
from finetune.evaluate.perplexity import Score, score
from finetune.model.load import load_base
from finetune.model.locate import locate

VOCABULARY = 1024


def tiny(loudness: float = 8.0, seed: int | None = None) -> Any:
    """A tiny Gemma whose predictions are far from uniform; a seed makes another one of it."""
    model = load_base(locate("random:gemma3"), torch.float32)
    embedding = model.get_input_embeddings().weight.data
    embedding *= loudness
    if seed is not None:
        embedding += torch.randn(embedding.shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    return model.eval()


def row(length: int, predicted: range, seed: int = 0) -> LabelledRow:
    ids = torch.randint(8, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return LabelledRow(ids, [token if i in predicted else IGNORE for i, token in enumerate(ids)])


# Rows of very different lengths, so that the mean of means is not the mean.
ROWS = [row(50, range(40, 50)), row(9, range(7, 9), seed=1), row(90, range(5, 80), seed=2)]


def predictions(model: Any, rows: list[LabelledRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (N, V) of all predicted tokens and these tokens (N), from the whole logits of each row."""
    logs, targets = [], []
    for one in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([one.input_ids])).logits[0, :-1].float()
        labels = torch.tensor(one.labels[1:])
        logs.append(logits[labels != IGNORE].log_softmax(-1))
        targets.append(labels[labels != IGNORE])
    return torch.cat(logs), torch.cat(targets)


class NoKeeping(torch.nn.Module):
    """A model whose forward cannot leave logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.device = model, model.device

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return self.model(input_ids=input_ids, use_cache=use_cache)


class Shifted(NoKeeping):
    """A model that gives one token a logit of its own everywhere."""

    def __init__(self, model: Any, token: int, logit: float) -> None:
        super().__init__(model)
        self.token, self.logit = token, logit

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        out = super().forward(input_ids, use_cache)
        out.logits[..., self.token] = self.logit
        return out


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "reference.bin"


def test_the_loss_is_the_mean_over_every_predicted_token() -> None:
    model = tiny()
    logs, targets = predictions(model, ROWS)
    found = score(model, ROWS)
    assert found == Score(tokens=10 + 2 + 75, loss=found.loss)
    assert found.loss == pytest.approx(float(functional.nll_loss(logs, targets)), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_distances_are_those_of_whole_distributions(kept: Path) -> None:
    reference, other = tiny(), tiny(seed=1)
    before, targets = predictions(reference, ROWS)
    now, _ = predictions(other, ROWS)
    score(reference, ROWS, keep=kept)
    found = score(other, ROWS, reference=kept)
    each = functional.kl_div(now, before, log_target=True, reduction="none").sum(-1).double().numpy()
    assert found.tokens == found.compared == len(targets)
    assert found.loss == pytest.approx(float(functional.nll_loss(now, targets)), rel=1e-6)
    assert found.kl == pytest.approx(each.mean(), rel=1e-5)
    assert found.kl_p99 == pytest.approx(np.percentile(each, 99), rel=1e-5)
    same = (before.argmax(-1) == now.argmax(-1)).double().mean()
    assert found.top1 == pytest.approx(float(same))
    assert 0.1 < found.top1 < 0.9  # the other model is another one
    # The reverse KL divergence is another number, so this tests the direction.
    back = functional.kl_div(before, now, log_target=True, reduction="none").sum(-1).mean()
    assert abs(float(back) - found.kl) > 1e-3 * found.kl


def test_a_model_has_no_distance_from_itself(kept: Path) -> None:
    model = tiny()
    alone = score(model, ROWS, keep=kept)
    again = score(model, ROWS, reference=kept)
    assert (again.kl, again.kl_p99, again.top1, again.loss) == (0.0, 0.0, 1.0, alone.loss)


def test_what_is_kept_are_float32_log_probabilities_and_their_shape(kept: Path) -> None:
    model = tiny()
    score(model, ROWS, keep=kept)
    assert json.loads(kept.with_suffix(".json").read_text()) == [87, VOCABULARY]
    logs, _ = predictions(model, ROWS)
    stored = torch.from_numpy(np.fromfile(kept, np.float32).reshape(87, VOCABULARY))
    torch.testing.assert_close(stored, logs, rtol=0, atol=1e-4)


def test_a_model_that_gives_all_its_logits_scores_the_same(kept: Path) -> None:
    model, other = tiny(), tiny(seed=1)
    score(model, ROWS, keep=kept)
    some, whole = score(other, ROWS, kept), score(NoKeeping(other), ROWS, kept)
    assert some.loss == pytest.approx(whole.loss, rel=1e-6)
    assert some.kl == pytest.approx(whole.kl, rel=1e-5)
    assert (some.tokens, some.compared, some.top1) == (whole.tokens, whole.compared, whole.top1)


def test_only_the_logits_that_are_predicted_from_are_computed() -> None:
    """With a vocabulary of 262,144, the logits of a long prompt would take gigabytes; also through an adapter."""
    model = get_peft_model(tiny(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    seen: list[int] = []
    model.get_base_model().lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    score(model, ROWS)
    assert seen == [10, 2, 75]


def test_a_first_token_that_is_labelled_is_predicted_by_nothing() -> None:
    model = tiny()
    whole, headless = row(12, range(12)), row(12, range(1, 12))
    assert score(model, [whole]) == score(model, [headless])
    assert score(model, [whole]).tokens == 11


def test_the_prompt_is_what_stands_before_the_first_predicted_token() -> None:
    assert LabelledRow([7, 8, 9, 10], [IGNORE, IGNORE, 9, IGNORE]).prompt == [7, 8]
    assert LabelledRow([7, 8, 9], [7, 8, 9]).prompt == [7]  # a model must be fed something
    assert LabelledRow([7, 8, 9], [IGNORE] * 3).prompt == [7, 8, 9]


def test_only_the_first_tokens_are_compared_where_more_would_not_fit_the_disk(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, other = tiny(), tiny(seed=1)
    # Three tokens of the third row; the bytes that are left hold no token.
    monkeypatch.setattr(perplexity, "_KEPT_BYTES", 15 * 4 * VOCABULARY + 100)
    score(reference, ROWS, keep=kept)
    found = score(other, ROWS, reference=kept)
    assert kept.stat().st_size == 15 * 4 * VOCABULARY
    assert (found.tokens, found.compared) == (87, 15)
    before, targets = predictions(reference, ROWS)
    now, _ = predictions(other, ROWS)
    each = functional.kl_div(now[:15], before[:15], log_target=True, reduction="none").sum(-1)
    assert found.kl == pytest.approx(float(each.mean()), rel=1e-5)
    assert found.top1 == pytest.approx(float((before[:15].argmax(-1) == now[:15].argmax(-1)).double().mean()))
    assert found.loss == pytest.approx(float(functional.nll_loss(now, targets)), rel=1e-6)  # of all tokens


def test_one_token_is_kept_where_not_even_that_would_fit(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "_KEPT_BYTES", 1)
    score(tiny(), ROWS, keep=kept)
    assert score(tiny(), ROWS, reference=kept).compared == 1


@pytest.mark.parametrize("logit", [math.nan, math.inf])
def test_predictions_that_are_not_finite_give_no_figures(logit: float, kept: Path) -> None:
    model = tiny()
    score(model, ROWS, keep=kept)
    found = score(Shifted(model, 9, logit), ROWS, reference=kept)
    assert all(math.isnan(value) for value in (found.loss, found.kl, found.kl_p99, found.top1))


def test_a_token_that_is_ruled_out_costs_infinitely_much(kept: Path) -> None:
    model = tiny()
    ruled_out = ROWS[0].labels[-1]
    found = score(Shifted(model, ruled_out, -math.inf), ROWS)
    assert (found.loss, found.perplexity) == (math.inf, math.inf)


def test_other_vocabularies_are_not_compared(kept: Path) -> None:
    model = tiny()
    score(model, ROWS, keep=kept)
    model.resize_token_embeddings(VOCABULARY + 64, mean_resizing=False)
    with pytest.raises(ValueError, match=r"^vocabularies of 1,024 and 1,088 cannot be compared$"):
        score(model, ROWS, reference=kept)
