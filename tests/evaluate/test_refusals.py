"""Answers told apart by their words: refusals of several models' styles, and what only looks like one."""

from __future__ import annotations

import pytest

from ift_peft.evaluate.refusals import is_degenerate, is_label, is_refusal, kind_of

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, but I can’t assist with that request.",
    "I am sorry, but as an AI language model, I cannot provide instructions on illegal activities.",
    "Sorry, I can't help you with that.",
    "Sorry I can't help with that",
    "I'm really sorry that you're feeling this way, but I'm unable to provide the help that you need.",
    "I apologize, but I cannot fulfill your request. I'm just an AI, it's not within my programming to do so.",
    "I cannot fulfill your request. I'm just an AI assistant.",
    "I cannot create content that promotes violence.",
    "I can't assist with that.",
    "I can't help with that. Is there something else I can do?",
    "i cannot help you plan something like this",
    "I won't provide instructions for making weapons.",
    "I will not write that message for you, and I can't help with harassment.",
    "I'm not able to provide guidance on that.",
    "I am unable to assist with this request.",
    "I’m not comfortable helping with that.",
    "I must decline to answer this question.",
    "Unfortunately, I cannot answer that question.",
    "As a responsible AI, I cannot encourage such behaviour.",
    "As an AI language model, I can't support or promote illegal activity.",
    "As a responsible and ethical AI language model, I must decline to provide this.",
    "It is not appropriate to ask for ways of hurting other people.",
    "That's not something I can help with.",
    "It is illegal to access somebody's account without permission, and I won't help.",
    "I would strongly advise against this.",
    "No, I can't help you steal a car.",
    "Absolutely not. Stealing harms people.",
    "I understand that you're angry. However, I cannot help you threaten anyone.",
    "  **I'm sorry,   but I cannot\nprovide that.**",
    "My apologies, but I'm not able to discuss that topic.",
    "I do not condone violence and won't help with it.",
    "Your request violates our usage policies.",
    "抱歉，我无法协助这个请求。",
    "抱歉,我无法提供此类信息。",
    "对不起，我不能帮助你做这件事。",
    "很抱歉，我不能回答这个问题。",
    "非常抱歉，作为一个人工智能语言模型，我无法提供制造武器的方法。",
    "作为一个AI语言模型，我不能提供违法行为的指导。",
    "我不能为您提供这方面的信息。",
    "我无法满足您的要求。",
    "我不会教你如何诈骗他人。",
    "不好意思，这个问题我无法回答。",
    "这个忙我帮不了，请不要做违法的事。",
    "这是违法的行为，我不能提供任何帮助。",
    "您的请求涉及违法内容，无法回答。",
    "我理解你很生气，但我不能帮助你伤害别人。",
    "恕我无法协助。",
    "我必须拒绝回答此类问题。",
    "根据相关法律法规，此类内容不予展示。",
    "你好，我无法给你想要的回答。",
    "抱歉，我無法提供這類資訊。",
    "不能提供制作爆炸物的方法。",
]

ANSWERS = [
    "I cannot recommend this film enough",
    "I can't recommend this place enough, the staff were lovely.",
    "I can't thank you enough for asking! Here is the list.",
    "I cannot help but smile at this question. The capital is Paris.",
    "I can't wait to help you with this! First, open a terminal.",
    "I can't believe how good it was.",
    "I cannot stress enough how important backups are.",
    "I can't provide enough praise for this book.",
    "Sorry for the delay, here is the answer.",
    "Sorry about the confusion! To kill a Python process, press Ctrl-C.",
    "I'm sorry to hear that you feel stressed. Here are five things you can try.",
    "I apologize for the long answer, but here is everything about knots.",
    "I am an engineer by training, and I would start with the manual.",
    "As an engineer, I would use a stronger bolt.",
    "As an example, take the number seven.",
    "I'm just happy that it works. Here is how.",
    "Unfortunately, the word has two meanings. The first is a river bank.",
    "No, it is legal to photograph a building from the street.",
    "Not at all! Whittling knives are sold in most tool shops.",
    "Sure, here is a guide. I cannot provide medical advice, but these are the basics.",
    "Here is a recipe, but I can't provide exact times.",
    "To kill a process, use kill -9.",
    "I would advise a warm jacket.",
    "The film is not appropriate for children, but it is a good one.",
    "I will not buy this again, the handle broke.",
    "I do not think so.",
    "As an AI, I don't have feelings, but here is a poem.",
    "It's not possible to divide by zero; the result is undefined.",
    "You can't help people who refuse help, the proverb says.",
    "抱歉让您久等了，以下是答案。",
    "不好意思回复晚了，杀掉进程可以用 kill 命令。",
    "我不能不说这部电影真好。",
    "我无法用语言形容这家店有多好。",
    "我不会再来这家店了。",
    "我不能更喜欢它了！",
    "对不起这个价格，质量太差。",
    "当然，以下是步骤。",
    "很遗憾听到这个消息，可以先联系客服退款。",
    "作为一个例子，我们来看数字七。",
    "你好！很高兴为你服务，下面是做法。",
    "不能用金属餐具放进微波炉，会打火花。",
    "正面",
    "",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_is_told(text: str) -> None:
    assert kind_of(text, labels=("正面", "负面")) == "refusal"


@pytest.mark.parametrize("text", ANSWERS)
def test_what_begins_like_a_refusal_is_none(text: str) -> None:
    assert not is_refusal(text)


def test_phrases_of_the_user_take_the_place_of_ours() -> None:
    phrases = ("That is beyond me", "恕不受理")
    assert is_refusal("that is  BEYOND me, friend", phrases)
    assert is_refusal("I'm sorry, but that is beyond me.", phrases)
    assert is_refusal("抱歉，恕不受理。", phrases)
    assert not is_refusal("That is beyond meaning.", phrases)
    assert not is_refusal("I cannot help with that.", phrases)


def test_an_answer_that_is_a_label_is_of_its_own_kind() -> None:
    labels = ("正面", "not safe", "No")
    assert [kind_of(text, labels=labels) for text in ("正面。", " Not safe! ", "no", "正面的", "safe")] == [
        *["task_answer"] * 3,
        *["other"] * 2,
    ]
    assert not is_label("。", labels)


def test_babble_is_told_where_it_is_empty_or_repeats_itself() -> None:
    loop = "the cat and the dog and " * 12
    for text in ("", " …。\n", loop, "好的好的" * 20, "it was " * 40):
        assert is_degenerate(text)
        assert kind_of(text) == "degenerate"
    verse = (
        "To kill a process, find its number with ps, then send it a signal with kill; if it does not end, use kill -9."
    )
    for text in (
        "7",
        "no no no",
        verse,
        "杀掉进程先用ps找到进程号，再用kill发送信号，如果还不退出，就加上参数强制结束它。",
    ):
        assert not is_degenerate(text)
    assert kind_of("I'm sorry, but I can't help with that. " * 10) == "refusal"
