from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import RunConfig, build, parse_assignments, read_yaml, split_options, to_dict, write_yaml
from engine.errors import UserError
from engine.methods.lethe import LetheConfig


def test_assignments_become_nested_typed_values() -> None:
    assert parse_assignments(["seed=3", "lr=1e-4", "kernels.backend=eager", "max_steps=null"]) == {
        "seed": 3,
        "lr": "1e-4",
        "kernels": {"backend": "eager"},
        "max_steps": None,
    }


def test_options_go_to_run_and_method_with_their_types() -> None:
    run, method = split_options(parse_assignments(["seed=3", "lr=1e-4", "kernels.backend=eager"]), LetheConfig)
    assert (run.seed, run.kernels.backend, method.lr, method.forget_epochs) == (3, "eager", 1e-4, 2.0)


def test_yaml_round_trip(tmp_path) -> None:
    config = build(RunConfig, {"seed": 5, "kernels": {"backend": "eager"}, "max_steps": 7})
    write_yaml(tmp_path / "c.yaml", to_dict(config))
    assert build(RunConfig, read_yaml(tmp_path / "c.yaml")) == config


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["forget_epoch=1"], "unknown option 'forget_epoch'; did you mean 'forget_epochs'"),
        (["kernels.bakend=eager"], "unknown option 'kernels.bakend'; did you mean 'backend'"),
        (["precision=fp23"], "option precision='fp23'; did you mean 'fp32'"),
        (["batch_size=0"], "option batch_size=0: expected at least 1"),
        (["batch_size=many"], "option batch_size='many': expected int"),
        (["batch_size=true"], "option batch_size=True: expected int"),
        (["lr=fast"], "option lr='fast': expected a number"),
        (["lr=-1"], "option lr=-1.0: expected above 0, or null"),
        (["mask_share=1.5"], "option mask_share=1.5: expected between 0 and 1"),
        (["kernels=eager"], "option kernels='eager': expected a group"),
        (["forget_epochs=0", "retain_epochs=0"], "at least one stage"),
    ],
)
def test_wrong_options_name_key_value_and_remedy(assignments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        split_options(parse_assignments(assignments), LetheConfig)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["seed", "=1", ""])
def test_an_assignment_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected key=value"):
        parse_assignments([text])


def test_yaml_errors(tmp_path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(UserError, match="expected a mapping"):
        read_yaml(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [\n")
    with pytest.raises(UserError, match="is not YAML"):
        read_yaml(tmp_path / "bad.yaml")


def test_the_shipped_configuration_of_vit_l_is_one() -> None:
    path = Path(__file__).parents[2] / "configs" / "vit_l_imagenet.yaml"
    run, method = split_options(read_yaml(path), LetheConfig)
    assert (run.batch_size, run.precision, run.on_bad_image) == (64, "bf16", "skip")
    assert method == LetheConfig()
