"""Rows per second and peak memory of streaming, checking and tokenising a set: 10^3 to 10^6 rows.

    python -m benchmarks.data_scaling [--rows 1000,10000,100000,1000000]

Each size runs in a process of its own, so that its peak is its own. The rows are the built-in reviews over and over,
each with a number of its own; the cache is empty at first and full the second time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.record import write_result

MIB = 1024  # ru_maxrss is in KiB


def measure(train: Path) -> dict[str, Any]:
    """One size, in this process."""
    from transformers import AutoTokenizer

    from ift_peft.data.render import Renderer
    from ift_peft.data.rows import stream_rows
    from ift_peft.data.store import content_key, render_set
    from ift_peft.model.tokenizer import TINY
    from ift_peft.recipe import load_recipe

    data = load_recipe("sentiment", [f"data.train={train}", "data.streaming=true"]).data
    renderer = Renderer(AutoTokenizer.from_pretrained(TINY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB
    result: dict[str, Any] = {}
    for name in ("first", "again"):
        started = time.perf_counter()
        done = render_set(
            lambda: stream_rows(data),
            renderer,
            key=content_key(data, renderer, max_length=512, variants=1),
            variants=1,
            max_length=512,
            overlong="truncate",
        )
        assert done.reused == (name == "again")
        result[f"{name}_seconds"] = round(time.perf_counter() - started, 3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB
    return {
        "rows": done.rows,
        **result,
        "rows_per_second": round(done.rows / result["first_seconds"]),
        "rss_before_mib": round(before),
        "rss_peak_mib": round(peak),
    }


def in_child(rows: int, folder: Path) -> dict[str, Any]:
    from ift_peft.recipe import recipes_root

    lines = (recipes_root() / "data" / "reviews" / "train.jsonl").read_text("utf-8").splitlines()
    train = folder / f"{rows}.jsonl"
    with train.open("w", encoding="utf-8") as file:
        for number, line in enumerate(islice(cycle(lines), rows)):
            row = json.loads(line)
            file.write(
                json.dumps({"text": f"{row['text']} {number}", "label": row["label"]}, ensure_ascii=False) + "\n"
            )
    environment = {**os.environ, "IFT_PEFT_CACHE": str(folder / f"cache-{rows}")}
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.data_scaling", "--child", str(train)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1000,10000,100000,1000000")
    parser.add_argument("--child", type=Path)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(measure(options.child)))
        return
    results = []
    print(f"{'rows':>9}  {'rows/s':>7}  {'seconds':>8}  {'again':>7}  {'RSS before':>10}  {'RSS peak':>8}  (MiB)")
    with tempfile.TemporaryDirectory() as folder:
        for rows in map(int, options.rows.split(",")):
            one = in_child(rows, Path(folder))
            results.append(one)
            print(
                f"{rows:>9,}  {one['rows_per_second']:>7,}  {one['first_seconds']:>8.1f}  {one['again_seconds']:>7.2f}"
                f"  {one['rss_before_mib']:>10,}  {one['rss_peak_mib']:>8,}",
                flush=True,
            )
    write_result("data_scaling", {"sizes": results})


if __name__ == "__main__":
    main()
