"""Protects scripts/accelerate_configs: Accelerate reads each file, and the launcher takes from it what it says."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from repository import SCRIPTS
from tiny_models import tiny_config

from fa_transformers.models import ENCODERS

FOLDER = SCRIPTS / "accelerate_configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
NUM_PROCESSES = {
    "one_cpu": 1,
    "several_cpus": 2,
    "one_gpu": 1,
    "ddp_8_gpus": 8,
    "fsdp2_2_nodes": 16,
    "deepspeed_zero2": 8,
    "deepspeed_zero3": 8,
}


def launch(path: Path):
    """The launcher's arguments after it has read the file."""
    args = launch_command_parser().parse_args(["--config_file", str(path), "scripts/finetune.py"])
    return _validate_launch_command(args)[0]


def test_there_is_a_file_for_each_kind_of_machine():
    assert {path.stem for path in CONFIGS} == set(NUM_PROCESSES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_each_file_and_its_first_line_explains_it(path):
    assert path.read_text().startswith("# ")
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig) and config.num_processes == NUM_PROCESSES[path.stem]
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for section, values in yaml.safe_load(path.read_text()).items():
        for key in values if isinstance(values, dict) else ():
            assert key in known, f"accelerate launch knows no {key} of {section}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_launcher_takes_the_kind_of_run_from_the_file(path):
    args = launch(path)
    assert args.num_processes == NUM_PROCESSES[path.stem]
    assert args.use_cpu == path.stem.endswith(("cpu", "cpus"))
    assert args.multi_gpu == path.stem.startswith("ddp")
    assert args.use_fsdp == path.stem.startswith("fsdp2")
    assert args.use_deepspeed == path.stem.startswith("deepspeed")


def test_fsdp2_shards_the_layers_that_each_model_names(monkeypatch):
    environment = prepare_multi_gpu_env(launch(FOLDER / "fsdp2_2_nodes.yaml"))
    assert environment["FSDP_VERSION"] == "2"
    for name, value in environment.items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    for config_class, heads in ENCODERS.items():
        model = heads["AutoModel"](tiny_config(config_class))
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
        plugin.set_auto_wrap_policy(model)  # an error where the model has no module of a name
        wrapped = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
        assert {type(layer) for layer in model.encoder.layer} <= wrapped


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gets_its_stage_and_a_batch_size_that_our_loaders_do_not_have(stage):
    path = FOLDER / f"deepspeed_zero{stage}.yaml"
    settings = load_config_from_file(str(path)).deepspeed_config
    config = json.loads((FOLDER.parents[1] / settings["deepspeed_config_file"]).read_text())
    assert config["zero_optimization"]["stage"] == stage
    assert config["train_micro_batch_size_per_gpu"] == 1 and config["gradient_accumulation_steps"] == "auto"
