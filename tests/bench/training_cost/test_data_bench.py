from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.training_cost.data import _make, _targets, run_data
from engine.data import open_source, read_forget_request


def test_the_synthetic_set_is_a_data_source_with_its_forget_list(tmp_path: Path) -> None:
    facts = _make(tmp_path, 1_030, [])
    train = open_source(f"webdataset:{tmp_path}").train
    assert (facts["images"], facts["shards"], len(train)) == (1_030, 2, 1_030)
    assert train.ids[1_001] == "n00000001_1001"
    assert train.labels[1_001] == 1
    assert train.image(1_029).size == (256, 256)
    assert len(read_forget_request(str(tmp_path / "forget.txt"), train).indices) == facts["forget"] == 103


def test_targets_are_met_or_missed_by_their_limits() -> None:
    def steps(seconds: float, peak: int) -> dict[str, dict[str, float]]:
        step = {"seconds": seconds, "peak_bytes": peak, "extra_bytes": peak - 100}
        return {"open": step, "match_and_split": step, "first_batch": step}

    assert [t["passed"] for t in _targets(steps(3, 2**30))] == [True, True, True]
    assert [t["passed"] for t in _targets(steps(4, 2**31))] == [True, False, False]
    assert [t["passed"] for t in _targets(steps(6, 2**31))] == [False, False, False]


@pytest.mark.slow
@pytest.mark.minutes
def test_the_bench_runs_at_toy_size(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    for name in ("a/0.jpg", "b/1.JPEG"):
        (tmp_path / "real" / name).parent.mkdir(parents=True)
        Image.fromarray(noise).save(tmp_path / "real" / name, "JPEG")
    run_data(600, tmp_path / "real", tmp_path, rounds=2, json_file=tmp_path / "data.json")
    report = json.loads((tmp_path / "data.json").read_text())
    assert report["settings"]["real_images"] == 2
    assert [len(case["rows"]) for case in report["decoding"]] == [4, 3, 2]
    assert all(len(row["seconds"]) == 2 for case in report["decoding"] for row in case["rows"])
    assert report["synthetic"]["open_and_match"]["first_batch"]["batch"] == [256, 3, 224, 224]
    assert str(tmp_path) not in json.dumps(report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "real"]
