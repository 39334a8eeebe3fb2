"""Checks of training rows, measured against a set of invented reviews with planted faults."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import pytest

from ift_peft.data.quality import KINDS, Finding, apply, duplicates, find, redact
from ift_peft.data.quality.duplicates import Trigrams, jaccard, near
from ift_peft.data.quality.finding import excerpt
from ift_peft.data.quality.writing import bad_characters, language_of
from ift_peft.data.row import Row, ask
from ift_peft.errors import DataError, Faults
from ift_peft.reporter import Silent
from ift_peft.sections import Quality
from tests.conftest import Ift

LABELS = ("负面", "正面")
PHRASES = {
    ("zh", "正面"): (
        "味道鲜美得让人想念|店员总是笑着迎接|做工细致没有线头|充一次电能用三天|送货比说好的还早|床铺柔软睡得香甜|"
        "价格公道分量十足|音质清澈低音有力|孩子抱着不肯放手|穿上显瘦又舒服|讲解耐心一听就懂|用了半年还像新的"
    ),
    ("zh", "负面"): (
        "汤里漂着一根头发|前台爱理不理地翻白眼|洗一次就缩水变形|半天不到就没电关机|快递拖了整整两周|隔壁吵到凌晨三点|"
        "又贵又少根本吃不饱|喇叭里全是杂音|零件松动划破了手|颜色和图片完全两样|客服只会复制粘贴|拆开就发现是坏的"
    ),
    ("zh", ""): "上个月和同事一起去的|在商场三楼转角那家|给父母买来过节用的|第一次在这里下单|包装是蓝色的纸盒|"
    "周末下午人比较多|朋友推荐之后才知道|型号是去年出的那款|从车站走过去十分钟|楼下也开了一家分店|"
    "搬家以后换的新品牌|优惠券快过期了才用",
    ("en", "正面"): "the crust was perfectly crisp|everyone greeted us warmly|stitching is flawless throughout|"
    "the battery lasts for days|it arrived earlier than promised|we slept like babies|"
    "generous portions for the money|crystal clear sound and rich bass|my niece adores it|"
    "flattering and so comfy|taught with real patience|still shines after months",
    ("en", "负面"): "found a hair in my soup|the clerk rolled his eyes at us|it shrank after a single wash|"
    "dead before lunchtime every day|two weeks late with no apology|thumping music until dawn|"
    "tiny plates and huge bills|the speaker crackles constantly|a loose screw cut my thumb|"
    "nothing like the photos|support just pastes the same reply|broken right out of the box",
    ("en", ""): "went there with coworkers last month|it sits on the corner of the third floor|"
    "bought for my parents' anniversary|my first order from this place|comes in a blue cardboard box|"
    "fairly busy on weekend afternoons|a friend told me about it|it is last year's model|"
    "ten minutes on foot from the station|another branch opened downstairs|switched brands after moving|"
    "used a coupon that was about to expire",
}
PHONES = ("手机13800001{:03d}", "座机 010-6234-5{:03d}", "call 202-555-0{:03d}", "+86 139 0000 1{:03d}")


def row(text: str, label: str | None = "正面", *, number: int = 0, file: str = "train", answer: str = "") -> Row:
    prompt = ask(text, instruction="请分类。", system=None)
    return Row((*prompt, {"role": "assistant", "content": label or answer}), f"{file}.jsonl:{number}", label, text)


def reviews(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Text and label without end. No two texts share more than two of their phrases; three in ten concede a point."""
    pools = {key: phrases.split("|") for key, phrases in PHRASES.items()}
    used: list[frozenset[str]] = []
    while True:
        language, label = rng.choice(("zh", "en")), rng.choice(LABELS)
        other = LABELS[1 - LABELS.index(label)]
        parts = rng.sample(pools[language, label], 2) + rng.sample(pools[language, ""], 2)
        if rng.random() < 0.3:
            parts.append(rng.choice(pools[language, other]))
        rng.shuffle(parts)
        if all(len(set(parts) & earlier) <= 2 for earlier in used):
            used.append(frozenset(parts))
            yield ("，" if language == "zh" else ", ").join(parts) + ("。" if language == "zh" else "."), label


def check_digit(digits: str) -> str:
    """The last character of a resident ID (ISO 7064, MOD 11-2)."""
    return "10X98765432"[sum(int(digit) * 2 ** (17 - at) for at, digit in enumerate(digits)) % 11]


def luhn(digits: str) -> str:
    total = sum(sum(divmod(int(digit) * (2 - at % 2), 10)) for at, digit in enumerate(reversed(digits)))
    return str(-total % 10)


def wrong(digit: str) -> str:
    return "1" if digit != "1" else "2"


def personal(number: int, *, valid: bool) -> str:
    """Invented personal data of some kind, or something that only looks like it."""
    person, card = f"11010119{70 + number % 30}0307{number:03d}", f"62220200000{number:04d}"
    kinds: tuple[str, ...] = (
        f"身份证{person}{check_digit(person)}",
        f"卡号{card}{luhn(card)}",
        f"mail guest{number}@example.com",
        *(phone.format(100 + number) for phone in PHONES),
    )
    if not valid:
        kinds = (
            f"证号{person}{wrong(check_digit(person))}",
            f"卡号{card}{wrong(luhn(card))}",
            f"原价{number}999.00元",
            f"订单20240611{number:08d}",
            f"编号 7{number:09d}",
            f"2019-10-{number % 20 + 10} 10:30",
            f"@guest{number} 10-20-{number}",
        )
    return kinds[number % len(kinds)]


BREAK: tuple[Callable[[str], str], ...] = (
    lambda text: text[:9] + "\x07" + text[9:],
    lambda text: text[:9] + "\ufffd" + text[9:],
    lambda text: "\ufeff" + text,
    lambda text: text[:9] + "\u200b" + text[9:],
    lambda text: text + "\u202e",
    lambda text: text + "\ue123",
    lambda text: text + "It’s fine – a café".encode().decode("cp1252"),
    lambda text: text + "很好很好满意".encode().decode("gb18030"),
    lambda text: text + "质量很好".encode("gb18030").decode("latin-1"),
    lambda text: text + "锟斤拷",
)
FOREIGN = (
    "Очень вкусный суп, приду ещё раз",
    "Доставка опоздала на две недели",
    "とても美味しかったので、また行きます",
    "音が割れていて使えませんでした",
    "직원들이 정말 친절해서 또 가고 싶어요",
    "배터리가 반나절도 못 가요",
)


@dataclass
class Planted:
    """Rows, their token counts, and which rows have which fault."""

    train: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    truth: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))


def changed(text: str, rng: random.Random) -> str:
    """`text` with one character replaced: near, as the texts have some fifty characters and more."""
    at = rng.randrange(3, len(text) - 3)
    return text[:at] + ("嗯" if text[at] != "嗯" else "哦") + text[at + 1 :]


def same(text: str, rng: random.Random) -> str:
    """`text` in other width, case or spacing."""
    wide = "".join(chr(ord(c) + 0xFEE0) if c.isascii() and c.isalpha() else c for c in text)
    return rng.choice((text, text.upper(), f"  {text} ", wide, text.replace(", ", ",  ").replace("，", ",")))


def plant(seed: int = 0) -> Planted:
    """760 training and 150 held-out reviews; every fault is planted in rows of its own."""
    rng = random.Random(seed)
    source = reviews(rng)
    rows: list[tuple[str, str, set[str]]] = [(*next(source), set()) for _ in range(600)]
    fresh = iter(rng.sample(range(600), 600))

    def other(label: str) -> str:
        return LABELS[1 - LABELS.index(label)]

    def edit(count: int, fault: str | None, change: Callable[[int, str], str]) -> None:
        for number in range(count):
            at = next(fresh)
            text, label, faults = rows[at]
            rows[at] = (change(number, text), label, faults | ({fault} if fault else set()))

    edit(40, "personal_data", lambda number, text: f"{text} {personal(number, valid=True)} ")
    edit(40, None, lambda number, text: f"{text} {personal(number, valid=False)} ")
    edit(30, "characters", lambda number, text: BREAK[number % len(BREAK)](text))
    edit(len(FOREIGN), "language", lambda number, text: FOREIGN[number])
    for at in (next(fresh) for _ in range(30)):  # 5 % of 600
        text, label, faults = rows[at]
        rows[at] = (text, other(label), faults | {"mislabelled"})
    later = []
    for number in range(100):
        text, label, _ = rows[next(fresh)]
        copy = (same(text, rng), {"exact_duplicates"}) if number < 40 else (changed(text, rng), {"near_duplicates"})
        later.append((copy[0], label, copy[1]))
    for at in (next(fresh) for _ in range(10)):
        text, label, faults = rows[at]
        rows[at] = (text, label, faults | {"contradictions"})
        later.append((same(text, rng), other(label), {"contradictions"}))
    test = [next(source) for _ in range(150)]
    for text, label in test[:25]:
        rows.insert(rng.randrange(len(rows)), (same(text, rng), label, {"leakage"}))
    for text, label in test[25:50]:
        rows.insert(rng.randrange(len(rows)), (changed(text, rng), label, {"leakage"}))
    planted = Planted(test=[row(*pair, number=number, file="test") for number, pair in enumerate(test)])
    for number, (text, label, faults) in enumerate(rows + rng.sample(later, len(later))):  # the first of each is kept
        faults |= {"overlong"} if number % 101 == 7 else set()
        planted.train.append(row(text, label, number=number))
        planted.lengths.append(600 if "overlong" in faults else 40)
        for fault in faults:
            planted.truth[fault].add(number)
    return planted


@pytest.fixture(scope="module")
def planted() -> Planted:
    return plant()


@pytest.fixture(scope="module")
def findings(planted: Planted) -> list[Finding]:
    section = Quality(languages=("zh", "en"))
    return find(planted.train, planted.test, section, labels=LABELS, lengths=planted.lengths, max_length=512)


def test_planted_faults_are_found_and_nothing_else(planted: Planted, findings: list[Finding]) -> None:
    """Precision and recall, measured; below 1 only where similarity or a classifier decides."""
    found = {finding.kind: set(finding.rows) for finding in findings}
    wanted = {"near_duplicates": (0.95, 0.95), "leakage": (0.95, 0.95), "mislabelled": (0.8, 0.6)}
    print(f"\n{'finding':<18}{'planted':>8}{'found':>8}{'precision':>11}{'recall':>8}")
    short = []
    for kind in (kind for kind in KINDS if kind != "imbalance"):
        truth, rows = planted.truth[kind], found[kind]
        scores = len(truth & rows) / len(rows), len(truth & rows) / len(truth)
        print(f"{kind:<18}{len(truth):>8}{len(rows):>8}{scores[0]:>11.2f}{scores[1]:>8.2f}")
        if any(score < least for score, least in zip(scores, wanted.get(kind, (1.0, 1.0)), strict=True)):
            short.append((kind, scores, sorted(truth ^ rows)[:5]))
    assert not short
    assert "imbalance" not in found


def findings_of(
    train: list[Row], section: Quality, *, test: list[Row] | None = None, labels: tuple[str, ...] = LABELS
) -> dict[str, Finding]:
    found = find(
        train, test or [row("另一家完全不同的店", file="test")], section, labels=labels, lengths=None, max_length=None
    )
    return {finding.kind: finding for finding in found if finding.kind != "imbalance"}


def only(**settings: object) -> Quality:
    return Quality(**(dict.fromkeys(KINDS, "off") | settings))  # type: ignore[arg-type]


def test_examples_name_file_and_line_and_show_no_personal_data(planted: Planted, findings: list[Finding]) -> None:
    for finding in findings:
        assert len(finding.examples) == min(3, finding.count)
        assert finding.to_json()["rows"] == list(finding.rows)
        assert f"data.{finding.kind}" in finding.advice or "data.quality." in finding.advice
        for example in finding.examples:
            assert example.where in {planted.train[number].where for number in finding.rows}
            assert redact(example.excerpt)[0] == example.excerpt
    shown = {example.where for finding in findings if finding.kind == "personal_data" for example in finding.examples}
    assert shown <= {planted.train[number].where for number in planted.truth["personal_data"]}


def test_few_of_all_pairs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes ten thousand texts a matter of seconds: only those that share a band are compared one by one."""
    rng, compared = random.Random(0), Counter[str]()
    phrases = "|".join(PHRASES.values()).split("|")
    rows = [row("，".join(rng.sample(phrases, 4)) + str(number), number=number) for number in range(2000)]

    def counted(one: Trigrams, other: Trigrams) -> float:
        compared["pairs"] += 1
        return jaccard(one, other)

    monkeypatch.setattr(duplicates, "jaccard", counted)
    near(rows, {}, threshold=0.8)
    assert 0 < compared["pairs"] < 0.01 * len(rows) ** 2 / 2


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_near_duplicates_are_those_of_comparing_all_with_all(threshold: float) -> None:
    def grams(text: str) -> set[str]:
        return {text[at : at + 3] for at in range(len(text) - 2)}

    rng = random.Random(0)
    texts: list[str] = []
    for text, _ in islice(reviews(rng), 25):
        for changes in range(6):
            texts.append(text)
            for _ in range(changes):
                text = changed(text, rng)
    kept: list[int] = []
    expected = {}
    for number, text in enumerate(texts):
        own = grams(text)
        like = (at for at in kept if len(own & grams(texts[at])) / len(own | grams(texts[at])) >= threshold)
        leader = next(like, None)
        if leader is None:
            kept.append(number)
        else:
            expected[number] = leader
    assert expected
    assert near([row(text) for text in texts], {}, threshold=threshold) == expected


def test_kinds_that_are_off_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(Silent):
        kinds: list[str] = []  # noqa: RUF012

        def advance(self, done: int, detail: str = "") -> None:
            self.kinds.append(detail)

    train = [row("好吃", number=number) for number in range(3)]
    told = Told()
    section = only(exact_duplicates="warn", overlong="stop")
    found = find(train, [], section, labels=LABELS, lengths=[1, 9, 2], max_length=8, progress=told)
    assert told.kinds == ["exact_duplicates", "overlong", ""]
    assert [(finding.kind, finding.rows, finding.severity) for finding in found] == [
        ("exact_duplicates", (1, 2), "note"),
        ("overlong", (1,), "error"),
    ]


def test_a_like_text_with_another_answer_is_no_duplicate() -> None:
    texts = ("这家店的汤面真的很好吃，下次还来。", "这家店的汤面真的不好吃，下次还来。")
    section = only(near_duplicates="warn", leakage="warn", near_threshold=0.5)
    opposed = [row(texts[0], "正面"), row(texts[1], "负面", number=1)]
    assert findings_of(opposed, section) == {}
    assert findings_of([opposed[0], replace(opposed[1], label="正面")], section)["near_duplicates"].rows == (1,)
    assert findings_of(opposed, section, test=[row(texts[0], "负面", file="test")])["leakage"].rows == (0, 1)
    free = [row(texts[0], None, answer="一碗面的评价"), row(texts[1], None, answer="hello there", number=1)]
    assert findings_of(free, section, labels=()) == {}


def test_the_same_text_in_another_phrasing_of_its_instruction_is_the_same_question() -> None:
    other = replace(
        row("好吃", "负面", number=1),
        messages=({"role": "user", "content": "判断：好吃"}, {"role": "assistant", "content": "负面"}),
    )
    section = only(contradictions="warn")
    assert findings_of([row("好吃"), other], section)["contradictions"].rows == (0, 1)
    assert findings_of([row("好吃"), replace(other, source=1)], section) == {}


def test_a_class_without_a_row_is_an_error_and_rare_ones_are_named() -> None:
    train = [row(f"第{number}条", number=number) for number in range(20)] + [row("差", "负面", number=20)]
    found = find(train, [], only(imbalance="warn"), labels=(*LABELS, "中性"), lengths=None, max_length=None)
    assert [(finding.severity, finding.count, finding.rows) for finding in found] == [
        ("error", 1, ()),
        ("warning", 1, (20,)),
    ]
    assert "no row of 中性" in found[0].advice


def test_labels_that_nothing_explains_are_not_judged() -> None:
    rng = random.Random(0)
    train = [
        row("".join(rng.sample("天地玄黄宇宙洪荒日月盈昃", 6)), rng.choice(LABELS), number=number)
        for number in range(60)
    ]
    (found,) = find(train, [], only(mislabelled="stop"), labels=LABELS, lengths=None, max_length=None)
    assert (found.severity, found.count, found.rows) == ("note", 0, ())
    assert "not judged" in found.advice
    assert apply(train, [found], only(mislabelled="stop")).rows == train


@pytest.mark.parametrize("number", range(21))
def test_redaction_replaces_what_proves_itself_and_keeps_everything_else(number: int) -> None:
    before, after = "很好，￥99.50，第3次买（", "）推荐！"
    data = personal(number, valid=True)
    text, words = redact(before + data + after)
    assert sum(words.values()) == 1
    (word,) = words
    head, _, tail = text.partition(f"[{word}]")
    assert head.startswith(before)
    assert tail == after
    assert data.startswith(head.removeprefix(before))
    decoy = before + personal(number, valid=False) + after
    assert redact(decoy) == (decoy, {})


def test_redaction_reaches_text_and_messages_alike_and_leaves_labels_and_instructions() -> None:
    text = "很好，找小店 13800001234 或 a@example.com"
    plain = row(text, "正面")
    asked = replace(plain, messages=({"role": "system", "content": "电话 13900001111"}, *plain.messages))
    cleaned = apply([asked], [], Quality(redact=True))
    (done,) = cleaned.rows
    assert done.text == "很好，找小店 [PHONE] 或 [EMAIL]"
    assert [message["content"] for message in done.messages] == ["电话 13900001111", f"请分类。\n{done.text}", "正面"]
    assert (cleaned.redacted, cleaned.redacted_rows) == ({"PHONE": 1, "EMAIL": 1}, 1)
    free = replace(row("问", None, answer="请打 13800001234"), text=None)
    assert apply([free], [], Quality(redact=True)).rows[0].answer == "请打 [PHONE]"
    assert apply([asked], [], Quality()).rows == [asked]


def test_stop_raises_with_examples_of_every_kind_that_stops() -> None:
    train = [row("好吃"), row("好吃", number=1), row("打 13800001234 找我", number=2)]
    section = only(exact_duplicates="stop", personal_data="stop")
    found = list(findings_of(train, section).values())
    with pytest.raises(Faults) as caught:
        apply(train, found, section)
    for part in (
        "exact_duplicates=stop",
        "train.jsonl:1: 好吃",
        "the same as train.jsonl:0",
        "train.jsonl:2",
        "[PHONE]",
    ):
        assert part in str(caught.value)
    assert "13800001234" not in str(caught.value)


def test_drop_leaves_out_training_rows_with_their_reasons_and_nothing_else() -> None:
    train = [row("好吃"), row("好\x07吃", number=1), row("好\x07吃", number=2), row("难吃", "负面", number=3)]
    test = [row("好吃", file="test"), row("x\x07", file="test", number=1)]
    kept = list(test)
    section = only(exact_duplicates="drop", characters="drop", leakage="warn")
    cleaned = apply(train, list(findings_of(train, section, test=test).values()), section)
    assert cleaned.rows == [train[0], train[3]]
    assert [dropped.to_json() for dropped in cleaned.dropped] == [
        {"where": "train.jsonl:1", "kinds": ["characters"], "text": "好\x07吃"},
        {"where": "train.jsonl:2", "kinds": ["exact_duplicates", "characters"], "text": "好\x07吃"},
    ]
    assert test == kept
    assert cleaned.notes() == ["2 training rows were left out (data.quality: characters 2, exact_duplicates 1)"]
    with pytest.raises(DataError, match="all were dropped"):
        apply(train[1:3], list(findings_of(train[1:3], section).values()), section)


@pytest.mark.parametrize(
    "text",
    [
        "一家人👨‍👩‍👧很开心",
        "می‌خواهم",
        "café naïve, Zürich – “fine”…",
        "价格￥100，50°C",
        "联通卡",
        "不错·····下次来",
        "a\tb\nc",
    ],
)
def test_unusual_but_right_characters_are_left_alone(text: str) -> None:
    assert bad_characters(text) is None


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("这款 iPhone 手机很好用", "zh"),
        ("The 北京 branch of this restaurant is great", "en"),
        ("好评", None),
        ("👍👍 12345", None),
        ("とても美味しい", "Japanese"),
        ("Отличный товар", "Cyrillic"),
    ],
)
def test_the_language_is_told_by_the_script_that_says_most(text: str, language: str | None) -> None:
    assert language_of(text) == language


def test_an_excerpt_is_short_shows_its_place_and_hides_personal_data() -> None:
    text = "很" * 100 + "好\u200b吃 13800001234 " + "来" * 100
    shown = excerpt(text, at=101)
    assert "好<U+200B>吃 [PHONE]" in shown
    assert shown.startswith("…很") and shown.endswith("来…")
    assert len(shown) < 70


@pytest.mark.slow
def test_the_command_prints_findings_and_what_is_learnt_and_exits_with_3_where_it_stops(
    tmp_path: Path, ift: Ift
) -> None:
    records = [{"text": f"第{number}次来，好吃。", "label": "正面"} for number in range(6)]
    records += [
        {"text": "难吃\u200b", "label": "负面"},
        {"text": "又慢又贵", "label": "负面"},
        {"text": "又慢又贵", "label": "负面"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "味道不错", "label": "正面"}) + "\n", "utf-8")
    recipe = "data: {train: rows.jsonl, test: test.jsonl, labels: [负面, 正面], quality: {exact_duplicates: drop}}\n"
    (tmp_path / "mine.yaml").write_text(recipe, "utf-8")
    done = ift("check", "mine.yaml", "--rows", "1", "--json", "found.json")
    assert done.returncode == 0, done.stderr
    assert "rows.jsonl:7  invisible character U+200B" in done.stdout
    assert "⟦正│面│<|end|>⟧" in done.stdout
    assert "3 in answer 1" in done.stdout
    report = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert report["rows"]["training"]["rows"] == 8
    assert {found["kind"] for found in report["findings"]} >= {"exact_duplicates", "characters"}
    assert ift("check", "mine.yaml", "data.quality.characters=stop").returncode == 3


def test_earlier_turns_count_for_what_a_row_asks_and_are_redacted() -> None:
    def row(earlier: str, number: int) -> Row:
        turns = [("user", earlier), ("assistant", "好的"), ("user", "要多久？"), ("assistant", "十天")]
        messages = tuple({"role": role, "content": content} for role, content in turns)
        return Row(messages, f"x:{number}", text="要多久？")

    rows = [row("我想学游泳，电话 13812345678", 1), row("我想学钢琴", 2), row("我想学钢琴", 3)]
    findings = findings_of(rows, only(exact_duplicates="drop", personal_data="warn"), labels=())
    assert findings["exact_duplicates"].rows == (2,)
    assert findings["personal_data"].rows == (0,)
    section = only(exact_duplicates="drop", redact=True)
    cleaned = apply(rows, [findings["exact_duplicates"]], section)
    assert cleaned.rows[0].messages[0]["content"] == "我想学游泳，电话 [PHONE]"
    assert cleaned.rows[0].messages[2:] == rows[0].messages[2:]
