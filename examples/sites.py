"""Trace a list of module paths from a plan file, and read the rows back as a table.

The plan is JSON, so any language can write it, and the rows are Parquet, so any can read them.
Run it: python examples/sites.py [FOLDER]
"""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "sites-out")
OUT.mkdir(parents=True, exist_ok=True)

# 1. A plan: module paths as `pipe.unet.named_modules()` writes them, or the paper's aliases.
PLAN = {
    "model": "embedded",
    "probes": [
        {"prompt": "a dog in ink style on a green ground", "subject": "a dog"},
        {"prompt": "a house in flat style on a white ground", "subject": "a house"},
    ],
    "sites": [
        "mid_block.resnets.0",
        "mid_block.attentions.0.transformer_blocks.0.attn1",
        "mid_block.attentions.0.transformer_blocks.0.attn2",
        "mid_block.attentions.0.transformer_blocks.0.ff",
        "cross-attn-0-down",
    ],
    "sources": [{"kind": "zero"}, {"kind": "mean"}],
    "base": "clean",
    "metrics": ["clip_score"],
}
(OUT / "plan.json").write_text(json.dumps(PLAN, indent=1), encoding="utf-8")

# 2. Run it, as a tool in another language would. Stopped, it goes on where it was.
fasttrace = Path(sys.executable).with_name("fasttrace")
command = [fasttrace, "run", OUT / "plan.json", "--out", OUT / "rows", "--json", "--quiet"]
done = subprocess.run(command, check=True, capture_output=True, text=True)
outcome = json.loads(done.stdout)
print(f"{outcome['rows']} rows of plan {outcome['plan'][:12]}")

# 3. Read it. With pandas: pandas.read_parquet(path).groupby(["site", "selector"])["effect"].mean();
#    with polars: polars.read_parquet(path).group_by("site", "selector").agg(pl.mean("effect")).
table = pq.read_table(outcome["results"], use_threads=False)
lost = table.group_by(["site", "selector"], use_threads=False).aggregate([("effect", "mean")])
for row in sorted(lost.to_pylist(), key=lambda row: -row["effect_mean"]):
    print(f"{row['effect_mean']:7.3f}  {row['selector']:5} {row['site']}")
