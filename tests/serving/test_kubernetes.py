"""The manifests beside the image: what they name is there, in the server and in each other."""

from pathlib import Path

import httpx
import pytest
import yaml

from onerec_hf.cli.arguments import parse
from onerec_hf.cli.serve import ServeArguments
from onerec_hf.serving.access import TOKEN_VARIABLE
from onerec_hf.serving.gate import KNOWN_PATHS, OPEN_PATHS

FOLDER = Path(__file__).parents[2] / "examples" / "kubernetes"
MANIFESTS = {path.name: list(yaml.safe_load_all(path.read_text())) for path in sorted(FOLDER.glob("*.yaml"))}
DEPLOYMENT, SERVICE, BUDGET = MANIFESTS["serve.yaml"]
POD = DEPLOYMENT["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]


@pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe", "readinessProbe"])
def test_probes_are_answered_without_a_token(server, probe):
    get = CONTAINER[probe]["httpGet"]
    assert get["path"] == ("/ready" if probe == "readinessProbe" else "/health")
    assert get["path"] in OPEN_PATHS
    assert httpx.get(server.url + get["path"], timeout=60, trust_env=False).status_code == 200
    assert get["port"] in [port["name"] for port in CONTAINER["ports"]]


def test_the_server_takes_its_options():
    (args,) = parse((ServeArguments,), CONTAINER["args"], "serve")
    assert (args.host, args.port) == ("0.0.0.0", CONTAINER["ports"][0]["containerPort"])
    assert CONTAINER["env"][0]["name"] == TOKEN_VARIABLE
    mounts = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert Path(args.model).parent == Path("/models")
    assert set(mounts.values()) == {volume["name"] for volume in POD["spec"]["volumes"]}
    # Kubernetes kills the pod after the grace period, which begins with the sleep.
    sleep = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["spec"]["terminationGracePeriodSeconds"] > sleep + args.drain_timeout


def test_the_image_is_that_of_the_dockerfile():
    dockerfile = (FOLDER.parents[1] / "Dockerfile").read_text()
    assert f"docker build -t {CONTAINER['image'].split(':')[0]} ." in dockerfile
    assert f"USER {POD['spec']['securityContext']['runAsUser']}" in dockerfile


def test_a_new_model_leaves_the_number_of_replicas_to_the_autoscaler():
    assert "replicas" not in DEPLOYMENT["spec"]


def test_manifests_name_each_other():
    labels = POD["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels
    assert SERVICE["spec"]["selector"] == BUDGET["spec"]["selector"]["matchLabels"] == labels
    assert SERVICE["spec"]["ports"][0]["targetPort"] == CONTAINER["ports"][0]["name"]
    for name in ("autoscale-cpu.yaml", "autoscale-requests.yaml"):
        scaler = MANIFESTS[name][-1]["spec"]
        assert scaler["scaleTargetRef"]["name"] == DEPLOYMENT["metadata"]["name"]
        assert 2 == scaler["minReplicas"] < scaler["maxReplicas"]
    # A share of the CPU needs a request for it.
    assert "cpu" in CONTAINER["resources"]["requests"]


def test_the_metric_of_autoscaling_is_there(server):
    monitor, scaler = MANIFESTS["autoscale-requests.yaml"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["path"] in KNOWN_PATHS
    assert endpoint["port"] == CONTAINER["ports"][0]["name"]
    secret = CONTAINER["env"][0]["valueFrom"]["secretKeyRef"]
    assert endpoint["authorization"]["credentials"] == secret
    assert monitor["spec"]["selector"]["matchLabels"] == POD["metadata"]["labels"]
    text = httpx.get(server.url + endpoint["path"], timeout=60, trust_env=False).text
    (metric,) = scaler["spec"]["metrics"]
    assert f"\n{metric['pods']['metric']['name']} " in text
