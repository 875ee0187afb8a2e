"""Weights and marks as a user meets them: a column, a key, a line that says what was done, and shades in a preview."""

import json

import pytest
from helpers.tiny import write_jsonl

from bcft import preview, sft
from bcft.errors import DataError
from bcft.runs.storage import read_json

ROWS = [
    {"prompt": f"Work out {a} + {b}.", "completion": f"{a}+{b}={a + b}: {a + b}\n#### {a + b}", "weight": weight}
    for a, b, weight in [(1, 2, 1), (3, 4, 3), (5, 6, 0), (7, 8, 2), (2, 2, 2)]
]
KEYS = {
    "model_name_or_path": "bcft:tiny-init", "learning_rate": 1e-3, "max_steps": 1, "eval_dev_problems": 0,
    "eval_test_problems": 0, "max_completion_length": 8,
}  # fmt: skip
SCALED = "rows weigh 1 to 3 in the loss, divided by their mean 2"


def test_a_run_leaves_out_rows_of_weight_0_scales_the_rest_and_says_so(tmp_path, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    sft.run(None, dataset_name=path, output_dir=str(tmp_path / "run"), dry_run=True, **KEYS)
    assert "4 of 5 rows (dropped: 1 of weight 0)" in (planned := capsys.readouterr().out)
    assert SCALED in planned
    sft.run(None, dataset_name=path, output_dir=str(tmp_path / "run"), **KEYS)
    said = capsys.readouterr().out
    assert "4 of 5 rows (dropped: 1 of weight 0)" in said
    assert said.count(SCALED) == 1
    assert read_json(tmp_path / "run" / "metrics.json")["train"]["rows"] == 4


def test_a_preview_has_the_weight_of_each_row_and_shades_by_it(tmp_path, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    arguments = ["model_name_or_path=bcft:tiny-init", f"dataset_name={path}", "preview_rows=4"]
    arguments += ["eval_dev_problems=0", "eval_test_problems=0"]
    assert preview.main([*arguments, "--json"]) == 0
    assert [row["weight"] for row in json.loads(capsys.readouterr().out)] == [0.5, 1.5, 1.0, 1.0]
    assert preview.main([*arguments, "--html"]) == 0
    page = capsys.readouterr().out
    assert page.count('<pre style="--shade:') == 3
    for weight, shade in (("0.5", "0.33"), ("1.5", "")):
        style = f' style="--shade:{shade}"' if shade else ""
        assert f", weight {weight}</h2><pre{style}>" in page
    assert f"{SCALED}." in page
    assert preview.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "with loss, weight 0.5" in shown
    assert "the paler the less its row weighs" in shown
    assert preview.main([*arguments, "loss_reduction=sum", "--json"]) == 0
    assert [row["weight"] for row in json.loads(capsys.readouterr().out)] == [1.0, 3.0, 2.0, 2.0]


def test_without_weights_a_preview_says_nothing_of_them(capsys):
    rows = [{key: value for key, value in row.items() if key != "weight"} for row in ROWS]
    shown = preview.run({"model_name_or_path": "bcft:tiny-init"}, train_dataset=rows, eval_test_problems=0)
    assert {row["weight"] for row in shown} == {1.0}
    assert "weigh" not in preview.page(shown, "counts")
    assert not capsys.readouterr().out


def test_a_weight_that_no_loss_can_have_is_refused_with_file_and_line(tmp_path):
    for weight in (-1, "nan", "heavy"):
        path = write_jsonl(tmp_path / "rows.jsonl", [*ROWS, ROWS[0] | {"weight": weight}])
        with pytest.raises(DataError, match=rf"rows\.jsonl:6: weight {weight!r}: "):
            sft.run(None, dataset_name=path, output_dir=str(tmp_path / "run"), **KEYS)


def test_a_preview_shows_that_a_marked_turn_alone_is_trained():
    said = [("user", "1 + 2."), ("assistant", "3"), ("user", "And 4?"), ("assistant", "7")]
    talk = [{"role": role, "content": text} for role, text in said]
    talk[1]["train"] = True
    keys = {"model_name_or_path": "bcft:tiny-init", "train_on": "marked", "eval_test_problems": 0}
    (row,) = preview.run(keys, train_dataset=[{"messages": talk}])
    (whole,) = preview.run(keys | {"train_on": "all_turns"}, train_dataset=[{"messages": talk}])
    texts = ["".join(t["text"] for t in shown["tokens"] if t["label"] != -100) for shown in (row, whole)]
    stop = texts[1].split("7")[1]
    assert texts == [f"3{stop}", f"3{stop}7{stop}"]
