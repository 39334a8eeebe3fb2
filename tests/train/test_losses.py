"""The losses against their definitions in float64, whole and in chunks, and what they do to an adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    set_seed,
)
from trl import SFTConfig

from ift_peft.console import print_scores
from ift_peft.data.render import IGNORE, Rendered
from ift_peft.data.store import to_dataset
from ift_peft.errors import DataError, Faults, ModelError, RecipeError
from ift_peft.evaluate.forgetting import MOST_TEXTS, general_losses, general_texts, windows
from ift_peft.evaluate.measure import forgotten, measure_general
from ift_peft.infer.likelihood import pad
from ift_peft.model.tokenizer import TINY
from ift_peft.recipe import load_recipe
from ift_peft.sections import Evaluation, Loss
from ift_peft.train.losses import Objective, as_base, cross_entropy, divergence, find_teacher
from ift_peft.train.trainer import SupervisedTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SECTIONS = [
    Loss(),
    Loss(label_smoothing=0.1),
    Loss(kl_to_base=0.7),
    Loss(kl_to_base=0.7, kl_direction="reverse", temperature=2.0, label_smoothing=0.2),
    Loss(kind="kl_to_teacher", teacher="tiny", teacher_weight=0.8, temperature=3.0),
    Loss(kind="kl_to_teacher", teacher="tiny", kl_direction="reverse", kl_to_base=0.3),
]


class Silent:
    def note(self, text: str) -> None: ...
    def stage(self, text: str, total: int) -> None: ...
    def advance(self, done: int, detail: str = "") -> None: ...
    def finish(self) -> None: ...


def adapted(*, shift: float = 0.0, **config: Any) -> PeftModel:
    """Tiny with a fresh adapter, or with one whose weights lie about `shift` away from what changes nothing."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": "all-linear", **config}))
    moved(model, shift)
    return model.train()


@torch.no_grad()
def moved(model: torch.nn.Module, shift: float) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter += shift * torch.randn_like(parameter)


def rows(count: int = 4, *, vocabulary: int = 8192) -> list[Rendered]:
    random = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        ids = torch.randint(5, vocabulary, (7 + 3 * index,), generator=random).tolist()
        made.append(Rendered(ids, [IGNORE] * (3 + index) + ids[3 + index :]))
    return made


def teacher_of(section: Loss) -> Any:
    if section.teacher is None:
        return None
    torch.manual_seed(3)
    teacher = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return teacher


def kl64(of: torch.Tensor, against: torch.Tensor, temperature: float) -> torch.Tensor:
    p, q = (logits.double().div(temperature).softmax(-1) for logits in (of, against))
    return (p * (p / q).log()).sum() * temperature**2


def by_definition(section: Loss, model: PeftModel, teacher: Any, batch: dict[str, torch.Tensor]) -> float:
    """The loss of `Loss`'s docstring in float64, from all logits."""

    def logits(of: Any) -> torch.Tensor:
        found: torch.Tensor = of(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return found[batch["labels"][:, 1:] != IGNORE].double()

    targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != IGNORE]
    with torch.no_grad():
        ours = logits(model)
        logs, smoothing = ours.log_softmax(-1), section.label_smoothing
        wanted = (1 - smoothing) * F.one_hot(targets, ours.shape[-1]) + smoothing / ours.shape[-1]
        share = section.teacher_weight if teacher is not None else 0.0
        total = (1 - share) * -(wanted * logs).sum()
        with as_base(model):
            base = logits(model)
        for weight, other in ((section.kl_to_base, base), (share, None if teacher is None else logits(teacher))):
            if other is not None:
                pair = (other, ours) if section.kl_direction == "forward" else (ours, other)
                total += weight * kl64(*pair, section.temperature)
    return float(total)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_is_that_of_torch_and_of_the_definition(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(5, 11), torch.randint(11, (5,))
    found = cross_entropy(logits, targets, label_smoothing=smoothing)
    assert torch.equal(found, F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing))
    wanted = (1 - smoothing) * F.one_hot(targets, 11).double() + smoothing / 11
    assert float(found) == pytest.approx(float(-(wanted * logits.double().log_softmax(-1)).sum()), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_divergences_and_their_gradients_are_those_of_the_definition(direction: Any, temperature: float) -> None:
    torch.manual_seed(0)
    logits, reference = (3 * torch.randn(5, 11)).requires_grad_(), 3 * torch.randn(5, 13)
    found = divergence(logits, reference, direction=direction, temperature=temperature)
    exact = logits.detach().double().requires_grad_()
    pair = (reference[:, :11], exact) if direction == "forward" else (exact, reference[:, :11])
    expected = kl64(*pair, temperature)  # the two columns that only the reference has are left out
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    (slope,), (exact_slope,) = torch.autograd.grad(found, logits), torch.autograd.grad(expected, exact)
    assert torch.allclose(slope.double(), exact_slope, atol=1e-5)


@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_the_objective_is_its_definition_and_chunks_change_nothing(section: Loss) -> None:
    model, teacher = adapted(shift=0.05), teacher_of(section)
    batch = pad(rows(), 0)
    whole = Objective(section, teacher=teacher)(model, batch, bare=model)
    assert whole.tokens == sum(row.supervised for row in rows())
    assert float(whole.loss) == pytest.approx(by_definition(section, model, teacher, batch), rel=1e-5)
    slope = gradients(model, whole.loss)
    assert slope.abs().max() > 1e-3
    for chunk in (1, 5, 1000):
        cut = section.model_copy(update={"chunk": chunk})
        apart = Objective(cut, teacher=teacher)(model, batch, bare=model)
        assert float(apart.loss) == pytest.approx(float(whole.loss), rel=1e-5)
        assert (float(apart.correct), apart.tokens) == (float(whole.correct), whole.tokens)
        assert apart.parts.keys() == whole.parts.keys()
        assert torch.allclose(gradients(model, apart.loss), slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max()))
    assert model.training, "measuring the base must leave the mode as it was"


def test_in_chunks_no_more_than_a_chunk_of_logits_is_made() -> None:
    model, batch = adapted(shift=0.05), pad(rows(), 0)
    seen: list[int] = []
    module = model.get_output_embeddings()
    module.register_forward_hook(lambda _, __, output: seen.append(output.numel() // output.shape[-1]))
    gradients(model, Objective(Loss(kl_to_base=1.0, chunk=3))(model, batch, bare=model).loss)
    own = len(batch["labels"])  # in the model's own forward, one position of each row
    assert max(seen) == own
    assert set(seen) - {own} == {3, sum(row.supervised for row in rows()) % 3}


@pytest.mark.parametrize("name", ["gemma", "gemma uncapped", "cohere"])
def test_chunks_are_refused_where_the_head_is_not_all_that_makes_logits(name: str) -> None:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    if name == "cohere":
        base: Any = CohereForCausalLM(CohereConfig(**small, logit_scale=0.25))
    else:
        cap = None if name == "gemma uncapped" else 30.0
        config = Gemma2Config(**small, head_dim=8, final_logit_softcapping=cap, attn_implementation="eager")
        base = Gemma2ForCausalLM(config)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    moved(model, 0.05)
    batch = pad(rows(vocabulary=97), 0)
    section = Loss(kl_to_base=0.5)
    whole = Objective(section)(model, batch, bare=model)
    assert float(whole.loss) == pytest.approx(by_definition(section, model, None, batch), rel=1e-5)
    cut = Objective(section.model_copy(update={"chunk": 4}))
    if name == "gemma uncapped":
        assert torch.allclose(gradients(model, cut(model, batch, bare=model).loss), gradients(model, whole.loss), 1e-3)
    else:
        with pytest.raises(RecipeError, match=r"remove loss\.chunk"):
            cut(model, batch, bare=model)


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize(
    "config",
    [
        {"lora_dropout": 0.5},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=str,
)
def test_the_base_is_the_base_whatever_is_trained(config: dict[str, Any], chunk: int) -> None:
    """Nothing at all at the start; later the divergence from the untouched base, and a slope that leads back to it."""
    batch = pad(rows(), 0)
    model = adapted(**{**config, "lora_dropout": 0.0})
    fresh = Objective(Loss(kl_to_base=1.0, chunk=chunk))(model, batch, bare=model)
    assert float(fresh.parts["kl_to_base"]) == 0.0
    model = adapted(shift=0.03, **config)
    untouched = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    objective = Objective(Loss(kl_to_base=1.0, chunk=chunk))
    wanted = batch["labels"][:, 1:] != IGNORE
    torch.manual_seed(5)
    found = objective(model, batch, bare=model)
    with torch.no_grad():
        torch.manual_seed(5)  # the same dropout
        ours, theirs = (
            one(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][wanted]
            for one in (model, untouched)
        )
    assert float(found.parts["kl_to_base"]) == pytest.approx(float(kl64(theirs, ours, 1.0)), rel=1e-4)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    gradients(model, found.loss)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained


def test_the_slope_leads_back_to_the_base() -> None:
    model, batch = adapted(shift=0.05), pad(rows(), 0)
    with_kl, without = (
        gradients(model, Objective(Loss(kl_to_base=weight))(model, batch, bare=model).loss) for weight in (1.0, 0.0)
    )
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    away = torch.cat([(p if "lora_B" in name else torch.zeros_like(p)).flatten() for name, p in trained.items()])
    assert float((with_kl - without) @ away) > 0


def drift(weight: float, direction: Any) -> float:
    """The divergence from the base after a few steps, in nats per token."""
    model, batch = adapted(), pad(rows(), 0)
    objective = Objective(Loss(kl_to_base=weight, kl_direction=direction))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(20):
        sums = objective(model, batch, bare=model)
        (sums.loss / sums.tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = Objective(Loss(kl_to_base=1.0, kl_direction=direction))(model, batch, bare=model)
    return float(measured.parts["kl_to_base"]) / measured.tokens


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_large_weight_keeps_the_adapter_near_the_base(direction: Any) -> None:
    free, light, heavy = (drift(weight, direction) for weight in (0.0, 1.0, 3.0))
    assert free > light > heavy
    assert heavy < 0.2 * free


def trained(section: Loss, folder: Path, *, batch: int, steps: int, **settings: Any) -> tuple[list[Any], torch.Tensor]:
    config = SFTConfig(
        output_dir=str(folder),
        report_to="none",
        max_steps=3,
        logging_steps=1,
        optim="sgd",
        learning_rate=0.3,
        lr_scheduler_type="constant",
        use_cpu=True,
        max_length=None,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        activation_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps,
        train_sampling_strategy="sequential",
        **{"bf16": False, **settings},
    )
    set_seed(0)
    trainer = SupervisedTrainer(
        model=AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32),
        args=config,
        train_dataset=to_dataset(rows(12)),
        processing_class=AutoTokenizer.from_pretrained(TINY),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        loss=section,
        teacher=teacher_of(section),
    )
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    return [entry for entry in trainer.state.log_history if "loss" in entry], weights


@pytest.mark.slow
def test_accumulation_and_chunks_change_memory_and_not_the_curve(tmp_path: Path) -> None:
    section = Loss(kind="kl_to_teacher", teacher="tiny", kl_to_base=0.5, label_smoothing=0.1, temperature=2.0)
    plain, weights = trained(section, tmp_path, batch=4, steps=1)
    for other in (section, section.model_copy(update={"chunk": 6})):
        curve, others = trained(other, tmp_path, batch=2, steps=2)
        assert [entry["loss"] for entry in curve] == pytest.approx([entry["loss"] for entry in plain], rel=1e-4)
        assert torch.allclose(others, weights, atol=1e-5)
    first = plain[0]
    assert first["kl_to_base"] == 0.0
    assert first["loss"] == pytest.approx(0.5 * (first["cross_entropy"] + first["kl_to_teacher"]), rel=1e-4)
    assert plain[-1]["kl_to_base"] > 0


@pytest.mark.slow
def test_chunks_reckon_in_the_precision_of_the_trainer(tmp_path: Path) -> None:
    """Under bfloat16 autocast the head that is called on its own is in autocast as well."""
    section = Loss(kl_to_base=0.5)
    whole, _ = trained(section, tmp_path, batch=4, steps=1, bf16=True)
    apart, _ = trained(section.model_copy(update={"chunk": 6}), tmp_path, batch=4, steps=1, bf16=True)
    assert [entry["loss"] for entry in apart] == pytest.approx([entry["loss"] for entry in whole], rel=1e-3)


def test_a_teacher_that_reads_other_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    shutil.copytree(TINY, tmp_path / "other")
    larger = AutoTokenizer.from_pretrained(TINY)
    larger.add_tokens(["<|aside|>"])
    larger.save_pretrained(tmp_path / "other")
    section = Loss(kind="kl_to_teacher", teacher=str(tmp_path / "other"))
    with pytest.raises(ModelError, match="1 that differ between 8,192 and the teacher's 8,193"):
        find_teacher(section, tokenizer, max_length=128)
    tokenizer.save_pretrained(tmp_path / "other")
    found = find_teacher(section, tokenizer, max_length=512)
    assert found is not None and found.folder == tmp_path / "other"
    with pytest.raises(ModelError, match=r"training\.max_length=512"):
        find_teacher(section, tokenizer, max_length=513)
    with pytest.raises(ModelError, match=r"loss\.teacher to be tiny, a folder"):
        find_teacher(section.model_copy(update={"teacher": str(tmp_path / "none")}), tokenizer)
    assert find_teacher(Loss(), tokenizer) is None


def test_what_of_the_section_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    for override in ("loss.kind=kl_to_teacher", "loss.teacher=tiny"):
        with pytest.raises(RecipeError, match="teacher where kind is kl_to_teacher, and only there"):
            load_recipe("sentiment", [override])
    with pytest.raises(RecipeError, match=r"'all' at override 'adapter\.bias=all'"):
        load_recipe("sentiment", ["adapter.bias=all"])
    with pytest.raises(RecipeError, match=r"set loss\.label_smoothing"):
        load_recipe("sentiment", ["training.label_smoothing_factor=0.1"])
    (tmp_path / "teacher").mkdir()
    (tmp_path / "mine.yaml").write_text(
        "data: {train: rows.jsonl}\nloss: {kind: kl_to_teacher, teacher: teacher}\n"
        "evaluation: {general_text: prose.txt}\n",
        "utf-8",
    )
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    assert (recipe.loss.teacher, recipe.evaluation.general_text) == (
        str(tmp_path / "teacher"),
        str(tmp_path / "prose.txt"),
    )


def test_general_text_comes_along_or_from_a_file_and_is_never_much(tmp_path: Path) -> None:
    built_in = general_texts(Evaluation())
    assert 50 <= len(built_in) <= MOST_TEXTS
    assert len(set(built_in)) == len(built_in)
    assert general_texts(Evaluation(forgetting=False)) == []
    lines, table = tmp_path / "lines.txt", tmp_path / "table.jsonl"
    lines.write_text("".join(f"line {i}\n\n" for i in range(200)), "utf-8")
    drawn = general_texts(Evaluation(general_text=str(lines), seed=1))
    assert len(set(drawn)) == MOST_TEXTS
    assert drawn == general_texts(Evaluation(general_text=str(lines), seed=1))
    assert drawn != general_texts(Evaluation(general_text=str(lines), seed=2))
    table.write_text('{"text": "one"}\n{"text": " two "}\n', "utf-8")
    assert general_texts(Evaluation(general_text=str(table))) == ["one", "two"]
    table.write_text('{"text": "one"}\n{"txt": "two"}\n{"text": 3}\n', "utf-8")
    with pytest.raises(Faults, match=r"table\.jsonl:2[\s\S]*table\.jsonl:3"):
        general_texts(Evaluation(general_text=str(table)))
    lines.write_text("\n", "utf-8")
    for path in (lines, tmp_path / "missing.txt"):
        with pytest.raises(DataError, match=path.name):
            general_texts(Evaluation(general_text=str(path)))


def test_general_text_is_scored_as_it_stands_each_by_itself() -> None:
    model, tokenizer = adapted(shift=0.05).eval(), AutoTokenizer.from_pretrained(TINY)
    texts = ["The river bends twice.", "清晨的渡口还没有人。", "a", "long " * 400]
    rendered = windows(texts, tokenizer, max_positions=40)
    assert [len(row.input_ids) for row in rendered][-1] == 40
    assert len(rendered) == 3, "one token predicts nothing"
    found = general_losses(model, tokenizer, texts[:2])
    for text, total, count in zip(texts[:2], found.log_probabilities, found.tokens, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        assert total == pytest.approx(float(logs.gather(1, ids[0, 1:, None]).sum()), rel=1e-5)
        assert count == ids.shape[1] - 1


@pytest.mark.slow
def test_an_adapter_forgets_nothing_at_first_and_something_when_it_is_pushed_away(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, tokenizer = adapted(), AutoTokenizer.from_pretrained(TINY)
    section, reporter = Evaluation(bootstrap_samples=200), Silent()

    def measured() -> dict[str, Any]:
        both = (
            measure_general(model, tokenizer, section, adapter=adapter, reporter=reporter) for adapter in (False, True)
        )
        scores: dict[str, Any] = forgotten(section, *both)["forgetting"]
        return scores

    fresh = measured()
    assert fresh["base"] == fresh["adapter"]
    assert fresh["change"]["loss"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert (fresh["text"], fresh["texts"]) == ("built in", len(general_texts(section)))
    moved(model, 0.1)
    pushed = measured()
    assert pushed["base"] == fresh["base"]
    assert pushed["change"]["loss"]["low"] > 0
    difference = pushed["adapter"]["loss"]["value"] - pushed["base"]["loss"]["value"]
    assert pushed["change"]["loss"]["value"] == pytest.approx(difference, abs=2e-6)
    assert forgotten(section, None, None) == {}
    part = {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}
    print_scores({"base": part, "adapter": part, "change": part, "intervals": "", "forgetting": pushed}, title="")
    printed = capsys.readouterr().out
    assert f"forgetting: {pushed['texts']} general texts (built in)" in printed
    assert f"+{pushed['change']['loss']['value']:.3f}" in printed
    assert json.loads(json.dumps(pushed)) == pushed
