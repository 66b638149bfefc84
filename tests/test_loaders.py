"""What loaders and benchmark tables hand on to the algorithm and to the reader."""

import json

from conftest import CALL, ROW, write_rows

import rest
from toy_tools import benchmarks, data


def test_both_spellings_of_gold_and_nested_hub_columns(tmp_path):
    """Calls with "parameters" are the calls with "arguments"; nested columns may be JSON strings;
    and the blocks that a row asks for reach the format reward."""
    row = {**ROW, "gold": [[{"name": "add", "parameters": {"a": 1, "b": 2}}]],
           "blocks": json.dumps([["think", "tool_call", "response"]])}
    loaded, = data.load_rows(write_rows(tmp_path / "a.jsonl", [row]))
    assert loaded["gold"] == ROW["gold"]
    assert rest.score_texts([CALL + "<response>x</response>"], loaded)[2]


def test_live_average_is_over_samples():
    """BFCL weighs a live category by its size: nine right of twelve, not one category of four."""
    results = [{"category": c, "id": f"{c}{i}", "score": int(k == 0), "data": ""}
               for k, c in enumerate(benchmarks.GROUPS["bfcl-live"][:4])
               for i in range(9 if k == 0 else 1)]
    assert benchmarks.table(results).splitlines()[-1].split()[-4] == "75.00"
