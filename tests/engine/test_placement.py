"""Connecting to Ray and reserving resources, on real clusters that live on this machine."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
from engine_testing import eventually
from ray.util.placement_group import PlacementGroup, placement_group_table

from rayllm.engine import placement, ray_private
from rayllm.errors import UsageError

COMMANDS = "initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"


def states() -> set[str]:
    return {group["state"] for group in placement_group_table().values()}


def refusal(*args, **kwargs) -> tuple[str, float]:
    """The one line with which `reserve` refuses, and how many seconds it took."""
    start = time.monotonic()
    with pytest.raises(UsageError) as raised:
        placement.reserve(*args, **kwargs)
    assert "\n" not in str(raised.value)
    assert states() <= {"CREATED", "REMOVED"}, "a refused placement group is still pending"
    return str(raised.value), time.monotonic() - start


# Before there is a Ray


@pytest.fixture
def no_ray(monkeypatch):
    assert not ray.is_initialized()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    assert not ray.is_initialized()


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "auto", None])
def test_ray_client_is_refused(no_ray, monkeypatch, address):
    if address in ("auto", None):
        monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    with pytest.raises(UsageError, match="ray://"):
        placement.connect(address, min_cpus=1)


@pytest.mark.parametrize("accepts", [False, True], ids=["closed", "silent"])
def test_address_without_a_cluster(no_ray, monkeypatch, accepts):
    monkeypatch.setattr(placement, "CONNECT_TIMEOUT_S", 1)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        if not accepts:
            server.close()
        start = time.monotonic()
        with pytest.raises(UsageError, match=f"no Ray cluster answers at .*:{port}"):
            placement.connect(f"127.0.0.1:{port}", min_cpus=1)
        assert time.monotonic() - start < 5


def test_address_without_a_port(no_ray):
    with pytest.raises(UsageError, match="host:port"):
        placement.connect("127.0.0.1", min_cpus=1)


def test_room_before_there_is_a_ray(no_ray):
    """What a Ray that starts here would have."""
    cpus, gpus = os.cpu_count(), ray_private.count_gpus_here()
    assert placement.choose_device("auto") == ("cuda" if gpus else "cpu")
    assert placement.feasible_strategy([{"CPU": 1}] * cpus, 1) == "STRICT_PACK"
    with pytest.raises(
        UsageError, match=rf"needs {gpus + 1} GPU \+ 1 CPU, but the cluster has {gpus} GPU \+ {cpus} CPU"
    ):
        placement.feasible_strategy(placement.bundles_of(gpus + 1, "cuda"), 1)
    with pytest.raises(
        UsageError, match=rf"^the models need {cpus + 1} CPU, but the cluster has {cpus} CPU and nothing"
    ):
        placement.check_room([{"CPU": 1}] * (cpus + 1))


# A Ray started here


class TestLocal:
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def cpus(cls):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("RAY_ADDRESS", raising=False)
            cpus = (os.cpu_count() or 1) + 1
            assert placement.connect(None, min_cpus=cpus)
        yield cpus
        ray.shutdown()

    def test_connected_process_stays_as_it_is(self, cpus):
        assert ray.cluster_resources()["CPU"] == cpus
        assert not placement.connect(None, min_cpus=cpus + 1)
        assert not placement.connect("127.0.0.1:1", min_cpus=1)
        with pytest.raises(UsageError, match="ray://"):
            placement.connect("ray://127.0.0.1:1", min_cpus=1)
        assert ray.cluster_resources()["CPU"] == cpus

    def test_cluster_that_asks_for_a_token(self, monkeypatch):
        if os.environ.get("RAY_AUTH_MODE") != "token":
            pytest.skip("this Ray starts without tokens")
        monkeypatch.delenv("RAY_AUTH_MODE")
        with pytest.raises(UsageError, match="RAY_AUTH_MODE=token"):
            placement._check_reachable(ray.get_runtime_context().gcs_address)

    def test_device(self):
        gpus = ray.cluster_resources().get("GPU", 0)
        assert placement.choose_device("auto") == ("cuda" if gpus else "cpu")
        assert placement.choose_device("cuda") == "cuda"
        assert placement.choose_device("cpu") == "cpu"

    def test_more_than_there_is(self, cpus):
        message, seconds = refusal(cpus + 2, "cpu", placement_timeout_s=100)
        assert f"needs {cpus + 2} CPU" in message
        assert f"has {cpus} CPU" in message
        assert seconds < 20
        gpus = int(ray.cluster_resources().get("GPU", 0))
        message, seconds = refusal(gpus + 1, "cuda", placement_timeout_s=100)
        assert f"needs {gpus + 1} GPU + 1 CPU" in message
        assert f"has {gpus} GPU + {cpus} CPU" in message
        assert seconds < 20

    def test_more_engines_than_there_is_room_for(self, cpus):
        with pytest.raises(UsageError) as refused:
            placement.reserve_all(cpus, 2, "cpu", placement_timeout_s=100)
        message = str(refused.value)
        assert (
            f"{cpus} engines of tensor_parallel_size=2 need {2 * cpus} CPU, but the cluster has {cpus} CPU" in message
        )
        assert "lower num_engines, tensor_parallel_size or add nodes" in message

    def test_several_engines(self, cpus):
        groups = placement.reserve_all(cpus, 1, "cpu", placement_timeout_s=30)
        assert [group.bundle_specs for group in groups] == [[{"CPU": 1}]] * cpus
        with pytest.raises(UsageError, match=rf"{cpus} engines of .* need {cpus} CPU, but after 1 s only 0 CPU"):
            placement.reserve_all(cpus, 1, "cpu", placement_timeout_s=1, progress=False)
        for group in groups:
            placement.release(group)
        assert states() == {"REMOVED"}

    def test_bundles(self, cpus):
        group = placement.reserve(cpus, "cpu", placement_timeout_s=30)
        assert group.bundle_specs == [{"CPU": 1}] * cpus
        assert placement_group_table(group)["strategy"] == "STRICT_PACK"
        placement.release(group)

    def test_taken_resources(self, cpus, capsys):
        """Neither an endless wait nor a refusal of what comes free in time."""
        group = placement.reserve(cpus - 1, "cpu", placement_timeout_s=30)
        message, seconds = refusal(2, "cpu", placement_timeout_s=2)
        assert f"needs 2 CPU, but after 2 s only 1 CPU of the cluster's {cpus} CPU are free" in message
        assert 2 <= seconds < 10
        assert re.search(rf"waiting for 2 CPU.* of {cpus} CPU free", capsys.readouterr().err)
        refusal(2, "cpu", placement_timeout_s=1.5, progress=False)
        assert capsys.readouterr().err == ""

        release = threading.Timer(1, placement.release, [group])
        release.start()
        placement.release(placement.reserve(2, "cpu", placement_timeout_s=30))
        release.join()


# A cluster that grows


class TestAutoscaling:
    """A head with 1 CPU; one node with 2 CPUs and one with 2 GPUs (which Ray takes our word for) can be added."""

    @pytest.fixture(scope="class")
    @classmethod
    def address(cls, tmp_path_factory):
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
        address = f"{ray.util.get_node_ip_address()}:{port}"
        config = tmp_path_factory.mktemp("autoscaler") / "config.json"
        config.write_text(json.dumps(cls.configuration(address)))
        environment = os.environ | {
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_AUTH_MODE": "disabled",
        }
        ray_command = Path(sys.executable).with_name("ray")
        options = f"--port={port} --num-cpus=1 --num-gpus=0 --include-dashboard=false"
        log_path = config.with_name("head.log")
        with log_path.open("w") as log:
            head = subprocess.Popen(
                [ray_command, "start", "--head", "--block", f"--autoscaling-config={config}", *options.split()],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            while "Ray runtime started" not in log_path.read_text():
                assert head.poll() is None, log_path.read_text()
                time.sleep(0.2)
            yield address
        finally:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()

    @staticmethod
    def configuration(address: str) -> dict:
        def node_type(cpus: int, gpus: int, most: int) -> dict:
            return {"resources": {"CPU": cpus, "GPU": gpus}, "node_config": {}, "max_workers": most}

        return {
            "cluster_name": "test",
            "max_workers": 2,
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "gcs_address": address,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "available_node_types": {
                "ray.head.default": node_type(1, 0, 0),
                "cpu": node_type(2, 0, 1),
                "gpu": node_type(1, 2, 1),
            },
            "head_node_type": "ray.head.default",
            "idle_timeout_minutes": 5,
            "upscaling_speed": 1.0,
            **{key: {} for key in ("auth", "docker", "file_mounts")},
            **{f"{name}_commands": [] for name in COMMANDS},
            "cluster_synced_files": [],
        }

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def connected(cls, address):
        assert not placement.connect(address, min_cpus=1)
        yield
        ray.shutdown()

    def nodes_of(self, group: PlacementGroup) -> int:
        return len(set(placement_group_table(group)["bundles_to_node_id"].values()))

    def test_ray_private_read_autoscaler_file(self):
        assert json.loads(ray_private.read_autoscaler_file(timeout_s=30))["cluster_name"] == "test"

    def test_ray_private_has_autoscaler_elsewhere(self):
        """It cannot tell where, but this one reports as one elsewhere would."""
        eventually(ray_private.has_autoscaler_elsewhere, seconds=30, what="the autoscaler's first report")

    def test_gpus_to_come(self):
        assert ray.cluster_resources().get("GPU", 0) == 0
        assert placement.choose_device("auto") == "cuda"

    def test_more_than_it_can_grow_to(self):
        message, seconds = refusal(3, "cuda", placement_timeout_s=100)
        assert "needs 3 GPU + 1 CPU, but the cluster has 0 GPU + 1 CPU and can grow to 2 GPU + " in message
        assert seconds < 20

    def test_grows(self, capsys):
        group = placement.reserve(2, "cpu", placement_timeout_s=90)
        assert placement_group_table(group)["strategy"] == "STRICT_PACK"
        assert self.nodes_of(group) == 1
        assert "waiting for 2 CPU" in capsys.readouterr().err
        placement.release(group)

    def test_shards_span_nodes_where_no_node_holds_them(self, caplog):
        with caplog.at_level("INFO", logger="rayllm"):
            group = placement.reserve(3, "cpu", placement_timeout_s=90)
        assert placement_group_table(group)["strategy"] == "PACK"
        assert self.nodes_of(group) == 2
        assert [record.message for record in caplog.records if "PACK" in record.message]
        placement.release(group)

    def test_nodes_that_come_too_late(self):
        message, seconds = refusal(2, "cuda", placement_timeout_s=1)
        assert "needs 2 GPU + 1 CPU, but after 1 s only 0 GPU + " in message
        assert 1 <= seconds < 10
