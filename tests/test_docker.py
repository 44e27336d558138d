"""The images, as far as a machine without Docker can try them: what is copied is there, the command that installs and
the entry points exist, the health check tells a healthy server from another. scripts/lint runs hadolint."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILES = {name: ROOT / "docker" / name for name in ("Dockerfile", "Dockerfile.cpu")}
SETUP = (ROOT / "scripts/lib/setup.sh").read_text()
COMPOSE, GPU = (yaml.safe_load((ROOT / "docker" / name).read_text()) for name in ("compose.yaml", "compose.gpu.yaml"))


@pytest.fixture(params=DOCKERFILES)
def image(request) -> DockerfileParser:
    with DOCKERFILES[request.param].open("rb") as file:
        return DockerfileParser(fileobj=file, cache_content=True)


def values(image: DockerfileParser, instruction: str) -> list[str]:
    return [step["value"] for step in image.structure if step["instruction"] == instruction]


def in_the_image() -> set[str]:
    """What COPY takes along of this checkout, by .dockerignore."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return exclude_paths(str(ROOT), [line for line in lines if line and not line.startswith("#")])


def test_bases_are_pinned_and_vllm_is_the_version_of_the_setup():
    vllm = re.search(r"^vllm_version=(\S+)$", SETUP, re.MULTILINE)[1]
    bases = {name: DockerfileParser(fileobj=path.open("rb")).baseimage for name, path in DOCKERFILES.items()}
    assert bases["Dockerfile"].partition("@")[0] == f"vllm/vllm-openai:v{vllm}"
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", bases["Dockerfile.cpu"])
    for service in COMPOSE["services"].values():
        assert "build" in service or re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+(@sha256:[0-9a-f]{64})?", service["image"])


def test_labels(image):
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in image.labels.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (labels["version"], labels["licenses"]) == (project["version"], project["license"])
    assert labels["source"] == project["urls"]["Source"]
    assert labels["base.name"].endswith(image.baseimage.partition("@")[0])
    assert {"title", "description", "documentation"} <= labels.keys()


def test_what_is_copied_is_there_and_not_ignored(image):
    copied = [source for value in values(image, "COPY") for source in value.split()[:-1]]
    assert copied and all((ROOT / source).exists() for source in copied)
    there = in_the_image()
    needed = [
        *(
            "pyproject.toml",
            "README.md",
            "LICENSE",
            "specattn_vllm/plugin.py",
            "kernels/__init__.py",
            "configs/demo.json",
        ),
        *("scripts/serve", "scripts/lib/setup.sh", "scripts/lib/constraints-cpu.txt", "docker/health.py"),
        *(f"specattn_vllm/demo/{role}/model.safetensors" for role in ("target", "draft")),
    ]
    assert set(needed) <= there
    assert not {".git", ".venv", "docker/README.md", "tests/test_docker.py"} & there


def test_neither_runs_as_root_and_any_user_may_write_the_caches(image):
    assert values(image, "USER")[-1] == "10001"
    home, models = image.envs["HOME"], image.envs["HF_HOME"]
    assert any(f"install -d -m 1777 {home} {models}" in value for value in values(image, "RUN"))
    assert image.envs["USER"] == image.envs["LOGNAME"]  # torch asks for the user's name, which a --user has not
    assert values(image, "EXPOSE") == ["8000"]


def test_the_cpu_image_installs_by_a_command_that_finishes(made_venv):
    text = DOCKERFILES["Dockerfile.cpu"].read_text()
    command = re.search(r"^RUN (PIP_NO_CACHE_DIR=1 bash scripts/lib/setup\.sh run)$", text, re.MULTILINE)[1]
    environment = os.environ | {"SPECATTN_VENV": str(made_venv)}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(["bash", "-c", f"{command}s"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("setup.sh: error: setup knows 'dev'")


def test_the_entry_points_exist():
    entries = {
        name: json.loads(values(DockerfileParser(fileobj=path.open("rb")), "ENTRYPOINT")[0])
        for name, path in DOCKERFILES.items()
    }
    assert entries == {"Dockerfile": ["vllm", "serve"], "Dockerfile.cpu": ["scripts/serve"]}
    assert os.access(ROOT / "scripts/serve", os.X_OK)
    assert "vllm" in {point.name for point in metadata.entry_points(group="console_scripts")}


@pytest.fixture
def server():
    """server(status) -> the port of a server that answers /health with it."""
    servers = []

    def start(status: int) -> int:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status if self.path == "/health" else 404)
                self.end_headers()

            def log_message(self, *_):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1].server_port

    yield start
    for one in servers:
        one.shutdown()
        one.server_close()


def check(image: DockerfileParser, **more: str) -> subprocess.CompletedProcess:
    """The HEALTHCHECK of an image, with this Python and the checkout in the place of the image's."""
    command = shlex.split(re.search(r"CMD (\[.*\])$", values(image, "HEALTHCHECK")[0])[1])
    words = [word.strip("[],") for word in command]
    assert words == ["python3", "/opt/specattn/docker/health.py"]
    proxy = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}  # must not be asked
    return subprocess.run(
        [sys.executable, str(ROOT / "docker/health.py")], env=os.environ | proxy | more, capture_output=True, text=True
    )


def test_the_health_check_tells_a_healthy_server_from_another(image, server):
    assert check(image, HEALTH_PORT=str(server(200))).returncode == 0
    failing = check(image, HEALTH_PORT=str(port := server(503)))
    assert (failing.returncode, failing.stderr) == (1, f"health: error: port {port}: /health answers 503\n")
    absent = check(image, HEALTH_PORT="1")
    assert absent.returncode == 1 and "Connection refused" in absent.stderr
    assert check(image, HEALTH_PORT="x").returncode == 1


def test_the_health_check_waits_for_a_model_that_loads(image):
    options = dict(re.findall(r"--([\w-]+)=(\S+)", values(image, "HEALTHCHECK")[0]))
    assert options.keys() == {"start-period", "interval", "timeout", "retries"} and options["start-period"][-1] == "m"
    seconds = re.search(r"^SECONDS = (\d+)", (ROOT / "docker/health.py").read_text(), re.MULTILINE)[1]
    assert int(seconds) < int(options["timeout"].removesuffix("s"))


def test_compose_waits_for_what_is_healthy_and_opens_ports_to_this_machine_alone():
    services = COMPOSE["services"]
    for service in services.values():
        for name, waits in service.get("depends_on", {}).items():
            assert name in services
            # Whom one waits for has a check: its own, or the image's.
            assert waits["condition"] != "service_healthy" or "healthcheck" in services[name]
        assert all(port.startswith("${BIND:-127.0.0.1}:") for port in service["ports"])
        assert "build" in service or "healthcheck" in service
    assert GPU["services"].keys() <= services.keys()
    for service in (*services.values(), *GPU["services"].values()):
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
        for volume in service.get("volumes", []):
            source = volume.split(":/")[0]
            assert not source.startswith("./") or (ROOT / "docker" / source).exists(), volume
