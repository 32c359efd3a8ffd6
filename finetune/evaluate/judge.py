"""Asks a judge model, behind an OpenAI-compatible endpoint, how much it prefers a model's answers to a reference's.

Judges tend to prefer the answer that they read first, or last. So the judge compares every pair twice, with the answers
exchanged, and the position bias that remains is reported.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import queue
import re
import statistics
import string
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from finetune.evaluate.endpoint import Endpoint, Reply, Usage, check_address, usage
from finetune.system.errors import EvaluateError, RefusedReply
from finetune.system.terminal import Say, progress_bar

Message = Mapping[str, str]

# The grades and their scores. Source: the model card of google/gemma-2-2b-jpn-it.
GRADES = {
    "MuchBetterThan": 1.5,
    "BetterThan": 1.0,
    "SlightlyBetterThan": 0.5,
    "AboutTheSame": 0.0,
    "SlightlyWorseThan": -0.5,
    "WorseThan": -1.0,
    "MuchWorseThan": -1.5,
}
# The same grade with the answers exchanged.
_MIRRORED = dict(zip(GRADES, reversed(GRADES), strict=True))
_BY_LOWER_CASE = {grade.lower(): grade for grade in GRADES}
# The last line of a reply that names a grade.
_GRADE_LINE = re.compile(
    r'(?:\A|\n)[ \t]*(?:\{\s*"grade"\s*:\s*"(?P<json>\w+)"\s*\}|'
    r'(?:(?:grade|判定)\s*[:：]\s*)?"?(?P<plain>\w+)"?)[.。]?\Z',
    re.IGNORECASE,
)
# The next message to a judge whose reply named no grade.
_ASK_AGAIN = {
    "en": "Your reply cannot be read: its last line is $line and not a grade in the form asked for. Judge the same two "
    "answers again, in at most one sentence, and end with the line with the grade: one of the seven names, in place "
    'of the dots in {"grade": "..."}',
    "ja": "判定を読み取れませんでした。最後の行が $line となっており、指定の形式の判定になっていません。"
    "同じ二つの回答をもう一度、一文以内で評価し、最後の行に判定を書いてください。"
    '形式は {"grade": "..."} で、「...」には表にある七つの名前のいずれか一つを入れます。',
}
# The requests about a pair in one order before the pair is left out.
_MAX_ASKED = 3
# The hexadecimal digits of the code in the prompt's tags.
_MARK_LENGTH = 16
# Without a single grade after this many prompts, the comparison stops, so that no more are paid for.
_GIVE_UP_AFTER = 20
# Above these shares, `Preference.notes` mentions the pairs that are left out, and position bias.
_MUCH_LEFT_OUT = 1 / 5
_MUCH_BIAS = 1 / 3


@dataclass(frozen=True)
class Pair:
    """A conversation before an answer, the answer of the model that is judged, and the reference's."""

    prompt: Sequence[Message]
    answer: str
    reference: str
    id: str


@dataclass(frozen=True)
class Judge:
    """A judge model and the settings of its requests.

    Attributes:
        base_url: The address of the API before `/chat/completions`.
        model: The model's name at that address.
        language: The language of the rubric, `en` or `ja`.
        key: Sent to `base_url` and nowhere else; empty for an endpoint that needs none.
        timeout: Seconds without a byte after which a request fails.
        workers: Concurrent requests.
        max_tokens: The most tokens of a reply; a reasoning model needs more.
        prices: USD for a million input and a million output tokens.

    Raises:
        EvaluateError: One of these values cannot be used.
    """

    base_url: str
    model: str
    language: str = "en"
    key: str = field(default="", repr=False)
    timeout: float = 120.0
    workers: int = 8
    max_tokens: int = 2048
    prices: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_address(self.base_url, self.key)
        if self.language not in _ASK_AGAIN:
            raise EvaluateError(f"evaluate.judge.language: {self.language!r} has no rubric; write en or ja")
        if self.workers < 1 or self.max_tokens < 1 or not self.timeout > 0:
            raise EvaluateError("evaluate.judge: workers, max_tokens and timeout must be more than 0")


@dataclass(frozen=True)
class PairVerdict:
    """The result of one pair. In tuples, the first value is from the order with the model's answer in first place.

    Attributes:
        id: The pair's name.
        score: From 1.5 (the model's answer is much better) to -1.5; None if the pair is left out.
        grades: The judge's grades of the answer in first place.
        replies: The judge's last replies.
        fault: The reason for which the pair is left out.
    """

    id: str
    score: float | None
    grades: tuple[str | None, str | None]
    replies: tuple[str, str]
    fault: str | None


@dataclass(frozen=True)
class Preference:
    """The result over all pairs.

    The score of a pair is the mean over both orders:

    grade, model's first   grade, reference first   mirrored        score
    BetterThan (1.0)       WorseThan (-1.0)         BetterThan      1.0
    BetterThan (1.0)       AboutTheSame (0.0)       AboutTheSame    0.5
    BetterThan (1.0)       BetterThan (1.0)         WorseThan       0.0     the two orders disagree

    Attributes:
        mean: The mean score, from 1.5 (the model's answers are much better) to -1.5 (much worse).
        standard_error: The standard error of the mean over pairs; None for a single pair.
        pairs: The number of pairs with a score.
        grades: The number of times that the model's answers got each grade, two for each pair.
        disagreements: Pairs whose two orders prefer different answers, because the judge followed the position.
        first_place: The position bias: the mean grade of the answers in first place.
        malformed: Pairs left out because the judge named no grade.
        refused: Pairs left out because the endpoint refused them, such as one that is too long.
        requests: Requests sent by this call, failed ones included.
        sent: Tokens and cost of the replies to these requests.
        cached: Tokens and cost of the replies that were on disk.
        verdicts: The result of each pair.
    """

    mean: float
    standard_error: float | None
    pairs: int
    grades: dict[str, int]
    disagreements: int
    first_place: float
    malformed: int
    refused: int
    requests: int
    sent: Usage
    cached: Usage
    verdicts: tuple[PairVerdict, ...]

    @property
    def notes(self) -> list[str]:
        """Warnings to a reader of the mean: many pairs left out, position bias."""
        notes = []
        left_out, every = self.malformed + self.refused, len(self.verdicts)
        if left_out > _MUCH_LEFT_OUT * every:
            notes.append(f"{left_out} of {every} pairs are left out, so the mean is not over all prompts")
        if self.disagreements > _MUCH_BIAS * self.pairs:
            place = "first" if self.first_place > 0 else "second"
            notes.append(
                f"position bias: in {self.disagreements} of {self.pairs} pairs the judge changes its preference when "
                f"the answers are exchanged; the {place} position is worth {abs(self.first_place):.2f}"
            )
        return notes

    def as_dict(self) -> dict[str, Any]:
        """The fields and the notes, as JSON holds them."""
        return asdict(self) | {"notes": self.notes}

    def summary(self) -> str:
        """The result in one line, with its notes."""
        error = "" if self.standard_error is None else f" ± {self.standard_error:.2f}"
        left_out = self.malformed + self.refused
        parts = [f"{self.mean:+.2f}{error} over {self.pairs:,} pairs"]
        if left_out:
            parts.append(f"{left_out:,} left out ({self.malformed:,} malformed, {self.refused:,} refused)")
        parts.append(f"{self.sent.replies:,} replies for {self.sent}, {self.cached.replies:,} from the cache")
        return "; ".join([*parts, *self.notes])


def compare(
    pairs: Sequence[Pair], judge: Judge, cache: Path, say: Say = lambda line: None, progress: bool = False
) -> Preference:
    """The judge's preference over all pairs.

    Args:
        pairs: The answers to compare.
        judge: The judge model.
        cache: A folder for the judge's replies; it is created if it does not exist.
        say: Called with a line when a request is repeated or a setting is left out.
        progress: Shows a progress bar on a terminal.

    Raises:
        EvaluateError: The judge cannot be reached or does not accept the key, or no pair could be judged. The replies
            until then are in the cache.
    """
    if not pairs:
        raise EvaluateError("evaluate.prompts: there are no answers to compare")
    prompts = []
    for pair in pairs:
        orders = (pair.answer, pair.reference), (pair.reference, pair.answer)
        prompts.append([judge_prompt(pair.prompt, *order, judge.language) for order in orders])
    cache.mkdir(parents=True, exist_ok=True)
    endpoint = Endpoint(judge.base_url, judge.model, judge.key, judge.timeout, judge.max_tokens, cache, say)
    # Equal prompts are sent once.
    outcomes = _ask_all(list(dict.fromkeys(itertools.chain(*prompts))), judge, endpoint, progress)
    verdicts = tuple(
        _verdict(pair.id, outcomes[answer_first], outcomes[reference_first])
        for pair, (answer_first, reference_first) in zip(pairs, prompts, strict=True)
    )
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    if not scores:
        raise EvaluateError(
            f"evaluate.judge.model: {judge.model} judged none of {len(pairs)} pairs: {verdicts[0].fault}"
        )
    grades = [[str(grade) for grade in verdict.grades] for verdict in verdicts if verdict.score is not None]
    counts = Counter(itertools.chain(*((first, _MIRRORED[second]) for first, second in grades)))
    refused = sum(any(outcomes[prompt].refused for prompt in orders) for orders in prompts)
    replies = [reply for outcome in outcomes.values() for reply in outcome.replies]
    return Preference(
        mean=statistics.fmean(scores),
        standard_error=statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None,
        pairs=len(scores),
        grades={grade: counts[grade] for grade in GRADES},
        disagreements=sum(GRADES[first] * GRADES[second] > 0 for first, second in grades),
        first_place=statistics.fmean(GRADES[grade] for grade in itertools.chain(*grades)),
        malformed=len(pairs) - len(scores) - refused,
        refused=refused,
        requests=endpoint.requests,
        sent=usage([reply for reply in replies if not reply.cached], judge.prices),
        cached=usage([reply for reply in replies if reply.cached], judge.prices),
        verdicts=verdicts,
    )


def judge_prompt(prompt: Sequence[Message], first: str, second: str, language: str) -> str:
    """The judge's prompt: the rubric, then the conversation and both answers between tags that no text can forge.

    The tags hold a code that occurs in none of the texts: a hash of them.

    Args:
        prompt: The conversation before the answers.
        first: The answer in first place.
        second: The other answer.
        language: The language of the rubric, `en` or `ja`.
    """
    rubric = (Path(__file__).parent / "rubrics" / f"{language}.md").read_text(encoding="utf-8")
    turns = [(message["role"], message["content"]) for message in prompt]
    texts = json.dumps([turns, first, second])
    marks = (hashlib.sha256(f"{n}{texts}".encode()).hexdigest()[:_MARK_LENGTH] for n in itertools.count())
    mark = next(mark for mark in marks if mark not in texts)
    conversation = "\n".join(f"<{role} {mark}>\n{content}\n</{role} {mark}>" for role, content in turns)
    # One substitution for all values: a placeholder inside a text stays text.
    return string.Template(rubric).substitute(mark=mark, conversation=conversation, first=first, second=second)


def grade_in(reply: str) -> str | None:
    """The grade in the last line of a reply; None if that line is not a grade in the required form."""
    plain = re.sub(r"```(?:\w+(?=\n))?|[`*]", "", reply).strip()
    match = _GRADE_LINE.search(plain)
    return _BY_LOWER_CASE.get((match["json"] or match["plain"]).lower()) if match else None


# ---------------------------------------------------------------------------------------------------------------
# Requests


@dataclass(frozen=True)
class _Outcome:
    """The result of one prompt: a grade, or why there is none."""

    grade: str | None
    fault: str | None
    refused: bool
    replies: tuple[Reply, ...]


def _ask_all(prompts: list[str], judge: Judge, endpoint: Endpoint, progress: bool) -> dict[str, _Outcome]:
    """The outcome of each prompt.

    Until the first reply that is not cached, prompts are sent one at a time: an error of the endpoint then shows once,
    and the threads that send the rest know which settings it accepts. They are daemons, so that Ctrl-C waits for no
    reply; a reply that arrives before the process ends is kept.
    """
    waiting = deque(prompts)
    outcomes: dict[str, _Outcome] = {}
    done: queue.SimpleQueue[tuple[str, _Outcome | BaseException]] = queue.SimpleQueue()

    def work() -> None:
        prompt = ""
        try:
            with endpoint.client() as client:
                while not endpoint.stop.is_set():
                    try:
                        prompt = waiting.popleft()
                    except IndexError:  # other threads have the rest
                        return
                    done.put((prompt, _ask_for_grade(prompt, judge.language, endpoint, client)))
        except BaseException as error:
            done.put((prompt, error))

    with progress_bar("judge", len(prompts), progress) as advance:

        def take(prompt: str, outcome: _Outcome | BaseException) -> None:
            if isinstance(outcome, BaseException):
                raise outcome
            outcomes[prompt] = outcome
            advance(1)
            if len(outcomes) == _GIVE_UP_AFTER and not any(each.grade for each in outcomes.values()):
                raise EvaluateError(
                    f"evaluate.judge.model: {judge.model} answered none of {_GIVE_UP_AFTER} prompts with a grade: "
                    f"{outcome.fault}"
                )

        try:
            with endpoint.client() as client:
                while waiting and not endpoint.requests:
                    prompt = waiting.popleft()
                    take(prompt, _ask_for_grade(prompt, judge.language, endpoint, client))
            left = len(waiting)
            for number in range(min(left, judge.workers)):
                threading.Thread(target=work, name=f"judge-{number}", daemon=True).start()
            for _ in range(left):
                take(*done.get())
        finally:
            endpoint.stop.set()
    return outcomes


def _ask_for_grade(prompt: str, language: str, endpoint: Endpoint, client: httpx2.Client) -> _Outcome:
    """Asks until the judge names a grade; each further request holds its last reply and the fault in it."""
    messages = [{"role": "user", "content": prompt}]
    replies: list[Reply] = []
    line = ""
    for _ in range(_MAX_ASKED):
        try:
            reply = endpoint.reply(messages, client)
        except RefusedReply as error:
            return _Outcome(None, str(error), True, tuple(replies))
        replies.append(reply)
        if grade := grade_in(reply.text):
            return _Outcome(grade, None, False, tuple(replies))
        line = json.dumps(reply.text.strip().rpartition("\n")[2][-200:], ensure_ascii=False)
        again = string.Template(_ASK_AGAIN[language]).substitute(line=line)
        # The end of the reply is enough; an endpoint may refuse an empty message.
        answered = {"role": "assistant", "content": reply.text[-2000:] or "..."}
        messages = [*messages, answered, {"role": "user", "content": again}]
    cut = f", cut off at max_tokens ({endpoint.max_tokens})" if replies[-1].cut else ""
    fault = f"asked {_MAX_ASKED} times, the judge named no grade; its last reply ends with {line}{cut}"
    return _Outcome(None, fault, False, tuple(replies))


# ---------------------------------------------------------------------------------------------------------------
# The result


def _verdict(name: str, answer_first: _Outcome, reference_first: _Outcome) -> PairVerdict:
    """The result of a pair, from the outcomes of its two orders."""
    orders = (answer_first, reference_first)
    grades = (answer_first.grade, reference_first.grade)
    score = (GRADES[grades[0]] - GRADES[grades[1]]) / 2 if grades[0] and grades[1] else None
    first, second = (outcome.replies[-1].text if outcome.replies else "" for outcome in orders)
    return PairVerdict(name, score, grades, (first, second), answer_first.fault or reference_first.fault)
