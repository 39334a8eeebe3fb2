"""`python -m ift_peft` is `ift`."""

from ift_peft.cli import app

app()
