"""The recipe that a job makes of a request, what "auto" becomes, and what is found before anything is trained."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import null, select

from ift_peft.data.row import Message, Row
from ift_peft.data.rows import split_rows
from ift_peft.durable import write_atomically
from ift_peft.errors import DataError, Faults, IftPeftError, ModelError, RecipeError
from ift_peft.recipe import Recipe, validate
from ift_peft.serve.errors import ApiError
from ift_peft.serve.jobs.auto import resolve
from ift_peft.serve.jobs.body import CreateJob, hyperparameters_of, suffix_of
from ift_peft.serve.jobs.folder import JobFolder
from ift_peft.serve.jobs.progress import Progress, at_step
from ift_peft.serve.jobs.recipes import ALLOWED, Planned, plan
from ift_peft.serve.jobs.records import change, job_object, job_record
from ift_peft.serve.jobs.results import step_metrics
from ift_peft.serve.objects import Hyperparameters, Job
from ift_peft.serve.settings import Settings
from ift_peft.serve.store import Store
from ift_peft.serve.store.tables import events, jobs
from ift_peft.train.checkpoints import MANIFEST, REQUIRED
from ift_peft.yaml_source import YamlSource, laid_over
from tests.serve.jobs import chats

ANSWER: Message = {"role": "assistant", "content": "!"}


def planned(
    above: dict[str, Any], *, rows: int = 100, model: str = "tiny", test: bool = False, **given: Any
) -> Planned:
    return plan(
        name="ftjob-x",
        base=model,
        device="cpu",
        seed=5,
        given=Hyperparameters(**given),
        above=above,
        rows=rows,
        tested=test,
    )


def recipe_of(found: Planned) -> Recipe:
    return validate(YamlSource("recipe", found.values))


@pytest.mark.parametrize(
    ("rows", "epochs", "batch"),
    [(1, 25, 1), (10, 10, 1), (33, 3, 1), (34, 3, 1), (512, 3, 16), (9000, 2, 16), (10**6, 1, 16)],
)
def test_auto_follows_the_number_of_rows(rows: int, epochs: int, batch: int) -> None:
    found = resolve(Hyperparameters(), rows)
    assert (found.n_epochs, found.batch_size, found.learning_rate_multiplier) == (epochs, batch, 1.0)
    given = Hyperparameters(n_epochs=2, batch_size=5, learning_rate_multiplier=0.5)
    assert resolve(given, rows) == given


def test_hyperparameters_become_settings_of_the_training() -> None:
    recipe = recipe_of(planned({}, rows=110, n_epochs=7, learning_rate_multiplier=2))
    assert recipe.training["num_train_epochs"] == 7 and recipe.training["per_device_train_batch_size"] == 3
    assert recipe.training["learning_rate"] == pytest.approx(2.4e-3) and recipe.seed == 5
    assert recipe.adapter.embeddings and recipe.data.test is None and recipe.data.test_size == 11
    larger = recipe_of(planned({}, model="Qwen/Qwen3-0.6B", test=True))
    assert larger.training["learning_rate"] == 2e-4 and not larger.adapter.embeddings
    assert larger.data.test == "validation_file.jsonl"  # in the job's folder, wherever that is


def test_what_is_held_out_and_set_aside_does_not_count_as_rows_to_train_on() -> None:
    assert planned({}, rows=512).hyperparameters.batch_size == 14  # 461 of them
    assert planned({}, rows=512, test=True).hyperparameters.batch_size == 16
    assert planned({"data": {"max_train_rows": 70}}, rows=512).hyperparameters.batch_size == 2
    assert planned({"validation": {"size": 0.5}}, rows=512, test=True).hyperparameters.batch_size == 8


def test_the_clients_settings_are_laid_over_ours() -> None:
    above = {
        "adapter": {"r": 4},
        "base": {"quantization": "nf4"},
        "training": {"learning_rate": 6e-4, "max_steps": 5000, "lr_scheduler_type": "constant"},
        "evaluation": {"safety": True, "unseen_instructions": ["？"]},
        "data": {
            "labels": ["a", "b"],
            "instructions": {"pool": ["x", "y"]},
            "augment": {"synonyms": 0.2},
            "quality": {},
        },
    }
    found = planned(above)
    recipe = recipe_of(found)
    assert (recipe.adapter.r, recipe.adapter.embeddings, recipe.base.quantization) == (4, True, "nf4")
    assert recipe.evaluation.safety is not None and recipe.training["logging_steps"] == 5
    assert found.hyperparameters.learning_rate_multiplier == pytest.approx(0.5)
    assert found.hyperparameters.n_epochs == "auto"  # steps decide
    assert planned({"training": {"max_steps": 9}}, n_epochs=2).hyperparameters.n_epochs == 2
    for rate in (0, -1, float("nan"), True, None, "2e-4", 2.0):  # a job of it could not be shown
        with pytest.raises(IftPeftError, match="learning_rate"):
            planned({"training": {"learning_rate": rate}})
    with pytest.raises(RecipeError, match="both"):
        planned({"training": {"learning_rate": 1e-4}}, learning_rate_multiplier=2)
    assert recipe_of(planned({"adapter": {"method": "ia3"}})).adapter.method == "ia3"


def test_nothing_that_is_allowed_takes_the_name_of_a_file() -> None:
    """Every allowed setting is given a file's name; where the schema takes a text, it is one that is read as a text."""
    texts = {"data.system", "data.instruction", "data.records"}
    texts |= {"training.lr_scheduler_type", "training.train_sampling_strategy"}  # words out of a list of their own
    taken = set()
    for section, keys in ALLOWED.items():
        for key in keys:
            try:
                planned({section: {key: "/etc/passwd"}})
            except IftPeftError:
                continue
            taken.add(f"{section}.{key}")
    assert taken == texts


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_modules", "(([a-z0-9._])+)+$X"),
        ("target_modules", ["q_proj", "(a+)+$"]),
        ("rank_pattern", {"(([a-z0-9._])+)+$X": 4}),
        ("alpha_pattern", {"(a+)+$": 4}),
        ("modules_to_save", ["(a+)+$"]),
    ],
)
def test_no_regular_expression_of_a_client_is_matched(name: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=f"(?s)adapter.{name}.*regular expression.*name endings"):
        planned({"adapter": {name: value}})
    allowed = {"target_modules": ["self_attn.q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 2}}
    assert planned({"adapter": allowed}).values["adapter"]["rank_pattern"] == allowed["rank_pattern"]


def test_faults_of_every_kind_are_told_together() -> None:
    with pytest.raises(Faults) as told:
        planned({"adapter": {"r": "x"}, "training": {"learning_rat": 1}, "loss": {"teacher": "a/b"}, "validation": 3})
    assert len(told.value.faults) == 4


def test_a_body_says_its_hyperparameters_once_and_its_suffix_in_plain_letters() -> None:
    asked: dict[str, Any] = {"model": "tiny", "training_file": "file-x"}
    new = {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}}
    old = {"hyperparameters": {"n_epochs": 2}}
    for body in (new, old, {**new, **old}):
        assert hyperparameters_of(CreateJob.model_validate({**asked, **body})).n_epochs == 2
    with pytest.raises(ApiError, match="differ"):
        hyperparameters_of(CreateJob.model_validate({**asked, **new, "hyperparameters": {"n_epochs": 3}}))
    assert suffix_of(CreateJob.model_validate({**asked, "suffix": " My_Model - 2"})) == "my-model-2"
    for suffix, found in (
        ("Ünïcode 情感 X", "'Üï情感'"),
        ("情感分类", "'情感分类'"),
        ("v1.5", "'.'"),
        ("_ -", "no letter"),
    ):
        with pytest.raises(ApiError, match=f"letters a to z, digits and -; found {found}"):
            suffix_of(CreateJob.model_validate({**asked, "suffix": suffix}))


def test_progress_is_read_line_by_whole_line_and_only_of_the_own_trainer(tmp_path: Path) -> None:
    first = JobFolder(tmp_path).handed({"recipe": {}})
    trainer, task = JobFolder(tmp_path).taken()
    assert trainer == first and task["recipe"] == {}
    trainer.report("note", text="一")
    with trainer.progress.open("ab") as file:
        file.write(b'{"kind": "no')
    lines, offset = first.reported(0)
    assert [line["text"] for line in lines] == ["一"]
    assert first.reported(offset) == ([], offset)
    second = JobFolder(tmp_path).handed({"recipe": {}})
    trainer.report("note", text="of a trainer that lost its service")
    trainer.write_error({"code": "x"})
    assert second.reported(0) == ([], 0) and second.error() is None


def test_metrics_are_shown_by_step() -> None:
    lines = [
        {"step": 1, "loss": 3.0, "mean_token_accuracy": 0.25, "epoch": 0.5},
        {"step": 2, "loss": 2.0, "mean_token_accuracy": 0.5, "epoch": 1.0},
        {"step": 2, "eval_loss": 2.5},
    ]
    expected = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,3.0,0.25,,\n2,2.0,0.5,2.5,\n"
    assert step_metrics(lines) == expected
    assert at_step(lines, 2) == {"step": 2, "train_loss": 2.0, "train_mean_token_accuracy": 0.5, "valid_loss": 2.5}
    assert "valid_loss" not in at_step(lines, 3)


@pytest.mark.slow
def test_a_job_that_needs_more_memory_than_is_free_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ift_peft.serve.jobs.trainer import FileReporter, TooLarge, _described, check

    folder = JobFolder(tmp_path).handed({})
    task = {"recipe": {"base": {"model": "tiny"}}, "base": "tiny", "runs": "/srv/ift/runs"}
    write_atomically(folder.training, "".join(json.dumps(row) + "\n" for row in chats(12)))
    values = plan(
        name="ftjob-x",
        base="tiny",
        device="cpu",
        seed=5,
        given=Hyperparameters(),
        above={},
        rows=12,
        tested=False,
    ).values
    recipe = validate(YamlSource("recipe", laid_over(values, {"data": {"train": str(folder.training)}})))
    assert check(recipe, FileReporter(folder)).train.rows == 11
    monkeypatch.setattr("ift_peft.train.memory.free_bytes", lambda device: 1_000_000)
    with pytest.raises(TooLarge, match=r"0\.00 GB free") as refused:
        check(recipe, FileReporter(folder))
    assert _described(refused.value, folder, task)["code"] == "insufficient_memory"
    error = DataError(expected="x", found=f"y at {folder.training}:3", fix="z")
    described = _described(error, folder, task)
    assert (described["code"], described["param"]) == ("invalid_training_file", "training_file")
    assert "training_file:3" in described["message"] and str(tmp_path) not in described["message"]


def test_an_error_of_a_trainer_names_parameters_and_no_paths(tmp_path: Path) -> None:
    from ift_peft.serve.jobs.trainer import _described

    folder = JobFolder(tmp_path / "jobs" / "ftjob-x")
    task = {"recipe": {"base": {"model": "/models/mine"}}, "base": "mine", "runs": str(tmp_path / "runs")}
    found = f"/models/mine/config.json, {folder.validation} and {tmp_path}/runs/x"
    broken = _described(ModelError(expected="a base", found=found, fix="ask"), folder, task)
    assert "found mine/config.json, validation_file and the data folder/runs/x" in broken["message"]
    assert (broken["code"], broken["param"]) == ("model_unavailable", "model")
    expected = "adapter.target_modules to match modules of the base"
    with pytest.raises(DataError) as equal:
        split_rows([Row(({"role": "user", "content": "?"}, ANSWER), f"{at}") for at in range(10)], test_size=1, seed=0)
    described = _described(equal.value, folder, task)
    assert "all prompts are equal" in described["message"] and "change" not in described["message"]
    assert "name a file as validation_file" in described["message"] and described["param"] == "training_file"
    unmatched = ModelError(expected=expected, found="no linear module for 'x'", fix="choose q_proj")
    described = _described(unmatched, folder, task)
    assert (described["code"], described["param"]) == ("invalid_recipe", "recipe")


def test_what_a_trainer_tells_becomes_status_and_time_left(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    store = Store(settings.database_url)
    values = {
        "id": "ftjob-x",
        "created_at": 1,
        "status": "validating_files",
        "model": "tiny",
        "base": "tiny",
        "seed": 1,
    }
    values |= {"recipe": {}, "hyperparameters": {"n_epochs": "auto"}, "resolved": {"n_epochs": 4}, "result_files": []}
    with store.begin() as connection:
        connection.execute(jobs.insert().values(**values, training_file="file-x", error=null(), metadata=null()))
    settings.jobs.joinpath("ftjob-x").mkdir(parents=True)
    folder = JobFolder(settings.jobs / "ftjob-x").handed({})
    progress = Progress(settings, store, job_record(store, "ftjob-x"), folder)
    now = time.time()

    def told(*lines: dict[str, Any]) -> Job:
        with folder.progress.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        progress.update()
        return job_object(job_record(store, "ftjob-x"), organization="local")

    assert told({"kind": "stage", "at": now - 40, "text": "tokenising", "total": 9}).hyperparameters.n_epochs == "auto"
    checked = told({"kind": "finish", "at": now - 30}, {"kind": "checked", "at": now - 30})
    assert (checked.status, checked.hyperparameters.n_epochs) == ("queued", 4)
    stages = [
        {"kind": "stage", "at": now - 20, "text": "measuring the base", "total": 4},
        {"kind": "finish", "at": now - 14},
    ]
    begun = told(
        {"kind": "begun", "at": now - 30}, *stages, {"kind": "stage", "at": now - 14, "text": "training", "total": 100}
    )
    assert (begun.status, begun.estimated_finish) == ("running", None)
    steps = [{"kind": "done", "at": now - 10, "done": 1}, {"kind": "done", "at": now, "done": 51}]
    estimated = told(*steps).estimated_finish
    assert estimated is not None and abs(estimated - (now + 10 / 50 * 49 + 6)) < 2  # and measuring as long as before
    saves = [{"kind": "saved", "at": now, "step": step, "epoch": step / 2, "of": 9} for step in (2, 3, 4, 9)]
    told(*saves)
    progress = Progress(settings, store, job_record(store, "ftjob-x"), folder)  # of the next attempt
    told(saves[-2])
    messages = [event["message"] for event in store.every(select(events))]
    found = [message for message in messages if message.startswith("Checkpoint created")]
    assert found == [f"Checkpoint created at step {step}" for step in (2, 4, 9)]  # none of a pause, which 3 is
    with store.begin() as connection:
        assert change(connection, "ftjob-x", to="cancelled")
    ended = told({"kind": "begun", "at": now}, {"kind": "checked", "at": now})
    assert (ended.status, ended.estimated_finish) == ("cancelled", None)
    with store.begin() as connection:
        assert not change(connection, "ftjob-x", to="running")
    store.close()


def test_a_checkpoint_that_makes_room_while_it_is_looked_at_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*REQUIRED, MANIFEST):
        (tmp_path / name).write_text('{"global_step": 4, "epoch": 1.0, "max_steps": 4}', "utf-8")
    progress = Progress.__new__(Progress)
    progress.every = "epoch"
    assert progress._is_listed(tmp_path)
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # as it was a moment ago
    (tmp_path / "trainer_state.json").unlink()
    assert not progress._is_listed(tmp_path)
