"""The tables of the store. Times are Unix seconds; JSON columns hold what the API answers with."""

from __future__ import annotations

from sqlalchemy import JSON, Boolean, Column, Float, Index, Integer, MetaData, String, Table, Text

metadata = MetaData()


def _numbered() -> Column[int]:
    """In the order of creation, which lists and cursors follow; ids say nothing."""
    return Column("number", Integer, primary_key=True, autoincrement=True)


files = Table(
    "files",
    metadata,
    _numbered(),
    Column("id", String(64), nullable=False, unique=True),
    Column("created_at", Integer, nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("rows", Integer),
    Column("sha256", String(64), nullable=False),
    Column("expires_at", Integer),
)

jobs = Table(
    "jobs",
    metadata,
    _numbered(),
    Column("id", String(64), nullable=False, unique=True),
    Column("created_at", Integer, nullable=False),
    Column("status", String(32), nullable=False, index=True),
    Column("checked_at", Integer),  # when its rows and its need of memory were found to be right
    Column("attempt", Integer, nullable=False, default=0),  # how often it was put into the queue
    Column("priority", Integer, nullable=False, default=0),  # the smaller, the sooner
    Column("model", String(256), nullable=False),  # as asked for: a base, or a tuned model to go on from
    Column("base", String(256), nullable=False),
    Column("recipe", JSON, nullable=False),  # what the trainer is given, as written
    Column("hyperparameters", JSON, nullable=False),
    Column("resolved", JSON, nullable=False),  # with numbers for "auto", shown once files are validated
    Column("suffix", String(64)),
    Column("seed", Integer, nullable=False),
    Column("metadata", JSON),
    Column("training_file", String(64), nullable=False),
    Column("validation_file", String(64)),
    Column("started_at", Integer),
    Column("finished_at", Integer),
    Column("estimated_finish", Integer),
    Column("trained_tokens", Integer),
    Column("fine_tuned_model", String(256)),
    Column("result_files", JSON, nullable=False),
    Column("error", JSON),
    Column("run", Text),  # folder of the run, below the data folder
    Column("request", String(64), index=True),  # hash of who asked for what, to know a repeated request
    Column("body", String(64)),  # hash of what was asked for, where a key of the caller's own tells repeated requests
)

metadata_pairs = Table(  # of `jobs.metadata`, to be asked for; paths into JSON do not reach every key
    "metadata_pairs",
    metadata,
    Column("job", String(64), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", String(512), nullable=False),
)

events = Table(
    "events",
    metadata,
    _numbered(),
    Column("id", String(64), nullable=False, unique=True),
    Column("job", String(64), nullable=False, index=True),
    Column("created_at", Integer, nullable=False),
    Column("level", String(8), nullable=False),
    Column("type", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON),
)

models = Table(  # tuned models and their checkpoints; bases come from the settings
    "models",
    metadata,
    _numbered(),
    Column("id", String(64), nullable=False, unique=True),
    Column("name", String(256), nullable=False, unique=True),
    Column("created_at", Integer, nullable=False),
    Column("job", String(64), nullable=False, index=True),
    Column("base", String(256), nullable=False),
    Column("step", Integer),  # of a checkpoint; of the whole model none
    Column("metrics", JSON),
    Column("run", Text, nullable=False),  # below the data folder
    Column("adapter", Text, nullable=False),  # folder of the adapter's files, below the data folder
)

keys = Table(
    "keys",
    metadata,
    _numbered(),
    Column("id", String(64), nullable=False, unique=True),
    Column("name", String(128), nullable=False),
    Column("hash", String(64), nullable=False),  # sha256 of a secret of 256 random bits
    Column("scopes", JSON, nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("expires_at", Integer),
    Column("revoked_at", Integer),
    Column("used_at", Float),
    Column("session", Boolean, nullable=False, default=False),  # of a browser, made from a key
    Column("made_from", String(64), index=True),  # of a session: the key, which it does not outlive
)

service = Table(  # one row: whose folder of files it is, which has the same id in `.store`
    "service",
    metadata,
    Column("store_id", String(32), primary_key=True),
)

Index("jobs_of_pair", metadata_pairs.c.key, metadata_pairs.c.value)
Index("events_of_job", events.c.job, events.c.number)
