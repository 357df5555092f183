"""The command line: results on standard output, everything else on standard error, one line for a mistake."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from model.checkpoint import load_model
from model.config import ModelConfig
from model.recipe import SHAPE, TrainSettings
from server.auth import hash_of, read_keys
from server.cli import app, serving, training
from server.config import Settings

GOLDEN = Path(__file__).parents[1] / "golden" / "mot-tiny"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint made by the commands themselves: trained, then calibrated."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.txt"
    text.write_text(
        "\n\n".join(f"The {n} boats went out at {n * 7 % 11} and came home in the rain." for n in range(900))
    )
    found = invoke("train", folder / "out", "--data", text, "--preset", "tiny", "--steps", 4, "--json")
    assert found.exit_code == 0, found.output
    steps = [json.loads(line) for line in found.stdout.splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    found = invoke("calibrate", folder / "out", "--data", text, "--validation", text, "--windows", 8, "--json")
    assert found.exit_code == 0, found.output
    *measured, chosen = (json.loads(line) for line in found.stdout.splitlines())
    assert chosen["chosen"] is True
    assert [result["positions_apart"] for result in measured if "nats" in result] == [1, 4, 16, 32]
    return folder


def test_eval_prints_an_object_a_mode(trained: Path) -> None:
    arguments = ("eval", "--model", trained / "out", "--data", trained / "text.txt", "--windows", 8)
    found = invoke(*arguments, "--json")
    results = [json.loads(line) for line in found.stdout.splitlines()]
    assert [result["mode"] for result in results] == ["mixed", "private", "private_unmixed", "zeros", "alone"]
    assert {"perplexity", "bits_per_byte", "tokens", "temperature"} <= set(results[0])
    rounded = invoke(*arguments, "--mode", "mixed", "--quantize", "int8", "--json")
    near = json.loads(rounded.stdout)["perplexity"]
    assert near != results[0]["perplexity"] and abs(near / results[0]["perplexity"] - 1) < 0.005
    plain = invoke(
        "eval", "--model", trained / "out", "--data", trained / "text.txt", "--windows", 8, "--mode", "mixed"
    )
    assert plain.stdout.startswith("mode mixed  perplexity ")


def test_generate_is_the_same_with_a_seed(trained: Path) -> None:
    arguments = ("generate", "The boats", "--model", trained / "out", "--max-tokens", 8, "--seed", 3, "--private")
    first, second = invoke(*arguments), invoke(*arguments)
    assert first.exit_code == 0 and first.stdout.startswith("The boats")
    assert first.stdout == second.stdout


def test_training_goes_on_from_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    found = invoke(
        "train", tmp_path / "more", "--data", trained / "text.txt", "--preset", "tiny", "--steps", 2,
        "--start-from", trained / "out", "--final-temperature", 0.05, "--joint-copies", 2, "--group-size", 2, "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    config = load_model(tmp_path / "more").config
    assert config.temperature == pytest.approx(0.05) and config.group_size == 2


def test_a_setting_that_the_checkpoint_has_no_use_for_is_refused(tmp_path: Path) -> None:
    ModelConfig(model_type="gpt2").save(tmp_path)
    found = invoke("train", tmp_path / "run", "--data", "a", "--start-from", tmp_path, "--temperature-mode", "fixed")
    assert found.exit_code == 2 and "temperature_mode: a gpt2 model" in found.stderr


@pytest.mark.parametrize("kind", ["dense", "mot", "switch", "top-k", "expert-choice"])
def test_every_kind_is_trained_evaluated_and_generates(kind: str, trained: Path, tmp_path: Path) -> None:
    text, out = trained / "text.txt", tmp_path / "out"
    found = invoke("train", out, "--data", text, "--preset", "tiny", "--steps", 2, "--feed-forward", kind, "--json")
    assert found.exit_code == 0, found.output
    found = invoke("eval", "--model", out, "--data", text, "--windows", 8, "--json")
    assert found.exit_code == 0, found.output
    modes = [json.loads(line)["mode"] for line in found.stdout.splitlines()]
    mixes = kind in ("mot", "expert-choice")
    assert modes == (["mixed", "private", "private_unmixed", "zeros", "alone"] if mixes else ["mixed"])
    found = invoke("calibrate", out, "--data", text, "--validation", text, "--windows", 4, "--json")
    assert found.exit_code == (0 if mixes else 2)
    assert mixes or "crowd" in found.stderr
    found = invoke("generate", "The boats", "--model", out, "--max-tokens", 4, "--seed", 3, "--private")
    assert found.exit_code == 0 and found.stdout.startswith("The boats")
    found = invoke("eval", "--model", out, "--data", text, "--windows", 4, "--mode", "alone")
    assert found.exit_code == (0 if mixes else 2)


def test_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    found = invoke("key", file, "alice", "--tenant", "acme", "--private", "force", "--max-concurrent", 4)
    secret = found.stdout.strip()
    (entry,) = read_keys(file)
    assert entry.sha256 == hash_of(secret.encode()) and secret not in file.read_text()
    assert (entry.name, entry.tenant, entry.private, entry.max_concurrent) == ("alice", "acme", "force", 4)
    assert invoke("key", file, "alice").exit_code == 2
    assert invoke("key", file, "bob", "--private", "sometimes").exit_code == 2
    assert len(read_keys(file)) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("serve", "--port", 70000), "port"),
        (("serve", "--model", "/nowhere"), "/nowhere"),
        (("serve", "--private", "maybe"), "private"),
        (("serve", "--kv-cache-memory", "10"), "kv_cache_memory"),
        (("serve", "--api-keys", "/nowhere/keys"), "api_keys"),
        (("generate", "x", "--private-temperature", 0.1), "private_temperature"),
        (("generate", "x", "--model", GOLDEN), "tokenizer"),
        (("generate", "x", "--private", "--private-temperature", 2), "private_temperature"),
        (("train", "/dev/null/run", "--data", "/nowhere.txt"), "/dev/null/run"),
        (("train", "/dev/null/run", "--data", "/nowhere.txt", "--preset", "huge"), "preset"),
        (("train", "/dev/null/run", "--data", "/nowhere.txt", "--feed-forward", "sparse"), "feed_forward"),
        (("train", "/dev/null/run", "--data", "a", "--feed-forward", "mot", "--start-from", "b"), "feed_forward"),
        (("train", "/dev/null/run", "--data", "a", "--feed-forward", "top-k", "--final-temperature", 0.5),
         "final_temperature"),
        (("train", "/dev/null/run", "--data", "a", "--final-temperature", "0.5,warm"), "final_temperature"),
        (("train", "/dev/null/run", "--data", "a", "--shard-size", "2 apples"), "2 apples"),
        (("train", "/dev/null/run", "--data", "a", "--device", "tpu"), "device"),
        (("train", "/dev/null/run", "--data", "a", "--eval-every", 5), "eval_every"),
        (("train", "/dev/null/run", "--data", "a", "--learn-from", 0.5), "learn_from"),
        (("eval", "--data", "/nowhere.txt"), "nowhere"),
        (("eval", "--data", "/nowhere.txt", "--mode", "sideways"), "sideways"),
        (("calibrate", "/nowhere", "--data", "a", "--validation", "b"), "nowhere"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_line(arguments: tuple[object, ...], named: str) -> None:
    found = invoke(*arguments)
    assert found.exit_code == 2
    lines = [line for line in found.stderr.splitlines() if line.startswith("motserve: ")]
    assert len(lines) == 1 and named in lines[0], found.output
    assert "Traceback" not in found.output


def test_every_setting_is_a_flag() -> None:
    flags = set(inspect.signature(serving.serve).parameters) - {"config"}
    assert flags == set(Settings.model_fields)


def test_every_setting_of_training_is_a_flag() -> None:
    flags = set(inspect.signature(training.train).parameters)
    others = {"out", "data", "preset", "feed_forward", "start_from", "validation", "device", "as_json", "shard_size"}
    assert flags - others == {field.name for field in dataclasses.fields(TrainSettings)} - {"shard_bytes"} | {*SHAPE}


def test_sizes_of_a_trained_model(trained: Path, tmp_path: Path) -> None:
    found = invoke(
        "train", tmp_path / "run", "--data", trained / "text.txt", "--preset", "tiny", "--steps", 1, "--n-layer", 1,
        "--n-embd", 32, "--n-head", 4, "--n-expert", 4, "--expert-size", 16, "--vocab-size", 300, "--temperature", 0.5,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    config = load_model(tmp_path / "run").config
    assert (config.n_layer, config.n_embd, config.n_head, config.n_expert, config.expert_size) == (1, 32, 4, 4, 16)
    assert config.vocab_size == 300


def test_flags_of_training(trained: Path, tmp_path: Path) -> None:
    text = trained / "text.txt"
    found = invoke(
        "train", tmp_path / "run", "--data", text, "--preset", "tiny", "--steps", 4, "--final-temperature", "0.2,0.05",
        "--accumulate", 2, "--shard-size", "50kB", "--export-dtype", "float32", "--device", "cpu",
        "--validation", text, "--eval-every", 3, "--eval-windows", 4, "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    steps = [json.loads(line) for line in found.stdout.splitlines()]
    assert [step["validation_bits_per_byte"] is not None for step in steps] == [False, False, True, True]
    assert steps[-1]["temperature_min"] < steps[-1]["temperature"] < steps[-1]["temperature_max"]
    assert (tmp_path / "run" / "model.safetensors.index.json").exists()
    assert load_model(tmp_path / "run").config.temperature == pytest.approx(0.1)  # the geometric mean


@pytest.mark.parametrize(
    ("environment", "looks"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_soon_sleep_unless_told_otherwise(environment: dict[str, str], looks: str | None) -> None:
    code = "import os, sys\nfrom server.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
    code += "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules, file=sys.stderr)"
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    told = subprocess.run(
        [sys.executable, "-c", code, "--help"], env=kept | environment, capture_output=True, text=True, check=True
    )
    assert told.stderr.split() == [str(looks), "False"]
