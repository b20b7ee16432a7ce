"""What the profile for Kubernetes asks its API for: a stand-in writes it down and refuses it."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.workflow.conftest import Project

ENGINES = Path(sys.prefix) / "cluster"

pytestmark = pytest.mark.skipif(
    not ENGINES.is_dir(), reason="`make cluster` installs the engine that this asks"
)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Bodies of the jobs that were to be made, by an API at the address of the configuration."""
    bodies: list[dict[str, Any]] = []

    class Api(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            is_job = self.path.endswith("/jobs")
            if is_job:
                bodies.append(body)
            self._answer(403 if is_job else 201, body)

        def do_DELETE(self) -> None:
            self._answer(200, {})

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Api)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    configuration = {
        "clusters": [{"name": "here", "cluster": {"server": address}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "users": [{"name": "me", "user": {}}],
        "current-context": "here",
    }
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(configuration))
    monkeypatch.setenv("KUBECONFIG", str(path))
    yield bodies
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_cell_becomes_a_pod_with_its_resources_and_the_volume(
    tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    project = Project(tmp_path / "project").create({"half": {"divisor": 2}})
    command = project.command("--target", "executed", "--profile", "kubernetes")
    command += ["--container-image", "example/image", "--default-storage-prefix", str(project.root)]
    command += ["--kubernetes-persistent-volumes", f"claim:{project.root}", "--retries", "0"]
    result = subprocess.run(
        command, cwd=project.root, env=project.environment, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert asked, result.stderr
    pod = asked[0]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "example/image"
    assert container["resources"]["requests"]["memory"] == "1500M"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["claim"] == str(project.root)
    claims = [v.get("persistentVolumeClaim", {}).get("claimName") for v in pod["volumes"]]
    assert "claim" in claims
