"""A classifier with a head of its own, on the built-in Llama and on a BERT made here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    set_seed,
)

from ift_peft.errors import ModelError, RecipeError
from ift_peft.evaluate.ensemble import evaluate_ensemble
from ift_peft.model.base import load_base
from ift_peft.model.heads import ClassHead
from ift_peft.model.tokenizer import locate_base
from ift_peft.recipe import load_recipe, recipes_root
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from ift_peft.train.run import train
from tests.conftest import Ift

FILMS = recipes_root() / "data" / "films"
CLASSES = ("negative", "positive")
PLAIN = ("evaluation.forgetting=false", "evaluation.unseen_instructions=null", "evaluation.perturbation=null")
SHORT = ("base.device=cpu", "base.quantization=none", "data.max_train_rows=96", "data.max_test_rows=24")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights, pretrained head and pooler absent, and its WordPiece tokenizer."""
    texts = [json.loads(line)["text"] for line in (FILMS / "train.jsonl").read_text("utf-8").splitlines()]
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=1200, special_tokens=specials))
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )
    set_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        initializer_range=0.125,  # 1 / sqrt(64): at 0.02 attention moves nothing, and only a pretrained BERT can learn
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    folder = tmp_path_factory.mktemp("bert")
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_run(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    recipe = load_recipe(
        "sst2-classifier", [f"base.model={bert}", "training.max_length=64", "training.num_train_epochs=6", *SHORT]
    )
    return train(recipe, root=tmp_path_factory.mktemp("runs"), reporter=Silent())


@pytest.mark.slow
def test_stock_libraries_open_the_adapter_to_the_same_answers(bert: Path, bert_run: RunDir) -> None:
    """Head and new pooler are saved with the adapter: a base with another random head gives the same answers."""
    set_seed(99)
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    adapted = PeftModel.from_pretrained(model, bert_run.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(bert_run.adapter)
    rows = [json.loads(line) for line in bert_run.test_rows.read_text("utf-8").splitlines()]
    lines = [json.loads(line) for line in (bert_run.path / "predictions.jsonl").read_text("utf-8").splitlines()]
    batch = tokenizer([row["messages"][-2]["content"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        probabilities = adapted(**batch).logits.softmax(-1).numpy()
        with adapted.disable_adapter():
            base = adapted(**batch).logits.softmax(-1).numpy()
    ours = np.array([[line["adapter"][name] for name in CLASSES] for line in lines])
    assert np.abs(probabilities - ours).max() < 1e-5
    assert np.abs(base - ours).max() > 1e-3, "the adapter changes something"


@pytest.mark.slow
def test_the_merged_classifier_answers_as_the_run(bert_run: RunDir, ift: Ift, tmp_path: Path) -> None:
    merged = ift("merge", str(bert_run.path), "--output", str(tmp_path / "merged"))
    assert merged.returncode == 0, merged.stderr
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert model.config.id2label == dict(enumerate(CLASSES))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logits = model(**tokenizer(["a warm and funny film"], return_tensors="pt")).logits
    said = ift("predict", str(bert_run.path), "a warm and funny film", "--output", str(tmp_path / "said.jsonl"))
    assert said.returncode == 0, said.stderr
    line = json.loads((tmp_path / "said.jsonl").read_text("utf-8"))
    expected = dict(zip(CLASSES, logits.softmax(-1)[0].tolist(), strict=True))
    assert line["probabilities"] == pytest.approx(expected, abs=1e-4)
    assert "AutoModelForSequenceClassification" in (bert_run.adapter / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_evaluating_the_run_again_gives_its_scores(bert_run: RunDir, ift: Ift) -> None:
    """The base is measured with the random head that it had in training."""
    again = ift("evaluate", str(bert_run.path))
    assert again.returncode == 0, again.stderr
    scores = bert_run.read("scores.json")
    for who in ("base", "adapter"):
        assert f"{scores[who]['accuracy']['value']:.3f}" in again.stdout
        assert f"{scores['calibration'][who]['nll']['value']:.3f}" in again.stdout
    assert "forgetting" not in scores


@pytest.mark.slow
def test_the_built_in_llama_learns_to_classify(tmp_path: Path) -> None:
    """A GPT base reads its last token: rows padded beside longer ones give the same answer as alone."""
    from ift_peft.explain.explanation import explain
    from ift_peft.infer.load import load_model, open_parts
    from ift_peft.infer.predict import answer_all

    words = [("dreadful", "negative"), ("wonderful", "positive")]
    rows = [{"text": f"{word} {'film ' * (i % 9)}", "label": label} for i in range(48) for word, label in words]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    overrides = [f"data.train={tmp_path}/rows.jsonl", "data.test=null", "data.test_size=0.25"]
    recipe = load_recipe("sst2-classifier", [*overrides, "base.device=cpu", "training.num_train_epochs=4"])
    run = train(recipe, root=tmp_path / "runs", reporter=Silent())
    scores = run.read("scores.json")
    assert scores["adapter"]["accuracy"]["value"] == 1.0 > scores["base"]["accuracy"]["value"]
    parts = open_parts(run)
    model, _ = load_model(parts)
    questions = [parts.ask("dreadful"), parts.ask("wonderful " + "film " * 40)]
    together = answer_all(model, parts, questions, max_new_tokens=8)
    for question, answer in zip(questions, together, strict=True):
        (alone,) = answer_all(model, parts, [question], max_new_tokens=8)
        assert alone.probabilities == pytest.approx(answer.probabilities, abs=1e-5)
    for method in ("occlusion", "integrated-gradients"):
        found = explain(model, parts, "wonderful film film film", method=method)  # type: ignore[arg-type]
        assert found.answer == "positive"
        if method == "occlusion":  # which measures what taking a word out does; the other need not rank by that
            assert found.pieces[found.strongest[0]].text.strip() == "wonderful"
        else:
            assert found.adapter.baseline is not None
            assert found.adapter.delta is not None
            assert abs(found.adapter.delta) < 0.02 * abs(found.adapter.score - found.adapter.baseline) + 0.01
        (said,) = answer_all(model, parts, [parts.ask("wonderful film film film")], max_new_tokens=8)
        assert said.probabilities is not None
        assert found.probabilities is not None
        assert found.probabilities[0] == pytest.approx(said.probabilities["positive"], abs=1e-5)


@pytest.mark.slow
def test_gradient_accumulation_does_not_change_the_curve(bert: Path, tmp_path: Path) -> None:
    curves = []
    for batch, steps in ((8, 1), (2, 4)):
        recipe = load_recipe(
            "sst2-classifier",
            [
                f"base.model={bert}",
                "training.max_length=64",
                *SHORT,
                f"training.per_device_train_batch_size={batch}",
                f"training.gradient_accumulation_steps={steps}",
                "training.logging_steps=1",
                "training.train_sampling_strategy=sequential",
                "training.max_steps=5",
            ],
        )
        run = train(recipe, root=tmp_path, reporter=Silent())
        lines = (run.path / "metrics.jsonl").read_text("utf-8").splitlines()
        curves.append([json.loads(line)["loss"] for line in lines])
    assert len(curves[0]) == 5
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def test_a_base_that_brings_a_head_keeps_it(bert: Path, tmp_path: Path) -> None:
    head = ClassHead(CLASSES, pad_token_id=0, seed=1)
    assert load_base(locate_base(str(bert)), device="cpu", head=head).made == ("bert.pooler.dense", "classifier")
    set_seed(3)
    trained = BertForSequenceClassification.from_pretrained(bert, num_labels=2)
    trained.save_pretrained(tmp_path / "trained")
    loaded = load_base(locate_base(str(tmp_path / "trained")), device="cpu", head=head)
    assert loaded.made == ()
    assert torch.equal(loaded.model.classifier.weight, trained.classifier.weight)

    names = {"id2label": {0: "positive", 1: "negative"}, "label2id": {"positive": 0, "negative": 1}}
    trained.config.update(names)
    trained.save_pretrained(tmp_path / "named")
    with pytest.raises(ModelError, match="positive, negative"):
        load_base(locate_base(str(tmp_path / "named")), device="cpu", head=head)
    three = ClassHead((*CLASSES, "mixed"), pad_token_id=0, seed=1)
    with pytest.raises(ModelError, match="LABEL_0, LABEL_1"):
        load_base(locate_base(str(tmp_path / "trained")), device="cpu", head=three)


@pytest.mark.slow
def test_a_roberta_opens_again_and_takes_as_many_tokens_as_it_can(bert: Path, tmp_path: Path) -> None:
    """Its head has parts of its own, and its positions begin after the padding token's number."""
    from ift_peft.adapters.merge import merge
    from ift_peft.infer.load import load_model, open_parts
    from ift_peft.infer.predict import answer_all

    tokenizer = AutoTokenizer.from_pretrained(bert)
    set_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=34,
        pad_token_id=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    overrides = [f"base.model={tmp_path}/roberta", *SHORT, "training.max_steps=3", "data.max_test_rows=8"]
    with pytest.raises(RecipeError, match=r"training\.max_length=32"):
        train(load_recipe("sst2-classifier", [*overrides, "training.max_length=34"]), root=tmp_path, reporter=Silent())
    recipe = load_recipe("sst2-classifier", [*overrides, "training.max_length=32"])
    run = train(recipe, root=tmp_path, reporter=Silent())
    parts = open_parts(run)
    model, _ = load_model(parts)
    (answer,) = answer_all(model, parts, [parts.ask("a film " * 40)], max_new_tokens=8)
    assert answer.truncated
    found = merge(parts, output=tmp_path / "merged", dtype="float32", reporter=Silent())
    assert found.max_logit_difference < 1e-4


@pytest.mark.slow
def test_a_head_over_a_16_bit_base_is_trained_and_kept_in_float32(bert: Path, tmp_path: Path) -> None:
    from ift_peft.infer.likelihood import label_probabilities
    from ift_peft.infer.load import held_out_rows, load_model, open_parts

    overrides = [f"base.model={bert}", *SHORT, "base.compute_dtype=bfloat16", "training.max_length=64"]
    recipe = load_recipe("sst2-classifier", [*overrides, "training.max_steps=4", "training.learning_rate=1e-5"])
    run = train(recipe, root=tmp_path, reporter=Silent())
    weights = load_file(run.adapter / "adapter_model.safetensors")
    heads = {name: weight for name, weight in weights.items() if "lora" not in name}
    assert heads
    assert all(weight.dtype == torch.float32 for weight in heads.values())
    parts = open_parts(run)
    model, _ = load_model(parts)
    fitted = held_out_rows(parts)
    again = label_probabilities(model, parts.renderer, [r.prompt for r in fitted.rows], CLASSES, batch_size=32)
    lines = run.read_lines("predictions.jsonl")
    assert np.abs(again - np.array([[line["adapter"][name] for name in CLASSES] for line in lines])).max() < 1e-5
    prompts = [row.prompt for row in fitted.rows]
    swapped = label_probabilities(model, parts.renderer, prompts, CLASSES[::-1], batch_size=32)
    assert np.abs(swapped[:, ::-1] - again).max() < 1e-6


def test_the_new_head_is_drawn_by_its_seed_alone(bert: Path) -> None:
    weights = []
    for seed, disturbance in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(disturbance)
        base = load_base(locate_base(str(bert)), device="cpu", head=ClassHead(CLASSES, pad_token_id=0, seed=seed))
        weights.append(base.model.classifier.weight)
        assert torch.initial_seed() == disturbance
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_bert_that_is_to_write_is_refused(bert: Path, tmp_path: Path) -> None:
    base = BertForSequenceClassification.from_pretrained(bert, num_labels=2)
    base.save_pretrained(tmp_path / "without_head")  # it has no masked language model's head
    with pytest.raises(ModelError, match="missing, as cls"):
        load_base(locate_base(str(tmp_path / "without_head")), device="cpu")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.labels=null", "data.labels"),
        ("loss.kl_to_base=0.1", "label_smoothing"),
        ("evaluation.forgetting=true", "language-model head"),
    ],
)
def test_what_a_classifier_cannot_do_is_refused(override: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe("sst2-classifier", [override])


@pytest.mark.slow
def test_a_random_bert_learns_from_real_sentences(bert: Path, shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "sst2_sentence"
    overrides = [f"data.train={folder / 'train.tsv'}", f"data.test={folder / 'test.tsv'}", "data.header=false"]
    overrides += ["data.columns.text=0", "data.columns.label=1", "data.max_train_rows=1500", "data.max_test_rows=600"]
    overrides += [f"base.model={bert}", "base.device=cpu", "base.quantization=none", "training.max_length=64"]
    overrides += ["training.num_train_epochs=3", "training.learning_rate=2e-3"]
    scores = train(load_recipe("sst2-classifier", overrides), root=tmp_path, reporter=Silent()).read("scores.json")
    assert scores["adapter"]["accuracy"]["low"] > 0.55
    assert scores["change"]["accuracy"]["low"] > 0.05


@pytest.mark.slow
def test_a_bert_and_a_gpt_answer_together(bert_run: RunDir, tmp_path: Path) -> None:
    """Each on a base of its own, one by a head and one in words, of the same labels and rows."""
    gpt = train(load_recipe("sst2", ["training.max_steps=4", *SHORT, *PLAIN]), root=tmp_path, reporter=Silent())
    scores = evaluate_ensemble([bert_run, gpt], "mean_probs", data=None, reporter=Silent())
    for run, own in zip((bert_run, gpt), scores["members"].values(), strict=True):
        assert own["accuracy"] == run.read("scores.json")["adapter"]["accuracy"]
    found = []
    for run in (bert_run, gpt):
        lines = run.read_lines("predictions.jsonl")
        found.append([[line["adapter"][label] for label in scores["labels"]] for line in lines])
    means = np.mean(found, axis=0)
    truth = [scores["labels"].index(line["answer"]) for line in bert_run.read_lines("predictions.jsonl")]
    assert scores["ensemble"]["accuracy"]["value"] == pytest.approx(np.mean(means.argmax(axis=1) == truth))
    assert scores["verdict"]
