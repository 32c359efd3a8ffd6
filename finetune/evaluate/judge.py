"""Preference of a model's answers over a reference's, by a judge model behind an OpenAI-compatible chat endpoint.

A judge likes the answer that it reads first, or last; so it is asked about every pair twice, with the answers
exchanged, and what is left of that liking is told.
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
from finetune.system.errors import EvaluateError as EvaluateError  # also by this name
from finetune.system.errors import RefusedReply
from finetune.system.terminal import Say, progress_bar

Message = Mapping[str, str]

# Source: the grades and what they count, as on the model card of google/gemma-2-2b-jpn-it.
GRADES = {
    "MuchBetterThan": 1.5,
    "BetterThan": 1.0,
    "SlightlyBetterThan": 0.5,
    "AboutTheSame": 0.0,
    "SlightlyWorseThan": -0.5,
    "WorseThan": -1.0,
    "MuchWorseThan": -1.5,
}
_MIRRORED = dict(zip(GRADES, reversed(GRADES), strict=True))
_BY_LOWER_CASE = {grade.lower(): grade for grade in GRADES}
_GRADE_LINE = re.compile(
    r'(?:\A|\n)[ \t]*(?:\{\s*"grade"\s*:\s*"(?P<json>\w+)"\s*\}|'
    r'(?:(?:grade|判定)\s*[:：]\s*)?"?(?P<plain>\w+)"?)[.。]?\Z',
    re.IGNORECASE,
)
# What a judge that named no grade is told.
_ASK_AGAIN = {
    "en": "Your reply cannot be read: its last line is $line and not a grade in the form asked for. Judge the same two "
    "answers again, in at most one sentence, and end with the line with the grade: one of the seven names, in place "
    'of the dots in {"grade": "..."}',
    "ja": "判定を読み取れませんでした。最後の行が $line となっており、指定の形式の判定になっていません。"
    "同じ二つの回答をもう一度、一文以内で評価し、最後の行に判定を書いてください。"
    '形式は {"grade": "..."} で、「...」には表にある七つの名前のいずれか一つを入れます。',
}
_MAX_ASKED = 3  # how often a judge is asked for a grade
_MARK_LENGTH = 16  # hexadecimal digits
_GIVE_UP_AFTER = 20  # questions without one grade, after which no more are paid for
_MUCH_LEFT_OUT = 1 / 5
_MUCH_BIAS = 1 / 3


@dataclass(frozen=True)
class Pair:
    """A conversation up to an answer, our answer and the reference's."""

    prompt: Sequence[Message]
    answer: str
    reference: str
    id: str


@dataclass(frozen=True)
class Judge:
    """Who judges, and how it is asked.

    Attributes:
        base_url: Where the API begins: what stands before `/chat/completions`.
        language: `en` or `ja`: the rubric.
        key: Sent to `base_url` and nowhere else; empty for an endpoint that wants none.
        timeout: Seconds in which nothing comes.
        workers: Requests at a time.
        max_tokens: Of one reply; a model that thinks first needs room for it.
        prices: USD for a million input and a million output tokens.

    Raises:
        EvaluateError: One of them cannot be used.
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
    """What became of one pair; two values are of our answer in the first place, and of the reference's there."""

    id: str
    score: float | None
    grades: tuple[str | None, str | None]
    """Of the answer in the first place beside the other, as the judge gave them."""
    replies: tuple[str, str]
    """The judge's last words."""
    fault: str | None
    """Why the pair is left out."""


@dataclass(frozen=True)
class Preference:
    """Our answers beside the reference's: from 1.5 (much better) to -1.5 (much worse).

    grades of A, ours first   of A, the reference first   turned          score of the pair
    BetterThan (1.0)          WorseThan (-1.0)            BetterThan      1.0
    BetterThan (1.0)          AboutTheSame (0.0)          AboutTheSame    0.5
    BetterThan (1.0)          BetterThan (1.0)            WorseThan       0.0     the two orders disagree
    """

    mean: float
    standard_error: float | None
    """Of the mean, over pairs; None for a single one."""
    pairs: int
    """Those with a score."""
    grades: dict[str, int]
    """How often our answer was given each grade; two for each pair."""
    disagreements: int
    """Pairs in which the two orders prefer different answers: the judge went by the place."""
    first_place: float
    """What it is worth to stand first: the mean of a grade, less the pair's score."""
    malformed: int
    """Pairs left out because the judge named no grade, however often it was asked."""
    refused: int
    """Pairs left out because the endpoint did not take them, such as one that is too long."""
    requests: int
    """All that were sent now, those that came to nothing included."""
    sent: Usage
    cached: Usage
    verdicts: tuple[PairVerdict, ...]

    @property
    def notes(self) -> list[str]:
        """What a reader of the mean must know."""
        notes = []
        left_out, every = self.malformed + self.refused, len(self.verdicts)
        if left_out > _MUCH_LEFT_OUT * every:
            notes.append(f"{left_out} of {every} pairs are left out, so the mean is not that of all prompts")
        if self.disagreements > _MUCH_BIAS * self.pairs:
            place = "first" if self.first_place > 0 else "second"
            notes.append(
                f"position bias: in {self.disagreements} of {self.pairs} pairs the judge prefers another answer once "
                f"they are exchanged; the {place} place is worth {abs(self.first_place):.2f}"
            )
        return notes

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
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
    """How much a judge prefers our answers; the mean and its standard error are over pairs.

    Args:
        pairs: What was answered.
        judge: Who judges.
        cache: A folder for the judge's replies, made if it is not there.
        say: Takes what a person should know on the way, a line each.
        progress: Whether a terminal shows a bar.

    Raises:
        EvaluateError: The judge cannot be reached or does not take the key, or no pair could be judged. What was
            answered until then is in the cache.
    """
    if not pairs:
        raise EvaluateError("evaluate.prompts: there are no answers to compare")
    places = []
    for pair in pairs:
        orders = (pair.answer, pair.reference), (pair.reference, pair.answer)
        places.append([judge_prompt(pair.prompt, *order, judge.language) for order in orders])
    cache.mkdir(parents=True, exist_ok=True)
    endpoint = Endpoint(judge.base_url, judge.model, judge.key, judge.timeout, judge.max_tokens, cache, say)
    # Equal questions are asked once.
    outcomes = _ask(list(dict.fromkeys(itertools.chain(*places))), judge, endpoint, progress)
    verdicts = tuple(
        _verdict(pair.id, outcomes[ours], outcomes[theirs])
        for pair, (ours, theirs) in zip(pairs, places, strict=True)
    )
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    if not scores:
        raise EvaluateError(
            f"evaluate.judge.model: {judge.model} judged none of {len(pairs)} pairs: {verdicts[0].fault}"
        )
    grades = [[str(grade) for grade in verdict.grades] for verdict in verdicts if verdict.score is not None]
    counts = Counter(itertools.chain(*((ours, _MIRRORED[theirs]) for ours, theirs in grades)))
    refused = sum(outcomes[ours].refused or outcomes[theirs].refused for ours, theirs in places)
    replies = [reply for outcome in outcomes.values() for reply in outcome.replies]
    return Preference(
        mean=statistics.fmean(scores),
        standard_error=statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None,
        pairs=len(scores),
        grades={grade: counts[grade] for grade in GRADES},
        disagreements=sum(GRADES[ours] * GRADES[theirs] > 0 for ours, theirs in grades),
        first_place=statistics.fmean(GRADES[grade] for grade in itertools.chain(*grades)),
        malformed=len(pairs) - len(scores) - refused,
        refused=refused,
        requests=endpoint.requests,
        sent=usage([reply for reply in replies if not reply.cached], judge.prices),
        cached=usage([reply for reply in replies if reply.cached], judge.prices),
        verdicts=verdicts,
    )


def judge_prompt(prompt: Sequence[Message], first: str, second: str, language: str) -> str:
    """What the judge reads: the rubric, and the texts between tags that none of them can close.

    The tags carry a code that is made of the texts and stands in none of them.
    """
    rubric = (Path(__file__).parent / "rubrics" / f"{language}.md").read_text(encoding="utf-8")
    turns = [(message["role"], message["content"]) for message in prompt]
    texts = json.dumps([turns, first, second])
    marks = (hashlib.sha256(f"{n}{texts}".encode()).hexdigest()[:_MARK_LENGTH] for n in itertools.count())
    mark = next(mark for mark in marks if mark not in texts)
    conversation = "\n".join(f"<{role} {mark}>\n{content}\n</{role} {mark}>" for role, content in turns)
    # Filled in at once: a placeholder inside a text is text.
    return string.Template(rubric).substitute(
        mark=mark, conversation=conversation, first=first, second=second
    )


def grade_in(reply: str) -> str | None:
    """The grade that a reply ends with; None where its last line is not a grade in the form asked for."""
    plain = re.sub(r"```(?:\w+(?=\n))?|[`*]", "", reply).strip()
    found = _GRADE_LINE.search(plain)
    return _BY_LOWER_CASE.get((found["json"] or found["plain"]).lower()) if found else None


# ---------------------------------------------------------------------------------------------------------------
# Asking


@dataclass(frozen=True)
class _Outcome:
    """What came of a question: a grade, or why there is none."""

    grade: str | None
    fault: str | None
    refused: bool
    replies: tuple[Reply, ...]


def _ask(questions: list[str], judge: Judge, endpoint: Endpoint, progress: bool) -> dict[str, _Outcome]:
    """What came of each question.

    Until a request has been sent they are asked singly: what is wrong with the endpoint is met once, and what it
    does not take is known to all that follow. Threads do the rest. They are daemons, so that Ctrl-C waits for no
    reply; one that comes while the process still lives is kept.
    """
    waiting = deque(questions)
    outcomes: dict[str, _Outcome] = {}
    done: queue.SimpleQueue[tuple[str, _Outcome | BaseException]] = queue.SimpleQueue()

    def work() -> None:
        one = ""
        try:
            with endpoint.client() as client:
                while not endpoint.stop.is_set():
                    try:
                        one = waiting.popleft()
                    except IndexError:  # other threads have the rest
                        return
                    done.put((one, _judge(one, judge.language, endpoint, client)))
        except BaseException as error:
            done.put((one, error))

    with progress_bar("judge", len(questions), progress) as advance:

        def take(one: str, outcome: _Outcome | BaseException) -> None:
            if isinstance(outcome, BaseException):
                raise outcome
            outcomes[one] = outcome
            advance(1)
            if len(outcomes) == _GIVE_UP_AFTER and not any(found.grade for found in outcomes.values()):
                none = f"{judge.model} answered none of {_GIVE_UP_AFTER} questions with a grade"
                raise EvaluateError(f"evaluate.judge.model: {none}: {outcome.fault}")

        try:
            with endpoint.client() as client:
                while waiting and not endpoint.requests:
                    one = waiting.popleft()
                    take(one, _judge(one, judge.language, endpoint, client))
            left = len(waiting)
            for number in range(min(left, judge.workers)):
                threading.Thread(target=work, name=f"judge-{number}", daemon=True).start()
            for _ in range(left):
                take(*done.get())
        finally:
            endpoint.stop.set()
    return outcomes


def _judge(text: str, language: str, endpoint: Endpoint, client: httpx2.Client) -> _Outcome:
    """Asks until the judge names a grade; what it said before is said back to it, with what was wrong."""
    messages = [{"role": "user", "content": text}]
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
        # Its end is enough, and a turn must not be empty.
        said = {"role": "assistant", "content": reply.text[-2000:] or "..."}
        messages = [*messages, said, {"role": "user", "content": again}]
    cut = f", cut off at max_tokens ({endpoint.max_tokens})" if replies[-1].cut else ""
    fault = f"asked {_MAX_ASKED} times, the judge named no grade; its last reply ends with {line}{cut}"
    return _Outcome(None, fault, False, tuple(replies))


# ---------------------------------------------------------------------------------------------------------------
# The result


def _verdict(name: str, ours: _Outcome, theirs: _Outcome) -> PairVerdict:
    score = None
    if ours.grade and theirs.grade:
        score = (GRADES[ours.grade] - GRADES[theirs.grade]) / 2
    texts = [outcome.replies[-1].text if outcome.replies else "" for outcome in (ours, theirs)]
    return PairVerdict(
        name, score, (ours.grade, theirs.grade), (texts[0], texts[1]), ours.fault or theirs.fault
    )
