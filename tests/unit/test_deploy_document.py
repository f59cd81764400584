"""What docs/deploy.md lets people copy: manifests that parse, and settings that there are."""

import re
from typing import Any

import pytest
import yaml

from tests.workers import ROOT
from worker.settings import Settings, load_settings, variable

TEXT = (ROOT / "docs" / "deploy.md").read_text()
MANIFESTS: list[dict[str, Any]] = [
    manifest
    for block in re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    for manifest in yaml.safe_load_all(block)
]


def pods() -> list[dict[str, Any]]:
    """The pods that some manifest has made."""
    return [one["spec"]["template"]["spec"] for one in MANIFESTS if "template" in one["spec"]]


def test_every_manifest_says_what_it_is() -> None:
    assert {one["kind"] for one in MANIFESTS} >= {"Job", "Deployment", "PodDisruptionBudget"}
    assert all(one["apiVersion"] and one["metadata"]["name"] for one in MANIFESTS)


def test_no_pod_is_root_or_writes_into_its_image() -> None:
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_grace_of_a_worker_is_longer_than_its_settings_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for pod in pods():
        for one in pod["containers"][0]["env"]:
            monkeypatch.setenv(one["name"], one.get("value", "secret"))
        grace_s = pod.get("terminationGracePeriodSeconds", 30)
        assert grace_s >= load_settings().shutdown_grace_s + 10


def test_every_setting_that_is_named_exists() -> None:
    named = set(re.findall(r"BULWARK_[A-Z_]+", TEXT))
    assert named <= {variable(name) for name in Settings.model_fields}
