"""Checks of training rows, measured against a set of invented reviews with planted faults."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product

import pytest

from ift_peft.data.quality import KINDS, Finding, apply, find, redact
from ift_peft.data.quality.duplicates import near
from ift_peft.data.quality.finding import excerpt
from ift_peft.data.quality.writing import bad_characters, language_of
from ift_peft.data.row import Row, ask
from ift_peft.errors import DataError, Faults
from ift_peft.reporter import Silent
from ift_peft.sections import Quality

LABELS = ("负面", "正面")
PHRASES = {
    ("zh", "正面"): "味道鲜美得让人想念|店员总是笑着迎接|做工细致没有线头|充一次电能用三天|送货比说好的还早|床铺柔软睡得香甜|"
    "价格公道分量十足|音质清澈低音有力|孩子抱着不肯放手|穿上显瘦又舒服|讲解耐心一听就懂|用了半年还像新的",
    ("zh", "负面"): "汤里漂着一根头发|前台爱理不理地翻白眼|洗一次就缩水变形|半天不到就没电关机|快递拖了整整两周|隔壁吵到凌晨三点|"
    "又贵又少根本吃不饱|喇叭里全是杂音|零件松动划破了手|颜色和图片完全两样|客服只会复制粘贴|拆开就发现是坏的",
    ("zh", ""): "上个月和同事一起去的|在商场三楼转角那家|给父母买来过节用的|第一次在这里下单|包装是蓝色的纸盒|周末下午人比较多|"
    "朋友推荐之后才知道|型号是去年出的那款|从车站走过去十分钟|楼下也开了一家分店|搬家以后换的新品牌|优惠券快过期了才用",
    ("en", "正面"): "the crust was perfectly crisp|everyone greeted us warmly|stitching is flawless throughout|"
    "the battery lasts for days|it arrived earlier than promised|we slept like babies|generous portions for the money|"
    "crystal clear sound and rich bass|my niece adores it|flattering and so comfy|taught with real patience|still shines after months",
    ("en", "负面"): "found a hair in my soup|the clerk rolled his eyes at us|it shrank after a single wash|"
    "dead before lunchtime every day|two weeks late with no apology|thumping music until dawn|tiny plates and huge bills|"
    "the speaker crackles constantly|a loose screw cut my thumb|nothing like the photos|support just pastes the same reply|broken right out of the box",
    ("en", ""): "went there with coworkers last month|it sits on the corner of the third floor|bought for my parents' anniversary|"
    "my first order from this place|comes in a blue cardboard box|fairly busy on weekend afternoons|a friend told me about it|"
    "it is last year's model|ten minutes on foot from the station|another branch opened downstairs|switched brands after moving|"
    "used a coupon that was about to expire",
}  # fmt: skip
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
FOREIGN = ("Очень хорошо, приду ещё раз {}", "とても美味しかったので、また行きます{}", "정말 맛있고 친절해서 또 가고 싶어요 {}")


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
    edit(12, "language", lambda number, text: FOREIGN[number % 3].format("！" * number + str(number) * 30))
    for at in (next(fresh) for _ in range(30)):  # 5 % of 600
        text, label, faults = rows[at]
        rows[at] = (text, other(label), faults | {"mislabelled"})
    later = [(same(text, rng), label, {"exact_duplicates"}) for text, label, _ in (rows[next(fresh)] for _ in range(40))]
    later += [(changed(text, rng), label, {"near_duplicates"}) for text, label, _ in (rows[next(fresh)] for _ in range(60))]
    for at in (next(fresh) for _ in range(10)):
        text, label, faults = rows[at]
        rows[at] = (text, label, faults | {"contradictions"})
        later.append((same(text, rng), other(label), {"contradictions", "mislabelled"}))
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


@pytest.mark.slow
def test_planted_faults_are_found_and_nothing_else(planted: Planted, findings: list[Finding]) -> None:
    found = {finding.kind: set(finding.rows) for finding in findings}
    wanted = {"near_duplicates": (0.95, 0.95), "leakage": (0.95, 0.95), "mislabelled": (0.6, 0.75)}
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
