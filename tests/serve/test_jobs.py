"""Fine-tuning jobs by OpenAI's own client: from a file to a model, what is refused, and what is asked twice."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from openai.types.fine_tuning import FineTuningJob

from ift_peft.run_dir import RunDir
from tests.conftest import Ift
from tests.serve import jobs
from tests.serve.conftest import Server

pytestmark = pytest.mark.slow
KEY = 'a "键" of $.any[\'kind]'


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def done(server: Server, client: OpenAI) -> FineTuningJob:
    """A job with a validation file, followed to its end."""
    job = jobs.create(
        server,
        client=client,
        rows=40,
        validation_file=jobs.upload(server.data_dir, jobs.chats(4)),
        suffix="Own_Words ",
        seed=7,
        metadata={"for": "a test", KEY: "值"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 8, "n_epochs": 4}}},
        extra_body={"recipe": {**jobs.QUICK, "validation": {"size": 8}}},
    )
    assert job.status == "validating_files"
    assert job.hyperparameters.learning_rate_multiplier == "auto"
    return jobs.ended(client, job.id)


def test_a_job_ends_with_a_model_of_its_name(server: Server, done: FineTuningJob) -> None:
    assert (done.status, done.error) == ("succeeded", None)
    assert done.fine_tuned_model == f"ft:tiny:local:own-words:{done.id[-8:]}"
    found = done.hyperparameters
    assert (found.n_epochs, found.batch_size, found.learning_rate_multiplier) == (4, 8, 1.0)
    assert done.method is not None and done.method.supervised is not None
    assert done.method.supervised.hyperparameters is not None
    assert done.method.supervised.hyperparameters.n_epochs == 4
    assert (done.seed, done.metadata, done.estimated_finish) == (7, {"for": "a test", KEY: "值"}, None)
    assert done.finished_at is not None and done.finished_at >= done.created_at
    (model,) = jobs.records(server.data_dir, "select * from models where name = ?", done.fine_tuned_model)
    run = RunDir(server.data_dir / model["run"])
    assert run.is_whole and run.adapter == server.data_dir / model["adapter"]
    manifest = run.read("manifest.json")
    assert (manifest["rows"]["test"]["rows"], manifest["rows"]["validation"]["rows"]) == (4, 8)
    assert done.trained_tokens == 4 * manifest["rows"]["train"]["tokens"]
    assert not (server.data_dir / "jobs" / done.id).exists()


def test_events_tell_what_happened_in_order(server: Server, client: OpenAI, done: FineTuningJob) -> None:
    told = jobs.events(client, done.id)
    order = [event.message for event in reversed(told) if event.type == "message"]
    said = ("Created fine-tuning job", "Validating training", "Files validated", "Fine-tuning job started", "New fine")
    places = [next(at for at, message in enumerate(order) if message.startswith(start)) for start in said]
    assert places == sorted(places) and order[-1] == "The job has successfully completed"
    losses = jobs.losses(client, done.id)
    assert [step for step, _ in losses] == list(range(1, 17)) and losses[-1][1] < losses[0][1]
    (scores,) = [event.data["scores"] for event in told if isinstance(event.data, dict) and "scores" in event.data]
    assert scores["adapter"]["loss"]["value"] < scores["base"]["loss"]["value"] and scores["rows"] == 4


def test_checkpoints_are_the_last_three_with_their_losses(server: Server, client: OpenAI, done: FineTuningJob) -> None:
    found = list(client.fine_tuning.jobs.checkpoints.list(done.id))
    kept = [one.step_number for one in found]
    created = [event.message for event in jobs.events(client, done.id) if event.message.startswith("Checkpoint cre")]
    assert created == [f"Checkpoint created at step {step}" for step in (16, 12, 8, 4)]  # also of the one that is gone
    assert kept == sorted(kept, reverse=True) and kept[0] == 16 and 2 <= len(kept) <= 3
    losses = dict(jobs.losses(client, done.id))
    for one in found:
        assert one.fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-{one.step_number}"
        assert one.fine_tuning_job_id == done.id
        assert one.metrics.train_loss == losses[one.step_number] and one.metrics.valid_loss is not None
        assert 0 <= (one.metrics.train_mean_token_accuracy or -1) <= 1
        (row,) = jobs.records(
            server.data_dir, "select adapter from models where name = ?", one.fine_tuned_model_checkpoint
        )
        adapter = server.data_dir / row["adapter"]
        assert (adapter / "adapter_model.safetensors").is_file() and not (adapter / "optimizer.pt").exists()
    best = min(found, key=lambda one: one.metrics.valid_loss or 0)
    assert [one for one in found if one.metrics.full_valid_loss is not None] == [best]
    first = client.fine_tuning.jobs.checkpoints.list(done.id, limit=1)
    assert first.has_more and [one.id for one in first.data] == [found[0].id]
    assert [one.id for one in first.get_next_page().data] == [found[1].id]


def test_the_result_file_has_each_step_with_its_losses(server: Server, client: OpenAI, done: FineTuningJob) -> None:
    (result,) = done.result_files
    (record,) = jobs.records(server.data_dir, "select * from files where id = ?", result)
    content = (server.data_dir / "files" / result).read_bytes()
    assert (record["purpose"], record["bytes"]) == ("fine-tune-results", len(content))
    rows = list(csv.DictReader(content.decode().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, 17))
    losses = dict(jobs.losses(client, done.id))
    assert all(float(row["train_loss"]) == losses[int(row["step"])] for row in rows)
    assert [bool(row["valid_loss"]) for row in rows] == [step % 4 == 0 for step in range(1, 17)]


def test_a_job_that_has_ended_cannot_be_changed(server: Server, client: OpenAI, done: FineTuningJob) -> None:
    for change in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        with pytest.raises(BadRequestError, match="succeeded"):
            change(done.id)
    assert client.fine_tuning.jobs.retrieve(done.id) == done
    for ask in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.retrieve, client.fine_tuning.jobs.list_events):
        with pytest.raises(NotFoundError):
            ask("ftjob-none")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"model": "gpt-4o-mini"}, "model", "tiny"),
    ({"training_file": "file-none"}, "training_file", "No such file"),
    ({"validation_file": "file-none"}, "validation_file", "No such file"),
    ({"method": {"type": "dpo"}}, "method", "dpo"),
    ({"method": {"type": "reinforcement"}}, "method", "reinforcement"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "mine"}}]}, "integrations", "nothing leaves"),
    ({"suffix": "情感分类"}, "suffix", "letters a to z, digits and -"),
    ({"suffix": "x" * 65}, "suffix", "64"),
    ({"seed": -1}, "seed", "0"),
    ({"metadata": {str(number): "x" for number in range(17)}}, "metadata", "16"),
    ({"metadata": {"x" * 65: "x"}}, "metadata", "64"),
    ({"hyperparameters": {"n_epochs": 0}}, "n_epochs", "1"),
    ({"hyperparameters": {"learning_rate_multiplier": 0}}, "learning_rate_multiplier", "0"),
    ({"extra_body": {"loss": "mse"}}, "loss", "Unrecognized"),
    ({"extra_body": {"priority": 101}}, "priority", "100"),
]


@pytest.mark.parametrize(("options", "param", "said"), REFUSED, ids=[str(one[0])[:40] for one in REFUSED])
def test_what_cannot_be_done_is_refused_by_name(
    server: Server, client: OpenAI, options: dict[str, Any], param: str, said: str
) -> None:
    before = jobs.records(server.data_dir, "select count(*) as n from jobs")[0]["n"]
    with pytest.raises(BadRequestError) as refused:
        jobs.create(server, client=client, **options)
    assert param in str(refused.value.param) and said in refused.value.message
    assert jobs.records(server.data_dir, "select count(*) as n from jobs")[0]["n"] == before


def test_all_that_a_recipe_may_not_say_is_told_at_once(server: Server, client: OpenAI) -> None:
    forbidden: dict[str, Any] = {
        "base": {"model": "/etc"},
        "loss": {"teacher": "someone/model"},
        "data": {"train": "/etc/passwd", "augment": {"lexicons": ["/etc/passwd"]}, "instructions": "/etc/hosts"},
        "evaluation": {"general_text": "/etc/passwd", "safety": {"harmful": "/etc/passwd"}, "metrics": ["pass_at_k"]},
        "training": {"output_dir": "/tmp", "num_train_epochs": 2},
        "adapter": {"r": 0},
        "pipeline": {"stages": {}},
        "datas": {},
    }
    with pytest.raises(BadRequestError) as refused:
        jobs.create(server, client=client, extra_body={"recipe": forbidden})
    assert refused.value.param == "recipe"
    named = ("base.model", "loss.teacher", "data.train", "data.augment.lexicons", "data.instructions", "general_text")
    named += ("evaluation.safety", "pass_at_k", "output_dir", "hyperparameters.n_epochs", "adapter.r", "pipeline")
    assert [name for name in (*named, "did you mean 'data'") if name not in refused.value.message] == []
    assert list((server.data_dir / "jobs").iterdir()) == []


def test_rows_that_teach_nothing_fail_the_job_by_name(server: Server, client: OpenAI) -> None:
    rows = jobs.chats(11)
    rows.append({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "很长" * 4000}]})
    job = jobs.create(server, client=client, training_file=jobs.upload(server.data_dir, rows, counted=False))
    failed = jobs.ended(client, job.id)
    assert failed.status == "failed" and failed.error is not None and failed.fine_tuned_model is None
    assert (failed.error.code, failed.error.param) == ("invalid_training_file", "training_file")
    assert "training_file:12" in failed.error.message and str(server.data_dir) not in failed.error.message
    assert "很长" not in failed.error.message + server.log
    assert not jobs.records(server.data_dir, "select * from models where job = ?", job.id)
    assert not (server.data_dir / "runs" / job.id).exists()


def test_lists_are_filtered_by_metadata_and_paged(server: Server, client: OpenAI, done: FineTuningJob) -> None:
    listed = client.fine_tuning.jobs.list(metadata={"for": "a test"})
    assert [job.id for job in listed.data] == [done.id]
    assert client.fine_tuning.jobs.list(metadata={"for": "another"}).data == []
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={KEY: "值", "for": "a test"}).data] == [done.id]
    assert client.fine_tuning.jobs.list(metadata={KEY: "a test"}).data == []
    none = client.fine_tuning.jobs.list(extra_query={"metadata": "null"})
    assert all(job.metadata is None for job in none) and done.id not in [job.id for job in none]
    for wrong in ({"metadata": "x"}, {"metadata": "null", "metadata[for]": "a test"}, {"limit": 0}, {"after": "x"}):
        with pytest.raises(BadRequestError):
            client.fine_tuning.jobs.list(extra_query=wrong)
    every = [event.id for event in jobs.events(client, done.id)]
    assert [event.id for event in client.fine_tuning.jobs.list_events(done.id, limit=7)] == every


def test_a_repeated_create_makes_one_job_and_two_make_two(server: Server, client: OpenAI) -> None:
    file = jobs.upload(server.data_dir, jobs.chats())

    def ask(retries: int = 0, *, seed: int = 1, **headers: str) -> str:
        extra = {"x-stainless-retry-count": str(retries), **headers}
        job = jobs.create(server, client=client, training_file=file, seed=seed, extra_headers=extra)
        made.add(job.id)
        return job.id

    made: set[str] = set()
    with jobs.device_held(server.data_dir):  # none has ended before it is cancelled
        first, second = ask(), ask()
        assert first != second
        assert ask(1) == second and ask(2) == second
        assert ask(1, seed=2) not in (first, second)
        keyed = ask(**{"Idempotency-Key": "mine"})
        assert keyed not in (first, second) and ask(**{"Idempotency-Key": "mine"}) == keyed
        with pytest.raises(BadRequestError, match="another request"):
            ask(seed=2, **{"Idempotency-Key": "mine"})
        assert ask(1, Authorization="Bearer somebody-else") not in (first, second, keyed)
        for job in made:
            cancelled = client.fine_tuning.jobs.cancel(job)
            assert cancelled.status == "cancelled" and cancelled.finished_at is not None
            again = client.fine_tuning.jobs.cancel(job, extra_headers={"x-stainless-retry-count": "1"})
            assert again == cancelled
            with pytest.raises(BadRequestError, match="cancelled"):
                client.fine_tuning.jobs.cancel(job)


def test_real_reviews_are_trained_as_a_recipe_says(server: Server, client: OpenAI, shared: Path) -> None:
    """Rows with labels, an instruction, and accuracy before and after."""
    path = shared / "data" / "online_shopping_10_cats" / "train.csv"
    with path.open(encoding="utf-8-sig", newline="") as lines:
        read = [row for row in csv.DictReader(lines) if 5 < len(row["review"]) < 80]
    rows = [{"text": row["review"], "label": int(row["label"])} for row in read[:: len(read) // 60]][:60]
    recipe: dict[str, Any] = {
        "data": {"instruction": "请判断评论的情感。", "labels": ["负面", "正面"], "test_size": 12},
        "evaluation": {"forgetting": False, "bootstrap_samples": 100, "target": {"accuracy": 1.0}},
        "training": {"max_steps": 6},
    }
    job = jobs.create(
        server, client=client, training_file=jobs.upload(server.data_dir, rows), extra_body={"recipe": recipe}
    )
    assert jobs.ended(client, job.id).status == "succeeded"
    told = jobs.events(client, job.id)
    (scores,) = [event.data["scores"] for event in told if isinstance(event.data, dict) and "scores" in event.data]
    assert scores["rows"] == 12 and set(scores["adapter"]) >= {"accuracy", "f1"}
    assert [event.level for event in told if "accuracy at least 1" in event.message] == ["warn"]
    assert not any(row["text"] in server.log or row["text"] in json.dumps(event.data) for row in rows for event in told)


def test_the_command_line_asks_the_service(server: Server, done: FineTuningJob, ift: Ift) -> None:
    listed = ift("jobs", "--url", server.url, "--limit", "100")
    (line,) = [line for line in listed.stdout.splitlines() if done.id in line]
    assert "succeeded" in line and str(done.fine_tuned_model) in line
    shown = ift("jobs", "show", done.id, "--url", server.url)
    assert f"trained_tokens     {done.trained_tokens}" in shown.stdout and "n_epochs=4" in shown.stdout
    told = ift("jobs", "events", done.id, "--url", server.url, "--limit", "1")
    assert told.stdout.strip().endswith("info   The job has successfully completed")
    refused = ift("jobs", "cancel", done.id, "--url", server.url)
    assert refused.returncode == 5 and "400: Job" in refused.stderr and "succeeded" in refused.stderr
    assert ift("jobs", "cancel").returncode == ift("jobs", "list", done.id).returncode == 5
    nobody = ift("jobs", "--url", "http://127.0.0.1:9")
    assert nobody.returncode == 5 and "a service at http://127.0.0.1:9" in nobody.stderr
