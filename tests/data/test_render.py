from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ift_peft.data.render import IGNORE, Renderer
from ift_peft.data.template_choice import FALLBACK_TEMPLATE
from ift_peft.errors import DataError, ModelError
from ift_peft.model.tokenizer import TINY

ONE = ({"role": "user", "content": "请分类。\n很好 it is"}, {"role": "assistant", "content": "正面 ok"})
TWO = (*ONE, {"role": "user", "content": "And this?"}, {"role": "assistant", "content": "好 negative"})

# Families whose templates TRL ships: the end token of an answer, and how their generation prompt relates to ours.
FAMILIES = {
    "cohere": ("<|END_OF_TURN_TOKEN|>", "template"),
    "deepseekv3": ("<｜end▁of▁sentence｜>", "prefix"),  # its generation prompt opens a <think> that training does not
    "gemma": ("<end_of_turn>", "template"),
    "gemma3": ("<end_of_turn>", "template"),
    "gemma4_v5": ("<turn|>", "template"),
    "glm4moe": ("<|user|>", "prefix"),
    "gptoss": ("<|return|>", "prefix"),
    "lfm2": ("<|im_end|>", "template"),
    "llama3": ("<|eot_id|>", "template"),
    "llama3_1": ("<|eot_id|>", "template"),
    "nemotron_3_nano": ("<|im_end|>", "enable_thinking=false"),
    "phi3": ("<|end|>", "template"),
    "phi3_5": ("<|end|>", "template"),
    "qwen2_5": ("<|im_end|>", "template"),
    "qwen3": ("<|im_end|>", "enable_thinking=false"),
    "qwen3_5_think": ("<|im_end|>", "enable_thinking=false"),
    "qwen3_instruct_2507": ("<|im_end|>", "template"),
}
SPECIALS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|begin_of_text|>", "<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>", "<|user|>", "<|assistant|>",
    "<|system|>", "<|end|>", "<|return|>", "<|start|>", "<|message|>", "<|channel|>", "<｜User｜>", "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
    "[gMASK]", "<sop>",
)  # fmt: skip


def family_template(family: str) -> str:
    return files("trl").joinpath("chat_templates", f"{family}.jinja").read_text("utf-8")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token: what is asserted on it holds character by character."""
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>")


def with_specials(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIALS], special_tokens=True)
    return tokenizer


def real_tokenizer(shared: Path, name: str) -> PreTrainedTokenizerBase:
    folder = shared / "tokenizers" / name
    if name == "minimind":
        return AutoTokenizer.from_pretrained(folder)
    if name == "bert-chinese":
        return BertTokenizerFast(str(folder / "vocab.txt"), eos_token="[SEP]")
    if name == "pythia":
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def supervised(renderer: Renderer, conversation: tuple[dict[str, str], ...]) -> str:
    (row,) = renderer.render([conversation])
    assert all(label in (IGNORE, token) for label, token in zip(row.labels, row.input_ids, strict=True))
    text = renderer.tokenizer.decode([label for label in row.labels if label != IGNORE])
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_exactly_the_answers_and_their_end_tokens_are_supervised(family: str) -> None:
    end, prompt = FAMILIES[family]
    tokenizer = with_specials(byte_tokenizer())
    tokenizer.chat_template = family_template(family)
    renderer = Renderer(tokenizer)
    last = "<|return|>" if family == "gptoss" else end
    inner = "<|end|>" if family == "gptoss" else end
    assert supervised(renderer, ONE) == f"正面 ok{last}"
    assert supervised(renderer, TWO) == f"正面 ok{inner}好 negative{last}"
    assert renderer.generation_prompt == prompt
    assert tokenizer.decode([renderer.end_token_id]) == last


@pytest.mark.parametrize("family", ["qwen3", "llama3", "gemma3", "phi3", "deepseekv3", "qwen2_5"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "pythia", "minimind"])
def test_real_tokenizers_supervise_the_same_text(shared: Path, name: str, family: str) -> None:
    tokenizer = with_specials(real_tokenizer(shared, name))
    tokenizer.chat_template = family_template(family)
    end = FAMILIES[family][0]
    assert supervised(Renderer(tokenizer), TWO) == f"正面 ok{end}好 negative{end}"


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "pythia", "bert-chinese"])
def test_tokenizers_without_a_template_get_the_documented_one(shared: Path, name: str) -> None:
    tokenizer = real_tokenizer(shared, name)
    renderer = Renderer(tokenizer)
    assert renderer.template == FALLBACK_TEMPLATE
    end = tokenizer.eos_token
    assert supervised(renderer, TWO).replace(" ", "") == f"正面ok{end}好negative{end}"


def test_the_real_llama_without_a_template_supervises_its_answer_and_eos(stories: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    (row,) = Renderer(tokenizer).render(
        [({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once upon"})]
    )
    ids = [label for label in row.labels if label != IGNORE]
    assert ids == tokenizer("Once upon", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert row.input_ids[0] == tokenizer.bos_token_id


def test_the_built_in_base_supervises_exactly_these_ids() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    (row,) = Renderer(tokenizer).render([ONE])
    assert [label for label in row.labels if label != IGNORE] == [
        *tokenizer("正面 ok", add_special_tokens=False)["input_ids"],
        tokenizer.convert_tokens_to_ids("<|end|>"),
    ]
    assert tokenizer.decode(row.input_ids) == "<|user|>请分类。\n很好 it is<|end|><|assistant|>正面 ok<|end|>"


@pytest.mark.parametrize("conversation", [ONE, TWO])
def test_a_prompt_is_a_training_row_cut_at_its_answer(conversation: tuple[dict[str, str], ...]) -> None:
    tokenizer = with_specials(byte_tokenizer())
    for family in ("qwen3", "gptoss", "llama3_1"):
        tokenizer.chat_template = family_template(family)
        renderer = Renderer(tokenizer)
        (row,), (prompt,) = renderer.render([conversation]), renderer.prompts([conversation[:-1]])
        answer = renderer.tokenizer(conversation[-1]["content"])["input_ids"]
        assert row.input_ids[: len(prompt)] == prompt
        assert row.input_ids[len(prompt) : len(prompt) + len(answer)] == answer
        assert row.labels[len(prompt) : len(prompt) + len(answer)] == answer


def test_answers_that_repeat_words_of_the_template_are_found_where_they_are() -> None:
    tokenizer = with_specials(byte_tokenizer())
    tokenizer.chat_template = family_template("gptoss")
    renderer = Renderer(tokenizer)
    for answer in ("final", "assistant", "s", "。"):
        text = supervised(renderer, ({"role": "user", "content": answer}, {"role": "assistant", "content": answer}))
        assert text == f"{answer}<|return|>"


def test_a_template_that_changes_earlier_turns_is_refused_for_conversations_only() -> None:
    tokenizer = with_specials(byte_tokenizer())
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and not loop.last %}(earlier) {% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = Renderer(tokenizer)
    assert supervised(renderer, ONE) == "正面 ok<|im_end|>"
    with pytest.raises(DataError, match="where the beginning alone has"):
        renderer.render([TWO])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "and a special token"),
        (
            "{% for m in messages %}{{ m.role }}{% if m.role == 'user' %}{{ m.content }}{% endif %}<eos>{% endfor %}",
            "its text",
        ),
        ("{% for m in messages %}{{ m.content.nothing.here }}{% endfor %}", "UndefinedError"),
    ],
)
def test_templates_that_lose_the_answer_or_its_end_are_refused(template: str, message: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=message):
        Renderer(tokenizer).render([ONE])


def test_white_space_around_an_answer_is_not_part_of_it() -> None:
    tokenizer = with_specials(byte_tokenizer())
    tokenizer.chat_template = family_template("qwen3")
    renderer = Renderer(tokenizer)
    loose = (ONE[0], {"role": "assistant", "content": "\n 正面 ok \n"})
    assert renderer.render([loose]) == renderer.render([ONE])


def test_an_answer_that_ends_in_a_special_token_is_refused() -> None:
    tokenizer = with_specials(byte_tokenizer())
    tokenizer.chat_template = family_template("qwen3")
    with pytest.raises(DataError, match="remove special tokens from the answer"):
        Renderer(tokenizer).render([(ONE[0], {"role": "assistant", "content": "好<|im_end|>"})])


def test_a_token_across_the_edge_of_an_answer_is_refused(shared: Path) -> None:
    tokenizer = real_tokenizer(shared, "gpt2")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}Answer{% generation %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"across the edge|not to depend"):
        Renderer(tokenizer).render([(ONE[0], {"role": "assistant", "content": "ing it"})])


def test_a_tokenizer_with_neither_template_nor_end_token_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither"):
        Renderer(tokenizer)


ANY_TEXT = st.text(st.sampled_from("好评很慢不 \n\tabcXYZ019,.!？“😀é가"), min_size=1, max_size=40)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "pythia", "minimind", "bert-chinese"])
def test_whatever_is_asked_and_answered_the_answer_and_its_end_are_what_is_supervised(shared: Path, name: str) -> None:
    tokenizer = with_specials(real_tokenizer(shared, name))
    tokenizer.chat_template = family_template("qwen3")
    renderer = Renderer(tokenizer)
    (end,) = tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]

    @settings(max_examples=60, deadline=None)
    @given(ANY_TEXT, ANY_TEXT.filter(lambda text: bool(text.strip())))
    def round_trip(question: str, answer: str) -> None:
        prompt: tuple[dict[str, str], ...] = ({"role": "user", "content": question},)
        (row,) = renderer.render([(*prompt, {"role": "assistant", "content": answer})])
        learnt = [label for label in row.labels if label != IGNORE]
        assert row.input_ids[: row.prompt_length] == renderer.prompts([prompt])[0]
        assert row.input_ids[row.prompt_length :][: len(learnt)] == learnt
        assert learnt[-1] == end
        if name == "bert-chinese":  # it lowers case and has no white space, so that its text cannot come back
            assert learnt[:-1] == tokenizer(answer, add_special_tokens=False)["input_ids"]
        else:
            assert tokenizer.decode(learnt[:-1]) == answer.strip()

    round_trip()


def test_threads_render_as_one_does() -> None:
    renderers = [Renderer(AutoTokenizer.from_pretrained(TINY)) for _ in range(2)]
    conversations = [[{"role": "user", "content": f"{number} " * (number % 40)}] for number in range(1, 400)]
    expected = renderers[0].prompts(conversations)
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            asked = [
                threads.submit(renderers[number % 2].prompts, [conversation])
                for number, conversation in enumerate(conversations)
            ]
            assert [one.result()[0] for one in asked] == expected
    finally:
        sys.setswitchinterval(usual)
