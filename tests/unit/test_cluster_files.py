"""The files for clusters are what Ray takes."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import jsonschema
import ray.autoscaler
import yaml
from ray.serve.schema import ServeDeploySchema

from deployments.config import read_arguments

ROOT = Path(__file__).parents[2]


def test_cluster_yaml():
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    assert f"rayllm[flash]=={version('rayllm')}" in " ".join(config["setup_commands"])


def test_serve_yaml():
    config = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "deployments" / "serve.yaml").read_text()))
    assert config.http_options.host == "127.0.0.1"
    for application in config.applications:
        assert application.import_path == "deployments.openai_api:build_app"
        read_arguments(application.args)
