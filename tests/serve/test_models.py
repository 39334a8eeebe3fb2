"""Models by name: listed, got, deleted with their files; adapters that take turns, and those with their own base."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from sqlalchemy import insert

import ift_peft
from ift_peft.infer.load import load_model, open_parts
from ift_peft.infer.predict import generate
from ift_peft.run_dir import RunDir
from ift_peft.serve.inference.hosts import Host, open_base
from ift_peft.serve.inference.models import DELETED
from ift_peft.serve.settings import Limits, Settings
from ift_peft.serve.store import Store
from ift_peft.serve.store.tables import jobs, models
from tests.serve.inside import Inside
from tests.serve.tuned import changed_copy, record, train_briefly

pytestmark = pytest.mark.slow
QUESTION = [{"role": "user", "content": "What is 3 plus one?"}]
LIMITS = Limits(adapters=2, rows_together=4, whole_models=1)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    data = tmp_path_factory.mktemp("first") / "data"
    return train_briefly(data, "ftjob-first")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", limits=LIMITS)


@pytest.fixture
def server(settings: Settings) -> Iterator[Inside]:
    running = Inside(settings).start()
    yield running
    running.stop()


def add(server: Inside, first: RunDir, number: int) -> str:
    """A tuned model with a checkpoint."""
    job, name = f"ftjob-{number}", f"ft:tiny:local::model{number:03}"
    data = server.settings.data_dir
    made = changed_copy(first, job, number)
    shutil.move(made.path.parent, data / "runs" / job)
    run = RunDir(data / "runs" / job / made.path.name)
    record(server.service.store, data, run, name)
    record(server.service.store, data, run, f"{name}:ckpt-step-2", step=2)
    return name


def ask(client: OpenAI, model: str) -> str:
    done = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=12)
    return str(done.choices[0].message.content)


def test_models_are_listed_and_got_by_any_spelling(server: Inside, first: RunDir) -> None:
    name = add(server, first, 1)
    client = server.client()
    assert [one.id for one in client.models.list()] == ["tiny", name, f"{name}:ckpt-step-2"]
    assert client.models.retrieve(name).owned_by == "local"
    assert client.models.retrieve("tiny").created > 0
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("a/b:c")
    assert raised.value.code == "model_not_found"


def test_deleting_removes_records_files_and_adapter(server: Inside, first: RunDir) -> None:
    name, other = add(server, first, 1), add(server, first, 2)
    client, runs = server.client(), server.settings.runs
    kept = ask(client, other)
    ask(client, f"{name}:ckpt-step-2")
    assert client.models.delete(f"{name}:ckpt-step-2").deleted
    (run,) = (runs / "ftjob-1").glob("2*")
    assert not (run / "checkpoints" / "checkpoint-2").exists()
    ask(client, name)
    assert client.models.delete(name).deleted
    assert sorted(path.name for path in runs.iterdir()) == ["ftjob-2"]
    assert [one.id for one in client.models.list()] == ["tiny", other, f"{other}:ckpt-step-2"]
    (host,) = server.service.models.hosts()
    assert host.stack.names == (other,)
    for missing in (lambda: ask(client, name), lambda: client.models.delete(name)):
        with pytest.raises(openai.NotFoundError):
            missing()
    assert ask(client, other) == kept


def test_deleting_a_model_takes_its_checkpoints_along(server: Inside, first: RunDir) -> None:
    name = add(server, first, 1)
    server.client().models.delete(name)
    assert [one.id for one in server.client().models.list()] == ["tiny"]
    assert not list(server.settings.runs.iterdir())


def test_a_base_and_a_model_at_work_are_not_deleted(server: Inside, first: RunDir) -> None:
    name = add(server, first, 1)
    with pytest.raises(openai.PermissionDeniedError):
        server.client().models.delete("tiny")
    with server.service.store.begin() as connection:
        made = {"id": "ftjob-on", "created_at": 1, "status": "running", "model": name, "base": "tiny", "recipe": {}}
        more = {"hyperparameters": {}, "resolved": {}, "seed": 1, "training_file": "file-x", "result_files": []}
        connection.execute(insert(jobs).values(**made, **more))
    with pytest.raises(openai.BadRequestError) as raised:
        server.client().models.delete(name)
    assert raised.value.code == "model_in_use"
    assert ask(server.client(), name)


def test_an_answer_that_has_begun_is_given_though_its_model_is_deleted(server: Inside, first: RunDir) -> None:
    name = add(server, first, 7)
    client = server.client()
    given: Any = {"model": name, "messages": QUESTION, "temperature": 0, "max_tokens": 200, "logprobs": True}
    whole = client.chat.completions.create(**given).choices[0].message.content
    stream = client.chat.completions.create(stream=True, **given)
    text = next(stream).choices[0].delta.content or ""
    client.models.delete(name)
    assert text + "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


def test_a_deletion_that_was_interrupted_is_finished_at_a_start(settings: Settings, first: RunDir) -> None:
    server = Inside(settings).start()
    name = add(server, first, 1)
    (id_,) = [row["id"] for row in server.service.store.every(models.select()) if row["name"] == name]
    server.stop()
    (settings.runs / "ftjob-1").rename(settings.runs / f"{DELETED}{id_}")
    server = Inside(settings).start()
    assert [one.id for one in server.client().models.list()] == ["tiny"]
    assert not list(settings.runs.iterdir())
    server.stop()


def test_more_models_than_slots_take_turns(server: Inside, first: RunDir) -> None:
    names = [add(server, first, number) for number in range(4)]
    client = server.client()
    once = [ask(client, name) for name in names]
    assert len(set(once)) > 2

    async def together() -> list[str]:
        async with server.async_client() as many:

            async def one(name: str) -> str:
                done = await many.chat.completions.create(model=name, messages=QUESTION, temperature=0, max_tokens=12)
                return str(done.choices[0].message.content)

            return list(await asyncio.gather(*(one(name) for name in names * 4)))

    assert asyncio.run(together()) == once * 4
    (host,) = server.service.models.hosts()
    assert len(host.stack.names) == LIMITS.adapters


def test_an_adapter_that_cannot_share_a_base_has_its_own(server: Inside) -> None:
    data = server.settings.data_dir
    names = {}
    for kind in ("dora", "ia3"):
        adapter = "{method: dora, r: 4}" if kind == "dora" else "{method: ia3}"
        names[kind] = (f"ft:tiny:local:{kind}:00000000", train_briefly(data, f"ftjob-{kind}", adapter=adapter))
        record(server.service.store, data, names[kind][1], names[kind][0])
    for name, run in [*names.values(), *names.values()]:
        parts = open_parts(run)
        model, _ = load_model(parts)
        expected = generate(model, parts, parts.converse(QUESTION).messages, max_new_tokens=12)
        assert ask(server.client(), name).strip() == expected
        assert sum(host.whole for host in server.service.models.hosts()) == 1


def test_bases_leave_memory_when_there_is_no_room_or_no_model_of_theirs(tmp_path: Path, first: RunDir) -> None:
    bases = {"tiny": "tiny", "copy": str(Path(ift_peft.__file__).parent / "model" / "tiny")}
    server = Inside(Settings(data_dir=tmp_path / "data", limits=Limits(bases=1), bases=bases)).start()
    name, client, loaded = add(server, first, 1), server.client(), server.service.models
    tuned = ask(client, name)
    (host,) = loaded.hosts()
    gone = weakref.ref(host)
    del host
    own = ask(client, "copy")
    assert len(loaded.hosts()) == 1 and list(loaded._models) == ["copy"]
    server.until(lambda: gone() is None)
    assert loaded._hold("copy") is not None
    with pytest.raises(openai.RateLimitError):
        ask(client, name)
    loaded.release("copy")
    assert (ask(client, name), ask(client, "copy"), ask(client, name)) == (tuned, own, tuned)
    (host,) = loaded.hosts()
    client.models.delete(name)
    assert loaded.hosts() == [] and not loaded._hosts
    server.until(lambda: host.engine._thread is None)
    server.stop()


def test_a_setting_without_effect_takes_no_base_of_its_own(settings: Settings) -> None:
    opened = open_base(settings, "tiny")
    keys = {
        quantization: {
            replace(
                opened,
                section=opened.section.model_copy(update={"quantization": quantization, "double_quantization": double}),
            ).key
            for double in (True, False)
        }
        for quantization in ("none", "int8", "nf4")
    }
    assert {quantization: len(found) for quantization, found in keys.items()} == {"none": 1, "int8": 1, "nf4": 2}
    assert len(set.union(*keys.values())) == 4


def test_a_model_that_is_asked_while_it_leaves_shares_its_base_again(
    server: Inside, first: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, loaded = [add(server, first, number) for number in range(3)], server.service.models
    once = [ask(server.client(), name) for name in names[:2]]
    server.until(lambda: not loaded._holds)
    leaving, go_on, drop = threading.Event(), threading.Event(), Host.drop

    def slowly(host: Host, adapter: str) -> None:
        if adapter == names[0] and not leaving.is_set():
            leaving.set()
            assert go_on.wait(30)
        drop(host, adapter)

    monkeypatch.setattr(Host, "drop", slowly)
    with ThreadPoolExecutor(2) as threads:
        third = threads.submit(ask, server.client(), names[2])  # which needs the slot of the first
        assert leaving.wait(30)
        again = threads.submit(ask, server.client(), names[0])
        server.until(lambda: names[0] in loaded._opening)
        time.sleep(0.3)
        go_on.set()
        assert (again.result(), bool(third.result())) == (once[0], True)
    assert not any(host.whole for host in loaded.hosts())


def test_each_who_waited_is_told_by_an_error_of_its_own(settings: Settings) -> None:
    server = Inside(replace(settings, bases={"tiny": "tiny", "lost": str(settings.data_dir / "lost")})).start()
    loaded = server.service.models

    async def told() -> list[object]:
        return await asyncio.gather(*(loaded.hold("lost") for _ in range(3)), return_exceptions=True)

    errors = asyncio.run(told())
    assert [getattr(error, "code", None) for error in errors] == ["model_unavailable"] * 3
    assert len({id(error) for error in errors}) == 3
    server.stop()


def test_a_model_whose_files_are_not_those_of_training_is_not_answered(server: Inside, first: RunDir) -> None:
    name = add(server, first, 1)
    (adapter,) = (server.settings.runs / "ftjob-1").glob("2*/adapter/adapter_model.safetensors")
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    adapter.write_bytes(content)
    with pytest.raises(openai.InternalServerError) as raised:
        ask(server.client(), name)
    assert (raised.value.status_code, raised.value.code) == (503, "model_unavailable")
    assert str(server.settings.data_dir) not in raised.value.message


def test_a_classifier_is_refused(server: Inside, first: RunDir) -> None:
    name = add(server, first, 1)
    (recipe,) = (server.settings.runs / "ftjob-1").glob("2*/recipe.yaml")
    text = "base: {model: tiny, head: sequence-classification}\ndata: {train: rows.jsonl, labels: [no, yes]}\n"
    recipe.write_text(f"name: first\n{text}", "utf-8")
    with pytest.raises(openai.APIStatusError) as raised:
        ask(server.client(), name)
    assert (raised.value.status_code, raised.value.code) == (400, "model_not_supported")


def test_nothing_is_loaded_before_it_is_asked_for(server: Inside, first: RunDir) -> None:
    add(server, first, 1)
    list(server.client().models.list())
    assert server.service.models.hosts() == []
    store: Store = server.service.store
    assert len(store.every(models.select())) == 2
