"""All routes of the dashboard."""

from __future__ import annotations

from ift_peft.serve.pages import assets, files, jobs, live, playground, session

ROUTERS = (jobs.router, live.router, files.router, playground.router, session.router, assets.router)
