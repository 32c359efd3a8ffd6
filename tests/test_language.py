"""Which language a prompt asks for, and whether an answer is in it: real answers, our own cases, and any text."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.evaluate import language
from finetune.evaluate.language import MIN_SHARE, LanguageVerdict, language_of, language_verdict, wanted_language
from finetune.evaluate.shares import wilson_interval

HERE = Path(__file__).parent
REAL = os.environ.get("FINETUNE_REAL_DATA")
ALONE = "nothing to judge: code, formulas, numbers or names alone"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


CASES = read(HERE / "language_cases.jsonl")
LABELS = read(HERE / "language_labels.jsonl")
# The rules for naming a language are in English, Japanese and Chinese; this prompt names one in Italian.
LIMIT = "Traduci in inglese: Il gatto dorme sul divano."


def rates(cases: list[dict[str, Any]], which: bool) -> tuple[float, float]:
    """Precision and recall of one verdict."""
    found = [language_verdict(case["prompt"], case["answer"]).right for case in cases]
    both = sum(case["right"] is which and right is which for case, right in zip(cases, found, strict=True))
    return both / sum(right is which for right in found), both / sum(case["right"] is which for case in cases)


def real_cases() -> list[dict[str, Any]]:
    assert REAL
    answers = read(Path(REAL, "gemma_japanese_answers.jsonl"))
    assert [label["row"] for label in LABELS] == list(range(len(answers)))
    assert [label["sha256"] for label in LABELS] == [
        hashlib.sha256(row["answer"].encode()).hexdigest()[:16] for row in answers
    ]
    return [row | {"right": label["right"], "wanted": "ja"} for row, label in zip(answers, LABELS, strict=True)]


# ---------------------------------------------------------------------------------------------------------------
# Verdicts


@pytest.mark.skipif(REAL is None, reason="FINETUNE_REAL_DATA is not set")
def test_real_answers_are_judged_as_a_reader_judged_them() -> None:
    cases = real_cases()
    assert [row for row, case in enumerate(cases) if not case["right"]] == [101, 107, 113]
    found = [language_verdict(case["prompt"], case["answer"]) for case in cases]
    assert [each.wanted for each in found] == ["ja"] * 120
    assert [
        row for row, (case, each) in enumerate(zip(cases, found, strict=True)) if each.right is not case["right"]
    ] == []


@pytest.mark.parametrize("which", [True, False])
def test_floors_on_all_cases_and_on_those_written_blind(which: bool) -> None:
    assert min(rates(CASES, which)) >= 0.99
    assert min(rates([case for case in CASES if case["blind"]], which)) >= 0.98


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_each_case(case: dict[str, Any]) -> None:
    found = language_verdict(case["prompt"], case["answer"])
    if case["prompt"] == LIMIT:
        assert (found.right, found.wanted) == (False, "it")
    else:
        assert (found.right, found.wanted) == (case["right"], case["wanted"])


def test_there_are_enough_cases_of_each_kind() -> None:
    counts = {right: sum(case["right"] is right for case in CASES) for right in (True, False, None)}
    assert len(CASES) >= 150
    assert min(counts[True], counts[False]) >= 100
    assert counts[None] >= 10
    assert sum(case["blind"] for case in CASES) >= len(CASES) / 2
    assert len({(case["prompt"], case["answer"]) for case in CASES}) == len(CASES)


QUESTION = "富士山について教えてください。"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("日本で一番高い山です。", LanguageVerdict(True, "ja", "ja", "100% of it is ja")),
        ("It is the highest mountain in Japan.", LanguageVerdict(False, "ja", "en", "0% of it is ja")),
        (" \n", LanguageVerdict(False, "ja", None, "the answer is empty")),
        ("3776", LanguageVerdict(None, "ja", None, ALONE)),
        ("WWE、ROH、Impact、Lucha Undergroundなどです。", LanguageVerdict(True, "ja", "ja", "100% of it is ja")),
        ("標高 3776 m、Mount Fuji", LanguageVerdict(True, "ja", "ja", "100% of it is ja")),
        ("Mount Fuji", LanguageVerdict(None, "ja", None, ALONE)),
        ("tet tete dede wawa tete rere wawa", LanguageVerdict(False, "ja", None, "0% of it is ja")),
        ("ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ", LanguageVerdict(False, "ja", None, "0% of it is ja")),
    ],
)
def test_a_verdict_says_what_was_wanted_what_was_found_and_why(answer: str, expected: LanguageVerdict) -> None:
    assert language_verdict(QUESTION, answer) == expected


@pytest.mark.parametrize("name", ["Ludwig van Beethoven", "Leonardo da Vinci", "Miguel de Cervantes", "Lisboa"])
def test_a_name_alone_is_of_any_language_in_its_script(name: str) -> None:
    assert language_verdict("Who was it?", name).right
    assert language_verdict("Wer war es?", name).right
    assert language_verdict("誰でしたか。", name).right is None


def test_a_part_that_tells_nothing_is_in_the_language_of_the_rest() -> None:
    german = "Der Berg ist der höchste des Landes, und im Sommer steigen viele Menschen bis zum Gipfel.\n"
    names = "Tokyo, Osaka, Kyoto"
    assert language_verdict("Why is it so?", f"{german}{names}").why == "0% of it is en"
    assert language_verdict("Warum ist das so?", f"{german}{names}").why == "100% of it is de"


def test_a_prompt_that_leaves_the_language_open_is_not_judged() -> None:
    expected = LanguageVerdict(None, None, "ja", "the prompt leaves the language open")
    assert language_verdict("How do you say thank you in Japanese?", "ありがとうございます") == expected


def test_the_threshold_is_a_share_of_the_length_and_kana_count_twice() -> None:
    japanese, english = "あ" * 30 + "。\n", "these are in English\n"  # 60 and 17 letters
    assert MIN_SHARE == 0.75
    assert language_verdict(QUESTION, japanese + english) == LanguageVerdict(True, "ja", "ja", "78% of it is ja")
    assert (
        language_verdict(QUESTION, f"{'あ' * 30} these are in English。").why == "78% of it is ja"
    )  # in one sentence too
    assert language_verdict(QUESTION, japanese + english + "and so it is\n") == LanguageVerdict(
        False, "ja", "ja", "70% of it is ja"
    )


# ---------------------------------------------------------------------------------------------------------------
# Prompts

PROMPTS: dict[str | None, list[str]] = {
    "ja": [
        "Translate the following to Japanese: Answer in French, please.",
        "Could you please write a thank-you note in Japanese?",
        "Explain the rules of Go in Japanese, please.",
        "Explain in simple Japanese what inflation is.",
        "In Japanese, explain what inflation is.",
        "Your answer must be in Japanese. What is a black hole?",
        "Speak Japanese. How are you?",
        "Provide a Japanese translation of: Where is the station?",
        "Please don't answer in English; answer in Japanese. What is tea?",
        "Answer not in English but in Japanese. What is tea?",
        "日本語に翻訳してください：The weather is nice.",
        "以下を和訳：The weather is nice.",
        "英日翻訳をお願いします。The weather is nice.",
        "英語ではなく日本語で答えてください。What is tea?",
        "必ず日本語で回答すること。What is tea?",
        "日本語だけで答えてください。What is tea?",
        "英語の勉強法を教えてください。",
        "英語の先生に手紙を書いてください。",
        "中国語を話せるようになりたいです。どうすればいいですか。",
        "英語で話すのが苦手です。どうしたらいいですか？",
        "英語で書かれたメールの返事に困っています。助けてください。",
        "日本語と英語の違いは何ですか。",
        "フランス語圏の国を三つ挙げてください。",
        "スペイン語の歴史について教えて。",
        "韓国語の「사랑해」はどういう意味ですか？",
        "Pythonで書いてください：1から10までの和。",
        "次の英文の意味を説明してください。\n\nIt is raining cats and dogs.",
        "次の文章を校正してください。\n\nI has a pen and she have a book.",
        "次の英文を要約してください。\n\nThe city opened a new park last week. It has a pond and a small cafe.",
        "The city opened a new park last week. It has a pond and a small cafe.\n\n上の文章を要約してください。",
        "日本の昔話をやさしい日本語で書いてください。",
        "こんにちは",
        "東京都の人口は？",
        "自己紹介",
        "请用日语回答：什么是光合作用？",
    ],
    None: [
        "Translate 'good morning' into French and German.",
        "How do you say thank you in Korean?",
        "What is the Japanese word for 'library'?",
        "What is the Spanish translation of 'apple'?",
        "Give me five useful phrases in Italian.",
        "Convert this text to romaji: こんにちは",
        "「ありがとう」を韓国語で何と言いますか？",
        "「猫」は中国語でどう書きますか？",
        "英語の例文を三つ作ってください。",
        "英語と中国語に訳してください：こんにちは。",
        "ドイツ語でビールは何といいますか",
        "タイ語の挨拶を教えてください。",
        "1+1=?",
    ],
    "en": [
        "Translate from Japanese to English: 猫が好きです。",
        "Translate this English sentence.\n\nThe cat is asleep.",
        "Write an essay in English about Japanese culture.",
        "Write about the history of the Japanese language.",
        "Tell me about Chinese food.",
        "In Japanese, what is the difference between wa and ga?",
        "In Japanese history, who was Oda Nobunaga?",
        "Describe the role of women in Japanese literature.",
        "Describe trends in French cuisine.",
        "I usually write in French. Can you recommend a good dictionary?",
        "My friend answered in German. Why?",
        "Do you speak Japanese?",
        "Why is English spelling so hard?",
        "Is Chinese harder than Japanese to learn?",
        "Correct the grammar of this sentence: She go to school.",
        "Proofread the following German text.\n\nIch habe gestern ein Buch gekauft und es gelesen.",
        "Write a Python function that reverses a string.",
        "Write a program in Python that prints a list.",
        "Rewrite this paragraph in plain English: The party of the first part shall...",
        "What are some books written in French?",
        "Name three authors who write in Spanish.",
        "英語に翻訳してください。\n\n天気がいいですね。",
        "次の文章を英語に訳せ。\n天気がいい。",
        "以下を英訳してください：天気がいい。",
        "この文を英語にしてください。天気がいい。",
        "日英翻訳：天気がいい。",
        "ブラックホールとは何か、英語で説明せよ。",
        "英語でお願いします。ブラックホールとは何ですか。",
        "回答は英語でお願いします。ブラックホールとは何ですか。",
        "英語のメールを書いてください。内容は会議の欠席です。",
        "昨日、新しい公園が開園しました。遊具や池があります。\n\nSummarize the text above.",
        "フランス料理を英語圏の人に紹介する文章を英語で作成してください。",
        "英語で自己紹介する例を見せてください。",
        "日本の俳句を英語で紹介してください。",
        "以下の日本語を自然な英語に直して下さい。「お疲れ様でした」",
        "Translate to English:\n吾輩は猫である。名前はまだ無い。",
        "吾輩は猫である。名前はまだ無い。\n\nTranslate the above into English.",
        "吾輩は猫である。名前はまだ無い。\n\nこれを英語に訳してください。",
        "Describe a mojito cocktail.",
        "Convert the number in Fahrenheit to Celsius.",
        "I would like to write in French one day. Is it hard?",
        "The wine should be French. Which one?",
        "What is wrong with this prompt?\n\n```\nAnswer in French.\n```",
        "Act as a Japanese teacher and explain the word 木漏れ日.",
        "Hello! How are you today?",
        "请把下面的句子翻译成英语：今天天气很好。",
        "請用英文寫一封信。",
    ],
    "fr": [
        "English to French: sea otter",
        "Use only French. What is a black hole?",
        "ブラックホールについて、フランス語で簡単に説明していただけますか？",
        "Bonjour, comment allez-vous ?",
    ],
    "pt": ["Can you translate this letter into Brazilian Portuguese for me?\n\nDear Anna, ..."],
    "ko": ["Summarize the article below in Korean.\n\nThe city opened a park.", "안녕하세요"],
    "de": [
        "Summarise this in three bullet points in German: The meeting was moved to Friday.",
        "Put this sentence into German: I am hungry.",
    ],
    "es": ["The reply should be written in Spanish. Who was Cervantes?", "List the colours of the rainbow in Spanish."],
    "zh": [
        "Reply in Traditional Chinese: what is AI?",
        "Respond in Mandarin. What is AI?",
        "中国語訳を教えてください：天気がいいですね。",
        "簡体字中国語に翻訳してください：天気がいいですね。",
        "中国語（簡体字）に翻訳してください：天気がいいですね。",
        "繁体字中国語で説明してください：光合成とは。",
        "你好，请问你是谁？",
        "中文和日语有什么区别？",
    ],
}


@pytest.mark.parametrize(("wanted", "prompt"), [(code, each) for code, some in PROMPTS.items() for each in some])
def test_the_language_that_a_prompt_asks_for(wanted: str | None, prompt: str) -> None:
    assert wanted_language(prompt) == wanted


# ---------------------------------------------------------------------------------------------------------------
# Texts


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("ja", "株式会社東京電力"),  # 会 is no traditional form, 東 no simplified one
        ("ja", "慶應義塾大学"),
        ("ja", "榊原・辻堂・峠"),  # characters made in Japan
        ("ja", "ﾊﾝｶｸｶﾅ"),
        ("ja", "東京大学卒業"),
        ("zh", "富士山是火山"),  # all characters are Japanese ones too, but not this verb
        ("ja", "これです。\n山川草木花火水土日月金"),  # where nothing else tells, kana near by do
        ("ja", "東京都在住"),
        ("zh", "我们这里没有问题"),
        ("zh", "我們這裡沒有問題"),
        ("zh", "日语里的“ありがとう”是谢谢的意思"),
        ("ja", "「谢谢」は中国語でありがとうという意味です"),
        ("ko", "안녕하세요"),
        ("th", "สวัสดีครับ"),
        ("el", "Καλημέρα σας"),
        ("he", "שלום לכולם"),
        ("hi", "यह एक अच्छी किताब है और मुझे बहुत पसंद है"),
        ("ru", "Это очень хорошая книга"),
        ("uk", "Це дуже гарна книжка, і її варто прочитати"),
        ("fa", "این کتاب خیلی خوب است و من آن را دوست دارم"),
        ("ar", "هذا كتاب جيد جدا وأنا أحبه"),
        ("vi", "Đây là một cuốn sách rất hay"),
        ("tr", "Bu çok güzel bir kitap"),
        ("pl", "To jest bardzo dobra książka"),
        (None, ""),
        (None, "12,345 km²!"),
        (None, "```python\nprint('hello')\n```"),
        (None, "`this is an English command`"),
        (None, "https://example.com/a/page/in/english"),
        (None, "$$E = mc^2$$ \\(a + b\\) \\begin{align}abc &= def\\end{align}"),
        (None, "for i in range(3):\n    total = total + i"),
        (None, "Rzxq"),  # a word of no language
        (None, "😀🎉"),
    ],
)
def test_the_language_of_a_text(code: str | None, text: str) -> None:
    assert language_of(text) == code


@pytest.mark.parametrize(
    ("wanted", "answer"),
    [
        ("Danish", "Jeg har læst en bog om havet, og den var virkelig god. Næste gang låner jeg en anden."),
        ("Norwegian", "Jeg har lest en bok om havet, og den var veldig bra. Neste gang låner jeg en annen."),
        ("Czech", "Četl jsem knihu o moři a byla opravdu dobrá. Příště si půjčím jinou."),
        ("Slovak", "Čítal som knihu o mori a bola naozaj dobrá. Nabudúce si požičiam inú."),
        ("Indonesian", "Saya membaca buku tentang laut karena bisa dipinjam gratis di perpustakaan kota."),
    ],
)
def test_a_neighbour_is_another_language(wanted: str, answer: str) -> None:
    neighbours = {"Danish", "Norwegian", "Czech", "Slovak", "Indonesian", "Malay"}
    said = {each: language_verdict(f"Answer in {each}: what did you do?", answer).right for each in neighbours}
    assert {each for each, right in said.items() if right} == {wanted}


def test_a_character_speaks_for_the_language_whose_character_set_has_it() -> None:
    # Japanese, simplified, traditional: how little it fits each.
    assert language._misfit("駅") == (0.0, 1, 1)
    assert language._misfit("们") == (1.0, 0, 1)
    assert language._misfit("說") == (1.0, 1, 0)
    assert language._misfit("國") == (0.25, 1, 0)
    assert language._misfit("国") == (0.0, 0, 1)
    assert language._misfit("山") == (0.0, 0, 0)
    assert language._misfit("𠮷") == (0.0, 0, 0)  # in none: it says nothing


def test_importing_loads_no_model() -> None:
    code = "import finetune.evaluate.language, sys; print('py3langid' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE.parent)
    assert done.stdout == "False False\n"


@given(st.text(), st.text())
@settings(deadline=None)
def test_any_text_is_judged(prompt: str, answer: str) -> None:
    found = language_verdict(prompt, answer)
    assert found.right is None or found.wanted or not answer.strip()
    if not answer.strip():
        assert found.right is False


SENTENCES = st.lists(
    st.sampled_from(
        [
            *("富士山は日本で一番高い山です。", "- 静岡県と山梨県", "| 山 | 高さ |", "Python と Rust を使います。"),
            *(
                "It is the highest mountain in Japan.",
                "Es ist der höchste Berg.",
                "这是日本最高的山。",
                "tete dede wawa",
            ),
        ]
    ),
    min_size=1,
)
LINES = st.text(st.characters(exclude_characters="`~", exclude_categories=["Cs"]))


@given(SENTENCES, LINES, st.sampled_from(["```", "~~~", "```python"]), st.integers(min_value=0))
@settings(deadline=None)
def test_fenced_code_changes_no_verdict(sentences: list[str], code: str, fence: str, place: int) -> None:
    answer = "\n".join(sentences)
    sentences.insert(place % (len(sentences) + 1), f"{fence}\n{code}\n{fence[:3]}")
    assert language_verdict(QUESTION, "\n".join(sentences)) == language_verdict(QUESTION, answer)


@pytest.fixture
def alarm() -> Iterator[None]:
    """Ends a test that would go on for hours."""

    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize(
    "part", ["a", "あ", "$", " ", "=", "\\[", "\\begin{a}", "translate ", "<a ", "not ", "日本語で", "def (", "~/"]
)
@pytest.mark.slow
def test_a_text_that_repeats_itself_is_read_once(part: str) -> None:
    # Seconds at most; where a pattern tries again from each place, minutes.
    text = part * (100_000 // len(part))
    language_verdict(QUESTION, f"{text}x")
    language_verdict(f"{text}x", "はい。")


# ---------------------------------------------------------------------------------------------------------------
# Interval


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        # With z = 2: both bounds p solve (right / count - p)^2 = 4 p (1 - p) / count, in fractions.
        (0, 4, Fraction(0), Fraction(1, 2)),
        (4, 4, Fraction(1, 2), Fraction(1)),
        (6, 12, Fraction(1, 4), Fraction(3, 4)),
        (0, 1, Fraction(0), Fraction(4, 5)),
    ],
)
def test_wilson_is_exact(right: int, count: int, low: Fraction, high: Fraction) -> None:
    for bound in (low, high):
        assert (Fraction(right, count) - bound) ** 2 == 4 * bound * (1 - bound) / count
    assert wilson_interval(right, count, z=2) == pytest.approx((float(low), float(high)), rel=1e-15)


@given(st.integers(1, 10**6).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_wilson_holds_the_share_and_mirrors(pair: tuple[int, int]) -> None:
    right, count = pair
    low, high = wilson_interval(right, count)
    assert 0 <= low <= right / count <= high <= 1
    assert wilson_interval(count - right, count) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    assert wilson_interval(right, count, z=3)[0] <= low


def test_wilson_ends_at_the_ends() -> None:
    # In floating point, the formula gives these a little less than nothing and a little more than all.
    assert (wilson_interval(0, 5)[0], wilson_interval(5, 5)[1]) == (0.0, 1.0)


@pytest.mark.parametrize(("right", "count"), [(0, 0), (2, 1), (-1, 1)])
def test_wilson_refuses_what_is_no_share(right: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"^{right} of {count} is not a share$"):
        wilson_interval(right, count)
